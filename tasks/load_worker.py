"""Copies new ledger rows into the warehouse: `python -m tasks.load_worker LEDGER WAREHOUSE`, a process of its own.

DuckDB's scanner carries its own copy of SQLite, and two copies in one process drop each other's POSIX locks on the
ledger (sqlite.org/howtocorrupt.html, 2.2.1). So this interpreter opens the ledger through DuckDB and in no other way,
and nothing else in the project attaches a ledger. Prints one line of JSON.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb

from tasks.warehouse import WarehouseError, open_for_writing, sql

if TYPE_CHECKING:
    from collections.abc import Iterator

EVENTS_PER_TRANSACTION = 1_000_000


@contextmanager
def _attached_ledger(connection: duckdb.DuckDBPyConnection, ledger: Path) -> Iterator[None]:
    package = importlib.util.find_spec("duckdb_extension_sqlite_scanner")
    assert package is not None
    assert package.submodule_search_locations
    extension = next(Path(package.submodule_search_locations[0]).rglob("sqlite_scanner.duckdb_extension"))
    connection.execute(f"LOAD '{extension}'")
    quoted = str(ledger).replace("'", "''")
    connection.execute(f"ATTACH '{quoted}' AS ledger (TYPE sqlite, READ_ONLY)")
    try:
        yield
    finally:
        connection.execute("DETACH ledger")


def load(ledger: Path, warehouse: Path) -> dict[str, int]:
    """Add every costed event that is not in the warehouse yet, and its sums; each batch in one transaction."""
    loaded = 0
    with open_for_writing(warehouse) as connection, _attached_ledger(connection, ledger):
        watermark = _watermark(connection)
        newest = int(_asked(connection, "SELECT coalesce(max(seq), 0) FROM event_costs"))
        if newest < watermark:
            raise WarehouseError(
                f"ledger {ledger} ends at event {newest}, but the warehouse has {watermark}: the ledger went backwards. "
                "Restore the ledger, or run `python -m flows rebuild`"
            )
        while watermark < newest:
            up_to = min(watermark + EVENTS_PER_TRANSACTION, newest)
            batch = {"above": watermark, "up_to": up_to}
            connection.execute("BEGIN")
            connection.execute(sql("load_events"), batch)
            connection.execute(sql("rollup"), batch)
            connection.execute("UPDATE load_watermark SET seq = $up_to", {"up_to": up_to})
            added = connection.execute("SELECT count(*) FROM usage_events WHERE seq > $above", {"above": watermark})
            loaded += added.fetchall()[0][0]
            connection.execute("COMMIT")
            watermark = up_to
    return {"loaded": loaded, "watermark": watermark}


def _watermark(connection: duckdb.DuckDBPyConnection) -> int:
    """The newest event in the warehouse, which belongs to one ledger and no other."""
    ledger_id = _asked(connection, "SELECT ledger_id FROM ledger_info")
    row = connection.execute("SELECT ledger_id, seq FROM load_watermark").fetchone()
    if row is None:
        connection.execute("INSERT INTO load_watermark VALUES ($ledger_id, 0)", {"ledger_id": ledger_id})
        return 0
    if row[0] != ledger_id:
        raise WarehouseError(
            f"the warehouse was loaded from ledger {row[0]}, not from {ledger_id}: "
            "point METERING_WAREHOUSE elsewhere, or run `python -m flows rebuild`"
        )
    return int(row[1])


def _asked(connection: duckdb.DuckDBPyConnection, query: str) -> str:
    """The one value a query on the ledger answers, as text."""
    return str(connection.execute("SELECT * FROM sqlite_query('ledger', $query)", {"query": query}).fetchall()[0][0])


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
