"""Connections to a ledger on Postgres. They speak the texts that SQLite keeps, so both are read by the same code.

A uuid is 32 hex digits, a time the text of `instant_text`, a numeric that of `decimal_text`; as parameters these texts
are taken for such columns as they are.
"""

from __future__ import annotations

import math
import os
import weakref
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
import sqlalchemy as sa
from psycopg import errors
from psycopg.adapt import Loader
from psycopg.conninfo import conninfo_to_dict
from psycopg.errors import _WaitTimeout
from psycopg.rows import TupleRow

from metering.errors import InvalidSetting, LedgerError, StoreUnavailable
from metering.ledger.types import INSTANT_LENGTH

if TYPE_CHECKING:
    from typing import Literal

    from psycopg.abc import Buffer, PQGen

__all__ = ["SERIAL", "PostgresPlace", "connect", "described", "translated"]

RV = TypeVar("RV")

SCHEME = "postgresql+psycopg://"
SERIAL = 0x7A11
"""The advisory lock of a database's writers of cold facts. Whoever changes accounts, keys, plans, schema or outbox
holds it from the beginning of the transaction: each of them reads before it writes, and a number of the outbox is a
version, so it must become visible in order. Admissions go on beside it, but for accounts whose rows are locked.
"""
GRACE_S = 1.0
"""How much longer than the server a client waits for the word that something took too long."""


class _Connection(psycopg.Connection[TupleRow]):
    """One that waits no longer than `patience_s` for the answer to a statement; None: for ever."""

    patience_s: float | None = None

    def wait(self, gen: PQGen[RV], interval: float = 0.1, timeout: float | None = None) -> RV:
        try:
            return super().wait(gen, interval, self.patience_s if timeout is None else timeout)
        except _WaitTimeout as exc:
            self.close()  # the answer may still come, and would be taken for that of the next statement
            raise psycopg.OperationalError(f"the server has not answered within {self.patience_s:g} s") from exc


_open_connections: weakref.WeakSet[_Connection] = weakref.WeakSet()
_forking: list[_Connection] = []
"""What was open when this process began to fork, so that nothing of it is closed in the child by garbage collection."""


def _abandon_connections() -> None:
    # To close its parent's connection would say goodbye to the server. In a child their sockets lead nowhere.
    nowhere = os.open(os.devnull, os.O_RDWR)
    for connection in _forking:
        if not connection.closed:
            os.dup2(nowhere, connection.fileno(), inheritable=False)
            connection.close()
    os.close(nowhere)
    _open_connections.clear()
    _forking.clear()


os.register_at_fork(
    before=lambda: _forking.extend(_open_connections),
    after_in_parent=_forking.clear,
    after_in_child=_abandon_connections,
)


class _InstantLoader(Loader):
    """`2023-11-16 18:17:03.97996+00` as `instant_text` writes it. The session is in UTC."""

    def load(self, data: Buffer) -> str:
        text = bytes(data).decode()
        text = f"{text[:10]}T{text[11:-3]}"
        return f"{text if '.' in text else text + '.'}".ljust(INSTANT_LENGTH - 1, "0") + "Z"


class _DecimalLoader(Loader):
    """`5.250000000000` as `decimal_text` writes it."""

    def load(self, data: Buffer) -> str:
        text = bytes(data).decode()
        return text.rstrip("0").rstrip(".") if "." in text else text


class _UuidLoader(Loader):
    """32 hex digits."""

    def load(self, data: Buffer) -> str:
        return bytes(data).decode().replace("-", "")


def connect(url: str, *, timeout_s: float, is_bounded: bool = True) -> _Connection:
    """A connection in autocommit mode: transactions are begun explicitly, and locks waited for `timeout_s`.

    A statement, too, may take `timeout_s`, and is given up a little later where the server does not answer at all; with
    `is_bounded=False` as long as it needs. Raises `StoreUnavailable`, `LedgerError`, `InvalidSetting`.
    """
    parameters = _parameters(url)
    parameters = {"application_name": "tallystick", **parameters, "client_encoding": "UTF8"}
    parameters.setdefault("connect_timeout", max(2, math.ceil(timeout_s)))
    # For a server that cannot be reached any more: without these the kernel would try for a quarter of an hour.
    parameters.setdefault("tcp_user_timeout", max(2, math.ceil(timeout_s)) * 1000)
    timeout_ms = max(1, round(timeout_s * 1000))
    settings = {
        "TimeZone": "UTC",
        "DateStyle": "ISO",
        "lock_timeout": timeout_ms,
        "statement_timeout": timeout_ms if is_bounded else 0,
        # A process that was stopped in the middle of a commit must not keep others from its accounts for ever.
        "idle_in_transaction_session_timeout": 2 * timeout_ms if is_bounded else 0,
    }
    try:
        connection = _Connection.connect(**parameters, autocommit=True)
        try:
            connection.patience_s = timeout_s + GRACE_S if is_bounded else None
            connection.execute("; ".join(f"SET {name} = '{value}'" for name, value in settings.items()))
        except BaseException:
            connection.close()
            raise
    except psycopg.Error as exc:
        raise translated(exc, described(url)) from exc
    for type_name, loader in (("timestamptz", _InstantLoader), ("numeric", _DecimalLoader), ("uuid", _UuidLoader)):
        connection.adapters.register_loader(type_name, loader)
    _open_connections.add(connection)
    return connection


class PostgresPlace:
    """A ledger in a database of a server: see `_Place` of `metering.ledger`."""

    dialect: Literal["sqlite", "postgresql"] = "postgresql"
    begin_read: tuple[str, ...] = ("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY",)
    begin_write: tuple[str, ...] = ("BEGIN ISOLATION LEVEL READ COMMITTED", f"SELECT pg_advisory_xact_lock({SERIAL})")
    error: type[Exception] = psycopg.Error

    def __init__(self, url: str, timeout_s: float) -> None:
        self._url = url
        self._timeout_s = timeout_s
        self.where = described(url)

    def engine(self) -> sa.Engine:
        """For cold queries, which may take as long as they need. A server that was restarted is not noticed."""
        return sa.create_engine(
            "postgresql+psycopg://",
            creator=lambda: connect(self._url, timeout_s=self._timeout_s, is_bounded=False),
            pool_pre_ping=True,
            use_native_hstore=False,
        )

    def make(self) -> None:
        """Nothing: a database is made by whoever runs the server."""

    def is_made(self) -> bool:
        """Taken for granted: opening it says if it is not."""
        return True

    def translated(self, error: psycopg.Error) -> LedgerError:
        """See `translated`."""
        return translated(error, self.where)


def described(url: str) -> str:
    """What messages call the ledger at a URL: `postgresql://USER@HOST:PORT/DATABASE`, never with the password."""
    parts = _parameters(url)
    user = f"{parts['user']}@" if "user" in parts else ""
    port = f":{parts['port']}" if "port" in parts else ""
    return f"postgresql://{user}{parts.get('host', '')}{port}/{parts.get('dbname', '')}"


def translated(error: psycopg.Error, where: str) -> LedgerError:
    """The error a caller can act on for what the server, or the way to it, reported about the ledger `where`."""
    match error:
        case errors.LockNotAvailable():
            says = "another writer held it for longer than the timeout"
        case errors.QueryCanceled():
            says = "a statement took longer than the timeout"
        case errors.DeadlockDetected() | errors.SerializationFailure():
            says = "another writer was in the way; nothing of this call was written"
        case errors.DiskFull():
            says = "the disk is full; nothing of this call was written"
        case errors.ReadOnlySqlTransaction() | errors.InsufficientPrivilege():
            says = f"is read-only for this user ({_first_line(error)})"
        case psycopg.OperationalError() | psycopg.InterfaceError() | errors.IdleInTransactionSessionTimeout():
            says = _first_line(error)
        case _:
            return LedgerError(f"ledger {where}: {_first_line(error)}")
    return StoreUnavailable(f"ledger {where}: {says}")


def _first_line(error: psycopg.Error) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _parameters(url: str) -> dict[str, Any]:
    try:
        return conninfo_to_dict(f"postgresql://{url.removeprefix(SCHEME)}")
    except psycopg.Error:  # it says the URL, with the password
        raise InvalidSetting(
            "METERING_LEDGER_URL", "(not shown)", f"{SCHEME}USER:PASSWORD@HOST:PORT/DATABASE, percent-encoded"
        ) from None
