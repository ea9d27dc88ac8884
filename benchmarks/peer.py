"""The peer: a process in an environment of its own, made from the package registry, that runs one turn when told to."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.measure import Rate

if TYPE_CHECKING:
    from typing import Self

__all__ = ["PACKAGES", "Peer", "make_environment"]

PACKAGES = ("limits>=5.8,<6", "redis>=8,<9", "hiredis>=3.2", "coredis>=6,<7")
_ROOT = Path(__file__).parent.parent


def make_environment(folder: Path) -> Path:
    """A virtual environment with `limits` in it, in a folder that is not there yet; its python.

    Raises RuntimeError, with what uv said, where the registry does not give it.
    """
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or "uv"
    python = folder / "bin" / "python"
    for command in (
        ("venv", "--python", sys.executable, str(folder)),
        ("pip", "install", "--python", str(python), *PACKAGES),
    ):
        done = subprocess.run((uv, "--quiet", *command), check=False, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip())
    return python


class Peer:
    """`limits` on a Redis, called by so many `threads` or `tasks`."""

    def __init__(self, python: Path, url: str, kind: str, callers: int) -> None:
        self._process = subprocess.Popen(
            (str(python), "-m", "benchmarks.peer_limits", url, kind, str(callers)),
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.name = self._read()

    def turn(self, seconds: float) -> Rate:
        """Hit its limit for so long."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        return Rate(*json.loads(self._read()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the peer ended: see what it said above")
        return line.strip()
