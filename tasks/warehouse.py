"""The warehouse file: who may open it when, and with which tables."""

from __future__ import annotations

import fcntl
import shlex
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import duckdb

from tasks.errors import WarehouseError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

__all__ = ["check_recost", "lease", "newest_recost", "open_for_reading", "open_for_writing", "quoted", "sql"]


@cache
def sql(name: str) -> str:
    """The text of `{name}.sql` beside this file."""
    return files("tasks").joinpath(f"{name}.sql").read_text(encoding="utf-8")


def quoted(value: Path | str) -> str:
    """A path or a text as an SQL string."""
    return "'" + str(value).replace("'", "''") + "'"


@contextmanager
def lease(path: Path, *, exclusive: bool) -> Iterator[int]:
    """Wait for the right to use what is at `path`: one writer, or any number of readers.

    Yields the descriptor that holds it; a process that inherits that holds it too. It ends with the last of them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lease").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield file.fileno()


@contextmanager
def open_for_writing(path: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """The warehouse attached as `warehouse`, created if it is new. Whoever opens it so holds the exclusive lease."""
    with _session(path) as connection:
        _attach(connection, path, "")
        connection.execute("USE warehouse")
        connection.execute(sql("warehouse"))
        yield connection


@contextmanager
def open_for_reading(path: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """The warehouse attached read-only as `warehouse`. Takes the shared lease."""
    with lease(path, exclusive=False), _session(path) as connection:
        if not path.exists():
            raise WarehouseError(f"warehouse {path}: is not there; `python -m flows aggregate-usage` builds it")
        _attach(connection, path, " (READ_ONLY)")
        connection.execute("USE warehouse")
        yield connection


def newest_recost(found: Sequence[tuple[Any, ...]]) -> int:
    """The number that `newest_recost.sql` found, 0 for none. Raises `WarehouseError` where it has not ended."""
    for recost, period, reason, has_ended in found:
        if not int(has_ended):  # a text, where DuckDB read it out of a file
            raise WarehouseError(
                f"recost {recost} of {period} has not ended: some costs are by old prices and some by new ones. "
                f"Run `python -m flows recost --period {period} --reason {shlex.quote(reason)}` again"
            )
        return int(recost)
    return 0


def check_recost(connection: duckdb.DuckDBPyConnection, newest: int) -> None:
    """Raise `WarehouseError` where costs have changed since they were loaded. `newest` is the ledger's last recost."""
    row = connection.execute("SELECT recost FROM loaded_recost").fetchone()
    loaded = 0 if row is None else row[0]
    if loaded != newest:
        raise WarehouseError(
            f"the ledger's newest recost is {newest}, but the warehouse was loaded after recost {loaded}: it has costs "
            "that are no longer those of the ledger. Run `python -m flows rebuild`"
        )


@contextmanager
def _session(path: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as connection:
        # Nothing may be fetched: the one extension needed comes in a wheel.
        connection.execute("SET autoinstall_known_extensions = false")
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute("SET enable_progress_bar = false")
        connection.execute(f"SET temp_directory = {quoted(path.with_name(path.name + '.tmp'))}")
        yield connection


def _attach(connection: duckdb.DuckDBPyConnection, path: Path, options: str) -> None:
    try:
        connection.execute(f"ATTACH {quoted(path)} AS warehouse{options}")
    except duckdb.Error as exc:
        advice = "it is derived, `python -m flows rebuild` makes it anew"
        if "Could not set lock" in str(exc):
            advice = "another program has it open, and must close it first"
        raise WarehouseError(f"warehouse {path}: cannot be opened ({exc}); {advice}") from exc
