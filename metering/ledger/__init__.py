"""The durable record of every fact and document: one SQL database."""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import weakref
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from metering.errors import InvalidSetting, SchemaMismatch, StoreUnavailable
from metering.ledger.forks import Gate
from metering.ledger.sqlite import connect, translated
from metering.ledger.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["SCHEMA", "Ledger"]

logger = logging.getLogger("metering")

SCHEMA = "0002"
"""The newest migration this code knows. Revisions are ordered numbers, so an unknown larger one is a newer ledger."""

_SQLITE = "sqlite:///"
_ledgers: weakref.WeakSet[Ledger] = weakref.WeakSet()
_forking = threading.Lock()
"""Held while this process forks, so that no ledger is opened meanwhile."""


class Ledger:
    """The ledger at a URL (`sqlite:///FILE`).

    Opening checks its schema. `create` makes a ledger that is not there, `upgrade` migrates an older one. `first` is
    what is written with the schema, in the one transaction that creates a ledger.

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
        if not url.startswith(_SQLITE) or len(url) == len(_SQLITE):
            raise InvalidSetting("METERING_LEDGER_URL", _without_password(url), "sqlite:///FILE")
        if url == f"{_SQLITE}:memory:":
            raise InvalidSetting("METERING_LEDGER_URL", url, "a file: what is in memory is not recorded")
        self.path = Path(url.removeprefix(_SQLITE))
        self.timeout_s = timeout_s
        self.is_new = False
        """Whether opening it created it."""
        self._gate = Gate()
        with _forking:
            _ledgers.add(self)
        try:
            if create and not self._is_there():
                self.migrate(first)
            if upgrade:
                self.migrate(first)
            self._check_schema()
        except BaseException:
            self.close()
            raise

    @cached_property
    def writer(self) -> Writer:
        """Where the admission path writes."""
        return Writer(self.path, timeout_s=self.timeout_s, gate=self._gate)

    @cached_property
    def _engine(self) -> sa.Engine:
        engine = sa.create_engine(
            "sqlite+pysqlite://",
            creator=lambda: connect(self.path, timeout_s=self.timeout_s),
            poolclass=sa.QueuePool,
        )
        sa.event.listen(engine, "begin", _begin)
        return engine

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A connection in one read transaction: a single moment of the ledger."""
        with self._transaction(writes=False) as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A connection in one write transaction, committed when the block ends without an exception."""
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
        except sa.exc.DBAPIError as exc:
            if isinstance(exc.orig, sqlite3.Error) and not isinstance(exc.orig, sqlite3.IntegrityError):
                raise translated(exc.orig, self.path) from exc
            raise
        except sqlite3.Error as exc:  # of the driver's own cursor
            raise translated(exc, self.path) from exc

    def _is_there(self) -> bool:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return self.path.exists() and self.revision() is not None
        except OSError as exc:
            raise StoreUnavailable(f"ledger {self.path}: its folder cannot be used ({exc})") from exc

    def migrate(self, first: Callable[[sa.Connection], None] | None = None) -> str:
        """Bring the schema to `SCHEMA` in one transaction, creating the file if need be. Returns the revision."""
        from alembic import command  # noqa: PLC0415  half a second that only a migration pays
        from alembic.config import Config  # noqa: PLC0415

        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        connect(self.path, timeout_s=self.timeout_s, create=True).close()
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
            raise SchemaMismatch(f"ledger {self.path}: has no Tallystick schema; `tallystick init` creates it")
        if found < SCHEMA:
            raise SchemaMismatch(f"ledger {self.path}: schema {found} is older than {SCHEMA}; run `tallystick migrate`")
        if found > SCHEMA:
            raise SchemaMismatch(
                f"ledger {self.path}: schema {found} is newer than {SCHEMA}, the newest this tallystick knows; "
                "upgrade tallystick"
            )

    def _close_before_fork(self) -> None:
        if self._gate.shut(self.timeout_s):
            self._close_connections()
        else:
            logger.warning("ledger %s is in use by another thread while this process forks", self.path)

    def _start_anew_in_child(self) -> None:
        self._gate = Gate()
        self.__dict__.pop("writer", None)
        self.__dict__.pop("_engine", None)


def _revision(connection: sa.Connection) -> str | None:
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()


def _begin(connection: sa.Connection) -> None:
    # A transaction that starts as a read and then writes fails at once under contention: the busy timeout is skipped.
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


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


def _without_password(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"
