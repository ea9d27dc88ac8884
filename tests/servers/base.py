"""A server in a process and a folder of its own, and how to wait for it."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from pathlib import Path
from pwd import getpwnam
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Self
HOST = "127.0.0.1"
# Below the ports that the kernel gives to outgoing connections, and so is a cluster's bus, 10,000 above each.
PORTS = range(16_384, 22_768)
BUS = 10_000
DEADLINE_S = 20.0
POLL_S = 0.005
CLIENT_TIMEOUT_S = 2.0

# The guard leads the process group that the server joins. Its input ends when we do, however we end.
_GUARD = ("sh", "-c", "read -r _; kill -s KILL 0")


def wait_until(condition: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Ask until the condition holds. TimeoutError, with `what` was waited for, after `deadline_s` seconds."""
    give_up, pause = time.monotonic() + deadline_s, threading.Event()
    while not condition():
        if time.monotonic() > give_up:
            raise TimeoutError(f"after {deadline_s} s still waiting for {what}")
        pause.wait(POLL_S)


def free_port() -> int:
    """A port that nothing listens on, nor on the one of its cluster bus; others may take it before you do."""
    chance = random.SystemRandom()
    while True:
        port = chance.choice(PORTS)
        try:
            for number in (port, port + BUS):
                with socket.create_server((HOST, number)):
                    pass
        except OSError:
            continue
        return port


class _Server(ABC):
    """One server in a folder of its own. It dies with this process, also when this process is killed.

    `with` starts it and in the end kills it and removes the folder. Port and folder stay the same over kill(), stop()
    and start(). A child made by a bare fork (no exec) keeps it alive as long as it lives.
    """

    name: str
    """What it is, for messages."""

    def __init__(self) -> None:
        self.port = 0
        self._own_folder = TemporaryDirectory(prefix=f"{self.name}-")
        self.folder = Path(self._own_folder.name)
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process id of a server that was started."""
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process is there, frozen or not."""
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        """What the server has said since it was first started."""
        return (self.folder / "log").read_text(errors="replace")

    def start(self) -> None:
        """Start, also again, and return when it answers.

        RuntimeError, with the end of its log, if it ends instead; TimeoutError if it does not answer.
        """
        assert not self.running
        while not self._started_on(self.port or free_port()):
            pass

    def stop(self) -> None:
        """Let it end in an orderly way."""
        if self.running:
            self.thaw()
            os.kill(self.pid, self._orderly)
            assert self._process is not None
            self._process.wait(DEADLINE_S)
        self.kill()

    def kill(self) -> None:
        """End it at once (SIGKILL), with what it has forked."""
        if self._process is None or self._guard is None:
            return
        os.killpg(self._guard.pid, signal.SIGKILL)
        self._process.wait(DEADLINE_S)
        self._guard.communicate(timeout=DEADLINE_S)
        self._process = self._guard = None

    def freeze(self) -> None:
        """Stop it in its tracks (SIGSTOP): the kernel still accepts connections and bytes for it."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def thaw(self) -> None:
        """Let it go on."""
        os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        """Kill it and remove its folder."""
        self.kill()
        self._own_folder.cleanup()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def _command(self, port: int) -> Sequence[str]:
        """What runs it."""

    @abstractmethod
    def _answers(self) -> bool:
        """Whether it is ready. Another server may have taken the port before ours, which then is about to end."""

    _user: str | None = None
    """The account it runs as; None: ours."""
    _orderly = signal.SIGTERM

    def _started_on(self, port: int) -> bool:
        """Whether it runs now; not if this was the first start and somebody else was quicker to take the port."""
        first, self.port = not self.port, port
        self.kill()
        self._guard = subprocess.Popen(_GUARD, stdin=subprocess.PIPE, process_group=0)
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command(port),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=self._guard.pid,
                **_as_user(self._user),
            )
        try:
            wait_until(lambda: not self.running or self._answers(), f"{self.name} on port {port}")
        except BaseException:
            self.kill()
            raise
        if self.running:
            return True
        self.kill()
        if first and "already in use" in self.log:
            (self.folder / "log").unlink()
            self.port = 0
            return False
        raise RuntimeError(f"{self.name} on port {port} ended: {self.log[-1000:]}")


def _as_user(name: str | None) -> dict[str, Any]:
    return {} if name is None else {"user": name, "group": getpwnam(name).pw_gid, "extra_groups": []}
