"""The durable record of every fact and document: one SQL database."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import sqlalchemy as sa

from metering.errors import InvalidSetting, SchemaMismatch
from metering.ledger.forks import Gate
from metering.ledger.schema import ledger_info
from metering.ledger.sqlite import SqlitePlace
from metering.ledger.transactions import SqliteDriver
from metering.ledger.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Literal
    from uuid import UUID

    from metering.errors import LedgerError
    from metering.ledger.transactions import Driver

__all__ = ["SCHEMA", "Ledger"]

logger = logging.getLogger("metering")

SCHEMA = "0009"
"""The newest migration this code knows. Revisions are ordered numbers, so an unknown larger one is a newer ledger."""

_SQLITE = "sqlite:///"
_POSTGRES = "postgresql+psycopg://"
_ledgers: weakref.WeakSet[Ledger] = weakref.WeakSet()
_forking = threading.Lock()
"""Held while this process forks, so that no ledger is opened meanwhile."""


class _Place(Protocol):
    """Where a ledger is, and what its database does in its own way."""

    dialect: Literal["sqlite", "postgresql"]
    begin_read: tuple[str, ...]
    """How a transaction begins that sees a single moment."""
    begin_write: tuple[str, ...]
    """How one begins that has no other writer of cold facts beside it."""
    error: type[Exception]
    """The root of what the driver raises."""

    where: str
    """What messages call it, without a password."""

    def engine(self) -> sa.Engine:
        """For cold queries, on connections in autocommit mode: transactions are begun explicitly."""

    def make(self) -> None:
        """Make the database, where that is ours to do. Raises `StoreUnavailable`."""

    def is_made(self) -> bool:
        """Whether the database is there, as far as one can tell without opening it. Raises `StoreUnavailable`."""

    def translated(self, error: Any) -> LedgerError:
        """The error a caller can act on for one of the driver's."""


class Ledger:
    """The ledger at a URL: `sqlite:///FILE`, or `postgresql+psycopg://USER:PASSWORD@HOST:PORT/DATABASE`.

    Opening checks its schema. `create` makes a ledger that is not there (on Postgres: in a database that is),
    `upgrade` migrates an older one. `first` is what is written with the schema, in the one transaction that creates a
    ledger.

    Cold queries go through `read()` and `write()` (SQLAlchemy Core); the admission path through `writer`.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 5.0,
        create: bool = False,
        upgrade: bool = False,
        first: Callable[[sa.Connection], None] | None = None,
    ) -> None:
        self._url = url
        self._place = _place_of(url, timeout_s)
        self.where = self._place.where
        """What messages call it: the file, or the URL without its password."""
        self.dialect = self._place.dialect
        self.timeout_s = timeout_s
        self.is_new = False
        """Whether opening it created it."""
        self._gate = Gate()
        with _forking:
            _ledgers.add(self)
        try:
            if create and not (self._place.is_made() and self.revision() is not None):
                self.migrate(first)
            if upgrade:
                self.migrate(first)
            self._check_schema()
        except BaseException:
            self.close()
            raise

    @property
    def path(self) -> Path:
        """The file of a SQLite ledger. Raises `InvalidSetting` for any other."""
        if not isinstance(self._place, SqlitePlace):
            raise InvalidSetting("METERING_LEDGER_URL", self.where, f"{_SQLITE}FILE for what needs the file")
        return self._place.path

    @cached_property
    def ledger_id(self) -> UUID:
        """Which ledger this is, wherever it lies."""
        with self.read() as connection:
            found: UUID = connection.execute(sa.select(ledger_info.c.ledger_id)).scalar_one()
        return found

    @cached_property
    def writer(self) -> Writer:
        """Where the admission path writes."""
        return Writer(_driver_of(self._url), timeout_s=self.timeout_s, gate=self._gate)

    @cached_property
    def _engine(self) -> sa.Engine:
        engine = self._place.engine()
        sa.event.listen(engine, "begin", self._begin)
        return engine

    def _begin(self, connection: sa.Connection) -> None:
        writes = connection.get_execution_options().get("writes", False)
        for statement in self._place.begin_write if writes else self._place.begin_read:
            connection.exec_driver_sql(statement)

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A connection in one read transaction: a single moment of the ledger."""
        with self._transaction(writes=False) as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A connection in one write transaction, committed when the block ends without an exception.

        No two of them overlap, in whatever process. On Postgres admissions go on beside it.
        """
        with self._transaction(writes=True) as connection:
            yield connection

    @contextmanager
    def _transaction(self, *, writes: bool) -> Iterator[sa.Connection]:
        try:
            with (
                self._gate,
                self._engine.connect().execution_options(writes=writes) as connection,
                connection.begin(),
            ):
                yield connection
        except sa.exc.IntegrityError:
            raise
        except sa.exc.DBAPIError as exc:
            if isinstance(exc.orig, self._place.error):
                raise self._place.translated(exc.orig) from exc
            raise
        except self._place.error as exc:  # of the driver's own cursor
            raise self._place.translated(exc) from exc

    def migrate(self, first: Callable[[sa.Connection], None] | None = None) -> str:
        """Bring the schema to `SCHEMA` in one transaction, creating the file if need be. Returns the revision.

        Of several that migrate at once, one does it, and the others find it done.
        """
        from alembic import command  # noqa: PLC0415  half a second that only a migration pays
        from alembic.config import Config  # noqa: PLC0415

        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        self._place.make()
        found = self.revision()
        if found is not None and found > SCHEMA:
            self._check_schema()
        with self.write() as connection:
            config.attributes["connection"] = connection
            is_new = _revision(connection) is None
            command.upgrade(config, "head")
            if is_new and first is not None:
                first(connection)
        self.is_new = is_new
        return SCHEMA

    def revision(self) -> str | None:
        """The migration the database is at; None for one that was never migrated."""
        with self.read() as connection:
            return _revision(connection)

    def close(self) -> None:
        """Close every connection, once nobody uses it. The next use opens it again."""
        self._gate.shut(self.timeout_s)
        try:
            self._close_connections()
        finally:
            self._gate.open()

    def _close_connections(self) -> None:
        if "writer" in self.__dict__:
            self.writer.close()
        if "_engine" in self.__dict__:
            self._engine.dispose()

    def _check_schema(self) -> None:
        found = self.revision()
        if found is None:
            raise SchemaMismatch(f"ledger {self.where}: has no Tallystick schema; `tallystick init` creates it")
        if found < SCHEMA:
            raise SchemaMismatch(
                f"ledger {self.where}: schema {found} is older than {SCHEMA}; run `tallystick migrate`"
            )
        if found > SCHEMA:
            raise SchemaMismatch(
                f"ledger {self.where}: schema {found} is newer than {SCHEMA}, the newest this tallystick knows; "
                "upgrade tallystick"
            )

    def _close_before_fork(self) -> None:
        if self._gate.shut(self.timeout_s):
            self._close_connections()
        else:
            logger.warning("ledger %s is in use by another thread while this process forks", self.where)

    def _start_anew_in_child(self) -> None:
        self._gate = Gate()
        self.__dict__.pop("writer", None)
        self.__dict__.pop("_engine", None)


def _driver_of(url: str) -> Driver:
    if url.startswith(_POSTGRES):
        from metering.ledger.postgres_driver import PostgresDriver  # noqa: PLC0415  psycopg is an extra

        return PostgresDriver(url)
    return SqliteDriver(Path(url.removeprefix(_SQLITE)))


def _revision(connection: sa.Connection) -> str | None:
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()


def _before_fork() -> None:
    _forking.acquire()
    for ledger in _ledgers:
        ledger._close_before_fork()


def _after_fork_in_parent() -> None:
    for ledger in _ledgers:
        ledger._gate.open()
    _forking.release()


def _after_fork_in_child() -> None:
    global _forking  # noqa: PLW0603  the parent's lock is held by a thread that is not here
    _forking = threading.Lock()
    for ledger in _ledgers:
        ledger._start_anew_in_child()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)


def _place_of(url: str, timeout_s: float) -> _Place:
    if url.startswith(_SQLITE) and len(url) > len(_SQLITE):
        if url == f"{_SQLITE}:memory:":
            raise InvalidSetting("METERING_LEDGER_URL", url, "a file: what is in memory is not recorded")
        return SqlitePlace(Path(url.removeprefix(_SQLITE)), timeout_s)
    if not url.startswith(_POSTGRES):
        raise InvalidSetting("METERING_LEDGER_URL", _without_password(url), f"{_SQLITE}FILE or {_POSTGRES}...")
    try:
        from metering.ledger.postgres import PostgresPlace  # noqa: PLC0415  an app on SQLite need not have it
    except ImportError as exc:
        raise InvalidSetting("METERING_LEDGER_URL", "a Postgres URL", "pip install 'tallystick[postgres]'") from exc
    return PostgresPlace(url, timeout_s)


def _without_password(url: str) -> str:
    scheme, separator, rest = url.partition("?")[0].partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"
