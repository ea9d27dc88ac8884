"""Forks. SQLite keeps its locks per process, so no child may be born while its parent has a ledger open.

Such a child takes its parent's locks for its own (sqlite.org/howtocorrupt.html, 2.6). When the parent then closes the
file, SQLite deletes the write-ahead log under the child, and what the child goes on to commit is lost.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Gate"]

POLL_S = 0.001


class Gate:
    """Who uses a ledger's connections is inside; `shut` keeps others out and waits until everyone has left.

    A thread that is inside may enter again. Going in and out takes no lock, which an interrupt could leave held: a
    thread says that it is inside before it looks whether the gate is shut, and `shut` looks after it has shut it.
    """

    def __init__(self) -> None:
        self._inside: dict[int, int] = {}
        self._is_open = threading.Event()
        self._is_open.set()

    def __enter__(self) -> None:
        me = threading.get_ident()
        depth = self._inside.get(me, 0)
        self._inside[me] = depth + 1
        while not depth and not self._is_open.is_set():
            del self._inside[me]
            self._is_open.wait()
            self._inside[me] = 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        me = threading.get_ident()
        depth = self._inside.get(me, 1)
        if depth > 1:
            self._inside[me] = depth - 1
        else:
            self._inside.pop(me, None)

    def shut(self, timeout_s: float) -> bool:
        """Let nobody in until `open`. True once every other thread is out, False if one was not within the timeout."""
        me = threading.get_ident()
        self._is_open.clear()
        pause = threading.Event()
        for _ in range(max(1, int(timeout_s / POLL_S))):
            if self._inside.keys() <= {me}:
                return True
            pause.wait(POLL_S)
        return False

    def open(self) -> None:
        """Let everyone in again."""
        self._is_open.set()
