"""Copies new ledger rows into the warehouse: `python -m tasks.load_worker LEDGER WAREHOUSE`, a process of its own.

DuckDB's scanner carries its own copy of SQLite, and two copies in one process drop each other's POSIX locks on the
ledger (sqlite.org/howtocorrupt.html, 2.2.1). So this interpreter opens the ledger through DuckDB and in no other way,
and nothing else in the project attaches a ledger. Prints one line of JSON. `tasks.load` starts it, under the lease.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb

from tasks.errors import WarehouseError
from tasks.warehouse import open_for_writing, quoted, sql

if TYPE_CHECKING:
    from collections.abc import Iterator

EVENTS_PER_TRANSACTION = 100_000
"""Keeps a load of any length at about 300 MB."""


@contextmanager
def _attached_ledger(connection: duckdb.DuckDBPyConnection, ledger: Path) -> Iterator[None]:
    package = importlib.util.find_spec("duckdb_extension_sqlite_scanner")
    assert package is not None
    assert package.submodule_search_locations
    extension = next(Path(package.submodule_search_locations[0]).rglob("sqlite_scanner.duckdb_extension"))
    connection.execute(f"LOAD {quoted(extension)}")
    connection.execute(f"ATTACH {quoted(ledger)} AS ledger (TYPE sqlite, READ_ONLY)")
    try:
        yield
    finally:
        connection.execute("DETACH ledger")


def load(ledger: Path, warehouse: Path) -> dict[str, int]:
    """Add every costed event that is not in the warehouse yet, and its sums; each batch in one transaction."""
    loaded = 0
    with open_for_writing(warehouse) as connection, _attached_ledger(connection, ledger):
        watermark = _watermark(connection)
        newest = int(_value(connection, "FROM sqlite_query('ledger', 'SELECT coalesce(max(seq), 0) FROM event_costs')"))
        _check_history(connection, watermark, newest)
        while watermark < newest:
            up_to = min(watermark + EVENTS_PER_TRANSACTION, newest)
            _set(connection, "above", watermark)
            _set(connection, "up_to", up_to)
            connection.execute("BEGIN")
            loaded += _value(connection, sql("load_events"))
            connection.execute(sql("rollup"))
            connection.execute("UPDATE load_watermark SET seq = getvariable('up_to')")
            connection.execute("COMMIT")
            watermark = up_to
    return {"loaded": loaded, "watermark": watermark}


def _watermark(connection: duckdb.DuckDBPyConnection) -> int:
    """The newest event in the warehouse, which belongs to one ledger and no other."""
    ledger_id = _value(connection, "SELECT ledger_id FROM ledger.ledger_info")
    row = connection.execute("SELECT ledger_id, seq FROM load_watermark").fetchone()
    if row is None:
        connection.execute("INSERT INTO load_watermark SELECT ledger_id, 0 FROM ledger.ledger_info")
        return 0
    if row[0] != ledger_id:
        raise WarehouseError(
            f"the warehouse was loaded from ledger {row[0]}, not from {ledger_id}: "
            "point METERING_WAREHOUSE elsewhere, or run `python -m flows rebuild`"
        )
    return int(row[1])


def _check_history(connection: duckdb.DuckDBPyConnection, watermark: int, newest: int) -> None:
    """What was loaded last must still be what the ledger has: one restored from a backup may have grown again since."""
    if newest < watermark:
        raise WarehouseError(
            f"the ledger ends at event {newest}, but the warehouse has {watermark}: the ledger went backwards. "
            "Restore the ledger, or run `python -m flows rebuild`"
        )
    _set(connection, "last", watermark)
    loaded = connection.execute("SELECT event_id FROM usage_events WHERE seq = getvariable('last')").fetchone()
    recorded = connection.execute(
        "SELECT event_id::UUID "
        "FROM sqlite_query('ledger', 'SELECT event_id FROM events WHERE seq = ?', params = row(getvariable('last')))"
    ).fetchone()
    if loaded and recorded and loaded != recorded:
        raise WarehouseError(
            f"event {watermark} is {recorded[0]} in the ledger, but {loaded[0]} in the warehouse: the ledger went "
            "backwards and on from there. Restore the ledger, or run `python -m flows rebuild`"
        )


def _set(connection: duckdb.DuckDBPyConnection, variable: str, seq: int) -> None:
    # Not a query's parameter: for that DuckDB imports pandas, a third of a second.
    connection.execute(f"SET VARIABLE {variable} = {seq}::BIGINT")


def _value(connection: duckdb.DuckDBPyConnection, query: str) -> Any:
    """The one value a query answers."""
    return connection.execute(query).fetchall()[0][0]


def main(arguments: list[str]) -> int:
    """Load, and say what was done, or what was wrong, as one line of JSON."""
    ledger, warehouse = map(Path, arguments)
    try:
        print(json.dumps(load(ledger, warehouse)))
    except (WarehouseError, duckdb.Error) as exc:
        print(json.dumps({"error": str(exc)}))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
