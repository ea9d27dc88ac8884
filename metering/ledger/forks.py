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


class Gate:
    """Who uses a ledger's connections is inside; `shut` keeps others out and waits until everyone has left.

    A thread that is inside may enter again.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: dict[int, int] = {}
        self._is_shut = False

    def __enter__(self) -> None:
        me = threading.get_ident()
        with self._changed:
            while self._is_shut and me not in self._inside:
                self._changed.wait()
            self._inside[me] = self._inside.get(me, 0) + 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        me = threading.get_ident()
        with self._changed:
            self._inside[me] -= 1
            if not self._inside[me]:
                del self._inside[me]
                self._changed.notify_all()

    def shut(self, timeout_s: float) -> bool:
        """Let nobody in until `open`. True once every other thread is out, False if one was not within the timeout."""
        me = threading.get_ident()
        with self._changed:
            self._is_shut = True
            return self._changed.wait_for(lambda: self._inside.keys() <= {me}, timeout_s)

    def open(self) -> None:
        """Let everyone in again."""
        with self._changed:
            self._is_shut = False
            self._changed.notify_all()
