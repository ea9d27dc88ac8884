"""Copies new ledger rows into the warehouse: `python -m tasks.load_worker WAREHOUSE`, a process of its own.

DuckDB's sqlite_scanner carries its own SQLite, and two copies in one process drop each other's POSIX locks on the
ledger (sqlite.org/howtocorrupt.html, 2.2.1). So this interpreter opens the ledger through DuckDB and in no other way,
and nothing else in the project attaches a ledger. Postgres knows no such trap, but one way to load is enough.

`tasks.load` starts it, under the lease. Its standard input says where the ledger is, as JSON: `type` (sqlite or
postgres), `at` (a file, or libpq's keywords and values), `password`, if there is one, and `archives`, the folder of
events that have left it. Prints one line of JSON.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import duckdb

from tasks.errors import WarehouseError
from tasks.warehouse import check_recost, newest_recost, open_for_writing, quoted, sql

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    Ask = Callable[..., list[tuple[Any, ...]]]

ROWS_PER_TRANSACTION = 100_000
"""Keeps a load of any length at about 300 MB."""

MARKED = {"sqlite": "seq", "postgres": "commit_xid"}
"""The column that a watermark is on: nothing is committed any more at or below the end of a load."""

_END = {
    "sqlite": "SELECT coalesce(max(seq), 0) FROM {table}",
    "postgres": "SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint - 1",
}

_RENUMBER = "UPDATE events SET commit_xid = CASE WHEN seq IN (SELECT seq FROM event_costs) THEN 1 ELSE 2 END"


@contextmanager
def _attached_ledger(connection: duckdb.DuckDBPyConnection, ledger: Mapping[str, str]) -> Iterator[Ask]:
    """What runs a query inside the ledger's own database, on its indexes: the time it takes follows the answer."""
    kind = ledger["type"]
    package = importlib.util.find_spec(f"duckdb_extension_{kind}_scanner")
    assert package is not None
    assert package.submodule_search_locations
    extension = next(Path(package.submodule_search_locations[0]).rglob(f"{kind}_scanner.duckdb_extension"))
    connection.execute(f"LOAD {quoted(extension)}")
    if "password" in ledger:
        os.environ["PGPASSWORD"] = ledger["password"]  # what is attached shows in DuckDB's messages
    connection.execute(f"ATTACH {quoted(ledger['at'])} AS ledger (TYPE {kind}, READ_ONLY)")

    def ask(query: str, into: str = "", **values: int | str) -> list[tuple[Any, ...]]:
        inner = query.format(marked=MARKED[kind], **values).strip()
        try:
            return connection.execute(f"{into} FROM {kind}_query('ledger', {quoted(inner)})").fetchall()
        except duckdb.Error as exc:
            reason = str(exc).replace(inner, "...").partition("\nLINE ")[0].strip()
            raise WarehouseError(f"the ledger cannot be read: {reason}") from exc

    try:
        yield ask
    finally:
        connection.execute("DETACH ledger")


def load(ledger: Mapping[str, str], warehouse: Path) -> dict[str, int]:
    """Add what is not in the warehouse yet: costed events, their sums, spans and probes; a transaction a batch."""
    loaded = 0
    with open_for_writing(warehouse) as connection, _attached_ledger(connection, ledger) as ask:
        watermark = _watermark(connection, ask)
        # Before the rows are read, so that whatever has left the ledger by then is in one of them.
        archived = ask(
            "SELECT account, period, part, file, digest, events, seq_to FROM archives ORDER BY account, period, part"
        )
        newest = newest_recost(ask(sql("newest_recost")))
        if not watermark:
            connection.execute(f"DELETE FROM loaded_recost; INSERT INTO loaded_recost VALUES ({newest})")  # noqa: S608
        check_recost(connection, newest)
        # Read before the rows are: what has not ended by now may still write below what has.
        end, is_ahead = map(int, ask(sql(f"load_end_{ledger['type']}"), watermark=watermark)[0])
        _check_history(connection, ask, watermark, end, is_ahead=bool(is_ahead))
        while (up_to := _end_of_batch(ask, "events", watermark, end)) is not None:
            connection.execute("CREATE OR REPLACE TEMP TABLE batch AS FROM usage_events LIMIT 0")
            ((count,),) = ask(sql("load_events"), "INSERT INTO batch", above=watermark, up_to=up_to)
            connection.execute("BEGIN")
            connection.execute("INSERT INTO usage_events FROM batch")
            connection.execute(sql("rollup"))
            connection.execute(f"UPDATE load_watermark SET seq = {up_to}")  # noqa: S608  a number
            connection.execute("COMMIT")
            loaded += count
            watermark = up_to
        loaded += _load_archives(connection, Path(ledger["archives"]), archived)
        return {
            "loaded": loaded,
            "watermark": watermark,
            "spans": _copy(connection, ask, ledger["type"], _SPANS),
            "provider_windows": _copy(connection, ask, ledger["type"], _PROBES),
        }


_IN_PARTS = "SELECT count(*), max(seq) FROM usage_events WHERE account = ? AND period = ? AND seq <= ?"


def _load_archives(connection: duckdb.DuckDBPyConnection, folder: Path, archived: list[tuple[Any, ...]]) -> int:
    """Add archived events that are not here, each file's once; how many. There are none but in a new warehouse."""
    known = set(connection.execute("SELECT account, period, part FROM loaded_archives").fetchall())
    totals: Counter[tuple[str, str]] = Counter()
    added = 0
    for account, period, part, file, digest, events, seq_to in archived:
        name = (account, period, int(part))
        totals[name[:2]] += int(events)
        if name in known:
            continue
        connection.execute("CREATE OR REPLACE TEMP TABLE batch AS FROM usage_events LIMIT 0")
        here = connection.execute(_IN_PARTS, [account, period, int(seq_to)]).fetchone()
        if here != (totals[name[:2]], int(seq_to)):  # else they were loaded before they were archived
            _check_archive(folder / file, digest)
            connection.execute(sql("load_archive"), {"file": str(folder / file)})
        ((count,),) = connection.execute("SELECT count(*) FROM batch").fetchall()
        connection.execute("BEGIN")
        if count:
            connection.execute("INSERT INTO usage_events FROM batch")
            connection.execute(sql("rollup"))
        connection.execute("INSERT INTO loaded_archives VALUES (?, ?, ?)", name)
        connection.execute("COMMIT")
        added += count
    return added


def _check_archive(path: Path, digest: str) -> None:
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as exc:
        raise WarehouseError(f"archive {path}: cannot be read ({exc.strerror}), and its events are not here") from exc
    if found != digest:
        raise WarehouseError(f"archive {path}: has SHA-256 {found}, but was archived with {digest}: it was changed")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Copied:
    """Rows that are appended to the ledger, and to the warehouse as they are."""

    ledger: str
    """The table whose numbers the watermark is on."""
    warehouse: str
    watermark: str


_SPANS = _Copied(ledger="spans", warehouse="spans", watermark="span_watermark")
_PROBES = _Copied(ledger="provider_probes", warehouse="provider_windows", watermark="probe_watermark")


def _copy(connection: duckdb.DuckDBPyConnection, ask: Ask, kind: str, copied: _Copied) -> int:
    """How many rows were added."""
    added = 0
    row = connection.execute(f"SELECT seq FROM {copied.watermark}").fetchone()  # noqa: S608  ours, as all below
    if row is None:
        connection.execute(f"INSERT INTO {copied.watermark} VALUES (0)")  # noqa: S608
    watermark = 0 if row is None else int(row[0])
    ((end,),) = ask(_END[kind], table=copied.ledger)
    while (up_to := _end_of_batch(ask, copied.ledger, watermark, int(end))) is not None:
        connection.execute(f"CREATE OR REPLACE TEMP TABLE batch AS FROM {copied.warehouse} LIMIT 0")
        ((count,),) = ask(sql(f"load_{copied.warehouse}"), "INSERT INTO batch", above=watermark, up_to=up_to)
        connection.execute("BEGIN")
        connection.execute(f"INSERT INTO {copied.warehouse} FROM batch")
        connection.execute(f"UPDATE {copied.watermark} SET seq = {up_to}")  # noqa: S608
        connection.execute("COMMIT")
        added += count
        watermark = up_to
    return added


def _watermark(connection: duckdb.DuckDBPyConnection, ask: Ask) -> int:
    """The newest event in the warehouse, which belongs to one ledger and no other."""
    ((found,),) = ask("SELECT ledger_id FROM ledger_info")
    ledger_id = _uuid(found).hex
    row = connection.execute("SELECT ledger_id, seq FROM load_watermark").fetchone()
    if row is None:
        connection.execute(f"INSERT INTO load_watermark VALUES ('{ledger_id}', 0)")  # noqa: S608  hex digits
        return 0
    if row[0] != ledger_id:
        raise WarehouseError(
            f"the warehouse was loaded from ledger {row[0]}, not from {ledger_id}: "
            "point METERING_WAREHOUSE elsewhere, or run `python -m flows rebuild`"
        )
    return int(row[1])


def _check_history(
    connection: duckdb.DuckDBPyConnection, ask: Ask, watermark: int, end: int, *, is_ahead: bool
) -> None:
    """What was loaded last must still be what the ledger has: one restored from a backup may have grown again since."""
    if is_ahead:
        raise WarehouseError(
            "the ledger has events of transactions that its server has yet to begin: it was restored from a dump of "
            f"another server. Say there `{_RENUMBER}`, then run `python -m flows rebuild`"
        )
    if end < watermark:
        raise WarehouseError(
            f"the ledger ends at {end}, but the warehouse has {watermark}: the ledger went backwards. "
            "Restore the ledger, or run `python -m flows rebuild`"
        )
    last = connection.execute(
        "SELECT seq, event_id FROM usage_events WHERE seq = (SELECT max(seq) FROM usage_events)"
    ).fetchone()
    if last is None:
        return
    seq, loaded = last
    ((is_known,),) = ask("SELECT count(*) FROM event_ids WHERE event_id = '{event_id}'", event_id=loaded.hex)
    recorded = [_uuid(event_id) for (event_id,) in ask("SELECT event_id FROM events WHERE seq = {seq}", seq=seq)]
    # An event may have gone to the archive since, but never its id.
    if not int(is_known) or recorded not in ([], [loaded]):
        raise WarehouseError(
            f"event {seq} of the warehouse is {loaded}, but the ledger has {recorded[0] if recorded else 'none such'}: "
            "the ledger went backwards and on from there. Restore the ledger, or run `python -m flows rebuild`"
        )


def _end_of_batch(ask: Ask, table: str, watermark: int, end: int) -> int | None:
    """Where the next batch ends: with the last event of a transaction, so what has one number is in one batch."""
    ((up_to,),) = ask(
        "SELECT max({marked}) FROM (SELECT {marked} FROM {table} WHERE {marked} > {watermark} AND {marked} <= {end} "
        "ORDER BY {marked} LIMIT {limit}) AS batch",
        table=table,
        watermark=watermark,
        end=end,
        limit=ROWS_PER_TRANSACTION,
    )
    return None if up_to is None else int(up_to)


def _uuid(found: str | UUID) -> UUID:
    return found if isinstance(found, UUID) else UUID(found)


def main(arguments: list[str]) -> int:
    """Load, and say what was done, or what was wrong, as one line of JSON."""
    (warehouse,) = arguments
    try:
        print(json.dumps(load(json.load(sys.stdin), Path(warehouse))))
    except (WarehouseError, duckdb.Error) as exc:
        print(json.dumps({"error": str(exc)}))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
