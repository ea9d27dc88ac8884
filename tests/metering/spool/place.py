"""What the tests of the spool share: lines in, lines out, and children that die."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from metering.spool import Spool

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


DEADLINE_S = 30


def fill(spool: Spool, *texts: str, durable: bool = False) -> None:
    for text in texts:
        spool.append("settle", uuid4(), text.encode(), durable=durable)


def ship(spool: Spool) -> list[str]:
    """What was delivered."""
    texts: list[str] = []
    shipped = spool.ship(lambda lines: texts.extend(line.payload.decode() for line in lines))
    assert shipped.lines == len(texts)
    return texts


def names(folder: Path) -> list[str]:
    return sorted(path.suffix for path in folder.iterdir())


def wait_until(condition: Callable[[], bool]) -> None:
    end, pause = time.monotonic() + DEADLINE_S, threading.Event()
    while not condition():
        assert time.monotonic() < end
        pause.wait(0.002)


def in_child(work: Callable[[], Any]) -> int:
    """The id of a forked child that does the work and ends."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


def kill_myself(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def how_it_ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def three_lines(folder: Path) -> tuple[Path, bytes]:
    """A file of the lines a, b and c, each as long as the others."""
    spool = Spool(folder)
    fill(spool, "a", "b", "c")
    spool.close()
    [path] = folder.iterdir()
    data = path.read_bytes()
    assert len(data) % 3 == 0
    return path, data
