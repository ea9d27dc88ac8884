"""The warehouse file: who may open it when, and with which tables."""

from __future__ import annotations

import fcntl
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

import duckdb

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["WarehouseError", "lease", "open_for_reading", "open_for_writing", "sql"]


class WarehouseError(Exception):
    """The warehouse cannot be used; the message says what to do."""


@cache
def sql(name: str) -> str:
    """The text of `{name}.sql` beside this file."""
    return files("tasks").joinpath(f"{name}.sql").read_text(encoding="utf-8")


@contextmanager
def lease(path: Path, *, exclusive: bool) -> Iterator[None]:
    """Wait for the right to open the warehouse: one writer, or any number of readers. Ends with the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lease").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield


@contextmanager
def open_for_writing(path: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """The warehouse attached as `warehouse`, created if it is new. Holds the exclusive lease."""
    with lease(path, exclusive=True), _session() as connection:
        _attach(connection, path, "")
        connection.execute("USE warehouse")
        connection.execute(sql("warehouse"))
        yield connection


@contextmanager
def open_for_reading(path: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """The warehouse attached read-only as `warehouse`. Holds a shared lease."""
    with lease(path, exclusive=False), _session() as connection:
        if not path.exists():
            raise WarehouseError(f"warehouse {path}: is not there; `python -m flows aggregate-usage` builds it")
        _attach(connection, path, " (READ_ONLY)")
        connection.execute("USE warehouse")
        yield connection


@contextmanager
def _session() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as connection:
        # Nothing may be fetched: the one extension needed comes in a wheel.
        connection.execute("SET autoinstall_known_extensions = false")
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute("SET enable_progress_bar = false")
        yield connection


def _attach(connection: duckdb.DuckDBPyConnection, path: Path, options: str) -> None:
    quoted = str(path).replace("'", "''")
    try:
        connection.execute(f"ATTACH '{quoted}' AS warehouse{options}")
    except duckdb.Error as exc:
        raise WarehouseError(
            f"warehouse {path}: cannot be opened ({exc}); it is derived, `python -m flows rebuild` makes it anew"
        ) from exc
