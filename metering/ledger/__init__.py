"""The durable record of every fact and document: one SQL database."""

from __future__ import annotations

import os
import sqlite3
import weakref
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from metering.errors import InvalidSetting, SchemaMismatch
from metering.ledger.sqlite import connect, translated
from metering.ledger.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["SCHEMA", "Ledger"]

SCHEMA = "0001"
"""The newest migration this code knows. Revisions are ordered numbers, so an unknown larger one is a newer ledger."""

_SQLITE = "sqlite:///"
_ledgers: weakref.WeakSet[Ledger] = weakref.WeakSet()


class Ledger:
    """The ledger at a URL (`sqlite:///FILE`).

    Opening checks its schema. `create` makes a ledger that is not there, `upgrade` migrates an older one.

    Cold queries go through `read()` and `write()` (SQLAlchemy Core); the admission path through `writer`.
    """

    def __init__(self, url: str, *, timeout_s: float = 5.0, create: bool = False, upgrade: bool = False) -> None:
        if not url.startswith(_SQLITE) or len(url) == len(_SQLITE):
            raise InvalidSetting("METERING_LEDGER_URL", _without_password(url), "sqlite:///FILE")
        self.path = Path(url.removeprefix(_SQLITE))
        self.timeout_s = timeout_s
        self.is_new = False
        """Whether opening it created it."""
        if create:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self.path.exists() or self.revision() is None:
                self.migrate()
                self.is_new = True
        if upgrade:
            self.migrate()
        self._check_schema()
        _ledgers.add(self)

    @cached_property
    def writer(self) -> Writer:
        """Where the admission path writes."""
        return Writer(self.path, timeout_s=self.timeout_s)

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
            with self._engine.connect().execution_options(writes=writes) as connection, connection.begin():
                yield connection
        except sa.exc.DBAPIError as exc:
            if isinstance(exc.orig, sqlite3.Error) and not isinstance(exc.orig, sqlite3.IntegrityError):
                raise translated(exc.orig, self.path) from exc
            raise

    def migrate(self) -> str:
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
            command.upgrade(config, "head")
        return SCHEMA

    def revision(self) -> str | None:
        """The migration the database is at; None for one that was never migrated."""
        with self.read() as connection:
            if not sa.inspect(connection).has_table("alembic_version"):
                return None
            return connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()

    def close(self) -> None:
        """Close every connection."""
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

    def _forget_connections(self) -> None:
        self.__dict__.pop("writer", None)
        self.__dict__.pop("_engine", None)


def _begin(connection: sa.Connection) -> None:
    # A transaction that starts as a read and then writes fails at once under contention: the busy timeout is skipped.
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _reconnect_after_fork() -> None:
    for ledger in _ledgers:
        ledger._forget_connections()


os.register_at_fork(after_in_child=_reconnect_after_fork)


def _without_password(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"
