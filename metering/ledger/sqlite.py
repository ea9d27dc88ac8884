"""The one place where this process's own SQLite opens a ledger.

Two copies of SQLite in one process drop each other's POSIX locks (sqlite.org/howtocorrupt.html, 2.2.1), and DuckDB's
scanner carries a copy: whoever has a connection from here must never read the same file through DuckDB.
"""

from __future__ import annotations

import ctypes
import os
import sqlite3
import weakref
from decimal import Decimal
from typing import TYPE_CHECKING

import sqlalchemy as sa

from metering.billing.money import EXACT
from metering.errors import LedgerError, StoreUnavailable
from metering.ledger.types import decimal_text

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Literal

__all__ = ["SqlitePlace", "connect", "translated"]


class _Connection(sqlite3.Connection):
    """A connection that can be abandoned in a child, where a fork did not wait for it (see `forks`)."""


_open_connections: weakref.WeakSet[_Connection] = weakref.WeakSet()


def _abandon_connections() -> None:
    # A child must neither use nor close its parent's connections (sqlite.org/howtocorrupt.html, 2.6), and closing is
    # what garbage collection would do.
    for connection in _open_connections:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))
    _open_connections.clear()


os.register_at_fork(after_in_child=_abandon_connections)


class _ExactSum:
    """`exact_sum(x)`: the sum of numbers kept as text, as text. SQLite's own SUM would turn them into floats."""

    def __init__(self) -> None:
        self.total = Decimal(0)

    def step(self, value: str | int | None) -> None:
        if value is not None:
            self.total = EXACT.add(self.total, Decimal(value))

    def finalize(self) -> str:
        return decimal_text(self.total)


def connect(path: Path, *, timeout_s: float, create: bool = False) -> sqlite3.Connection:
    """A connection in autocommit mode: transactions are begun explicitly, and write locks waited for `timeout_s`."""
    try:
        connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode={'rwc' if create else 'rw'}",
            uri=True,
            timeout=timeout_s,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=256,
            factory=_Connection,
        )
        try:
            if create:
                # Only before the first table: so that the file shrinks again, a few pages at a time.
                connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            connection.create_aggregate("exact_sum", 1, _ExactSum)  # type: ignore[arg-type]  # typeshed wants an int result
        except BaseException:
            connection.close()
            raise
    except sqlite3.Error as exc:
        raise translated(exc, path) from exc
    _open_connections.add(connection)
    return connection


def translated(error: sqlite3.Error, path: Path) -> LedgerError:
    """The error a caller can act on for what SQLite reported about the file at `path`."""
    match _code(error):
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return StoreUnavailable(f"ledger {path}: another writer held it for longer than the timeout")
        case sqlite3.SQLITE_FULL:
            return StoreUnavailable(f"ledger {path}: the disk is full; nothing of this call was written")
        case sqlite3.SQLITE_CANTOPEN:
            return StoreUnavailable(f"ledger {path}: cannot be opened; `tallystick init` creates it")
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_PERM:
            return StoreUnavailable(f"ledger {path}: is read-only for this user")
        case sqlite3.SQLITE_NOTADB | sqlite3.SQLITE_CORRUPT:
            return LedgerError(f"ledger {path}: not a readable SQLite database ({error})")
        case _:
            return StoreUnavailable(f"ledger {path}: {error}")


class SqlitePlace:
    """A ledger in a file: see `_Place` of `metering.ledger`."""

    dialect: Literal["sqlite", "postgresql"] = "sqlite"
    begin_read: tuple[str, ...] = ("BEGIN",)
    # One that starts as a read and then writes fails at once under contention: the busy timeout is skipped.
    begin_write: tuple[str, ...] = ("BEGIN IMMEDIATE",)
    error: type[Exception] = sqlite3.Error

    def __init__(self, path: Path, timeout_s: float) -> None:
        self.path = path
        self.where = str(path)
        self._timeout_s = timeout_s

    def engine(self) -> sa.Engine:
        """For cold queries."""
        return sa.create_engine(
            "sqlite+pysqlite://",
            creator=lambda: connect(self.path, timeout_s=self._timeout_s),
            poolclass=sa.QueuePool,
        )

    def make(self) -> None:
        """Create the file where it is not there."""
        connect(self.path, timeout_s=self._timeout_s, create=True).close()

    def is_made(self) -> bool:
        """Whether the file is there; its folder is, afterwards."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return self.path.exists()
        except OSError as exc:
            raise StoreUnavailable(f"ledger {self.path}: its folder cannot be used ({exc})") from exc

    def translated(self, error: sqlite3.Error) -> LedgerError:
        """See `translated`."""
        return translated(error, self.path)


def _code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF
