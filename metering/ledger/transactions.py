"""What the writer asks of a database, and the transactions in which works run."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, cast

from metering.ledger.sqlite import connect, translated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    import sqlalchemy as sa

    from metering.errors import LedgerError

__all__ = ["Cursor", "Driver", "Locked", "SqliteDriver", "Transaction", "cursor_of", "doubts_the_transaction"]

T = TypeVar("T")

_OF_A_VALUE = {
    "sqlite3": {("sqlite3", name) for name in ("DataError", "IntegrityError", "InterfaceError", "ProgrammingError")},
    "psycopg": {("psycopg", name) for name in ("DataError", "IntegrityError", "ProgrammingError")},
}


class Cursor(Protocol):
    """What is used of a driver's cursor (PEP 249), with the statements of `admission.statements`."""

    @property
    def connection(self) -> Any:
        """The driver's connection."""

    @property
    def rowcount(self) -> int:
        """How many rows the last statement wrote."""

    @property
    def description(self) -> Any:
        """The columns of the last answer, names first."""

    def execute(self, sql: Any, parameters: Any = ..., /) -> Cursor:
        """Run a statement."""

    def executemany(self, sql: Any, parameters: Any, /) -> Any:
        """Run a statement with each set of values."""

    def fetchone(self) -> Any:
        """A row; None after the last."""

    def fetchall(self) -> list[Any]:
        """The rows that are left."""

    def __iter__(self) -> Iterator[Any]:
        """The rows that are left."""


class Transaction:
    """A cursor, and what the works that share it know. Where something is undone another one takes its place."""

    def __init__(self, connection: Any) -> None:
        super().__init__(connection)  # type: ignore[call-arg]  # of the driver's cursor
        self.known: dict[str, Any] = {}
        """What works have read, and is so until the end of the transaction."""
        self.left_to_write: list[Callable[[], object]] = []
        """What works have left to be written before the commit."""

    def complete(self) -> None:
        """Write what is left to be written."""
        for write in self.left_to_write:
            write()


class Locked(Generic[T]):
    """A work that says what it decides about: accounts, by name or by the digest of a key.

    Where several processes write at once, those are locked before it, in one order for all.
    """

    __slots__ = ("_work", "accounts", "key_digest")

    def __init__(
        self, work: Callable[[Any], T], *, accounts: Sequence[str] = (), key_digest: str | None = None
    ) -> None:
        self._work = work
        self.accounts = accounts
        self.key_digest = key_digest

    def __call__(self, cursor: Any) -> T:
        """Run it."""
        return self._work(cursor)


class Driver(Protocol):
    """A database as the writer uses it. What it raises is an `error`, unless a `LedgerError` says what to do."""

    where: str
    """What messages call it."""
    groups_all: bool
    """Whether works that are not `Locked` may share a transaction with others."""

    @property
    def error(self) -> type[Exception]:
        """The root of what the driver raises."""

    def connect(self, timeout_s: float) -> Any:
        """A connection. Locks are waited for `timeout_s`."""

    def set_timeout(self, connection: Any, timeout_s: float) -> None:
        """From now on locks are waited for so long."""

    def is_lost(self, connection: Any) -> bool:
        """Whether it can no longer be used."""

    def is_busy(self, connection: Any) -> bool:
        """Whether it is inside a transaction."""

    def begin(self, connection: Any) -> Any:
        """Begin a transaction: its cursor, a `Transaction`."""

    def lock(self, transaction: Any, works: Sequence[Callable[[Any], object]]) -> None:
        """Lock what the works write about."""

    def again(self, transaction: Any) -> Any:
        """Another cursor of the same transaction, which knows nothing."""

    def changes(self, transaction: Any) -> int:
        """A number that goes up when something is written."""

    def commit(self, transaction: Any, timeout_s: float) -> None:
        """Make it durable. What it raises says that nothing was written, unless it says that this cannot be told."""

    def rollback(self, connection: Any) -> None:
        """Undo the transaction."""

    def told(self, error: Exception) -> LedgerError:
        """What callers are told of an error of the database."""


def cursor_of(connection: sa.Connection) -> Cursor:
    """A cursor of the driver, in a transaction of `Ledger.read` or `Ledger.write`, for statements that works use."""
    if connection.dialect.name == "postgresql":
        from metering.ledger.postgres_driver import PostgresCursor  # noqa: PLC0415  psycopg is an extra

        return PostgresCursor(cast("Any", connection.connection.driver_connection))
    return cast("Cursor", connection.connection.cursor())


def doubts_the_transaction(error: Exception) -> bool:
    """Whether it was raised by a driver, and of more than a value: names are those of PEP 249."""
    names = {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(error).__mro__}
    return any((driver, "Error") in names and not names & of_a_value for driver, of_a_value in _OF_A_VALUE.items())


class _SqliteTransaction(Transaction, sqlite3.Cursor):
    pass


class SqliteDriver:
    """SQLite: whoever writes has the whole ledger, so there is nothing to lock."""

    error: type[Exception] = sqlite3.Error
    groups_all = True

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        self._path = path

    def connect(self, timeout_s: float) -> sqlite3.Connection:
        """See `Driver`."""
        return connect(self._path, timeout_s=timeout_s)

    def set_timeout(self, connection: sqlite3.Connection, timeout_s: float) -> None:
        """See `Driver`."""
        connection.execute(f"PRAGMA busy_timeout = {timeout_s * 1000:.0f}")

    def is_lost(self, connection: sqlite3.Connection) -> bool:  # noqa: ARG002
        """See `Driver`."""
        return False

    def is_busy(self, connection: sqlite3.Connection) -> bool:
        """See `Driver`."""
        return connection.in_transaction

    def begin(self, connection: sqlite3.Connection) -> _SqliteTransaction:
        """See `Driver`."""
        transaction = connection.cursor(_SqliteTransaction)
        transaction.execute("BEGIN IMMEDIATE")
        return transaction

    def lock(self, transaction: _SqliteTransaction, works: Sequence[Callable[[Any], object]]) -> None:
        """See `Driver`."""

    def again(self, transaction: _SqliteTransaction) -> _SqliteTransaction:
        """See `Driver`."""
        return transaction.connection.cursor(_SqliteTransaction)

    def changes(self, transaction: _SqliteTransaction) -> int:
        """See `Driver`."""
        return transaction.connection.total_changes

    def commit(self, transaction: _SqliteTransaction, timeout_s: float) -> None:  # noqa: ARG002
        """See `Driver`."""
        transaction.execute("COMMIT")

    def rollback(self, connection: sqlite3.Connection) -> None:
        """See `Driver`."""
        connection.rollback()

    def told(self, error: Exception) -> LedgerError:
        """See `Driver`."""
        assert isinstance(error, sqlite3.Error)
        return translated(error, self._path)
