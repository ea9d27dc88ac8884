"""The load: each event once, its sums and the watermark with it, from one ledger and no other."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest

from metering.checks import MAX_QUANTITY
from metering.errors import NoProviderKey, StoreUnavailable
from metering.events import TOKEN_FIELDS, TokenUsage
from metering.ledger import Ledger
from metering.ledger.observations import record_statuses
from metering.providers import LimitWindow
from metering.providers.probes import ProviderStatus
from tasks.errors import WarehouseError
from tasks.load import ROOT, for_duckdb, load_into
from tasks.verify import rollup_differences
from tasks.warehouse import lease
from tests.tasks.place import NO_OTHERS, NOVEMBER, PERIOD, Place, event, month_of_usage

if TYPE_CHECKING:
    from pathlib import Path

SUMS = "sum(requests), sum(input_tokens), sum(output_tokens), sum(quantity), sum(cost), sum(unpriced_requests)"
ROLLUP = f"""SELECT quarter, account, plan_version, line, provider, model, service_tier, caller_type, period, billable,
    {SUMS} FROM usage_15m GROUP BY ALL ORDER BY ALL"""
FROM_EVENTS = """SELECT time_bucket(INTERVAL '15 minutes', occurred_at), account, plan_version, line, provider, model,
    service_tier, caller_type, period, billable, sum(requests), sum(input_tokens), sum(output_tokens), sum(quantity),
    coalesce(sum(cost), 0), coalesce(sum(requests) FILTER (WHERE cost IS NULL), 0) FROM usage_events
    GROUP BY ALL ORDER BY ALL"""


ON_SQLITE = pytest.mark.parametrize("either_url", ["sqlite"], indirect=True)


@pytest.fixture
def ledger_url(either_url: str) -> str:
    return either_url


def run_worker(place: Place, script: str) -> subprocess.CompletedProcess[str]:
    """A load of which `script` has changed something in its module, `w`."""
    command = f"import sys, tasks.load_worker as w\n{script}\nsys.exit(w.main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", command, str(place.warehouse)],
        cwd=ROOT,
        input=json.dumps(for_duckdb(place.ledger_url)),
        capture_output=True,
        text=True,
        check=False,
    )


def span(number: int) -> dict[str, Any]:
    said = {"gen_ai.usage.input_tokens": number, "gen_ai.usage.output_tokens": 1, "gen_ai.request.model": "gpt-4.1"}
    return {"trace_id": "t", "span_id": f"s{number}", "parent_span_id": f"s{number // 2}", "attributes": said}


def events_loaded(place: Place) -> list[int]:
    return [seq for (seq,) in place.warehouse_rows("SELECT seq FROM usage_events ORDER BY seq")]


def watermark(place: Place) -> int:
    return int(place.warehouse_rows("SELECT seq FROM load_watermark")[0][0])


def test_the_watermark_moves_with_the_rows(place: Place) -> None:
    place.account("acme")
    place.add(event(), event())
    assert place.aggregate() == {"loaded": 2, "watermark": (before := place.newest()), **NO_OTHERS}
    place.add(event())
    assert place.load() == {"loaded": 0, "watermark": before, **NO_OTHERS}  # not costed yet
    assert place.aggregate() == {"loaded": 1, "watermark": (after := place.newest()), **NO_OTHERS}
    assert after > before
    assert place.aggregate() == {"loaded": 0, "watermark": after, **NO_OTHERS}
    assert events_loaded(place) == [1, 2, 3]
    assert place.warehouse_rows(f"SELECT {SUMS} FROM usage_15m") == [(3, 3_000, 300, Decimal(0), Decimal("0.0084"), 0)]


def test_every_column_arrives_as_it_was_recorded(place: Place) -> None:
    month_of_usage(place, events=60)
    place.aggregate()
    columns = [name for (name,) in place.warehouse_rows("SELECT column_name FROM (DESCRIBE usage_events)")]
    loaded = place.warehouse_rows(f"SELECT {', '.join(map(as_recorded, columns))} FROM usage_events ORDER BY seq")
    recorded = place.ledger_rows(
        f"SELECT e.{', e.'.join(columns[:-2])}, c.cost, c.price_version FROM events e "
        "JOIN event_costs c ON c.seq = e.seq ORDER BY e.seq"
    )
    assert columns[-2:] == ["cost", "price_version"]
    numbers = [columns.index("quantity"), columns.index("cost")]
    for row in recorded:
        expected = [
            value if value is None or position not in numbers else Decimal(value) for position, value in enumerate(row)
        ]
        assert list(loaded.pop(0)) == expected
    assert not loaded


def as_recorded(column: str) -> str:
    """SQL for a warehouse column in the form the ledger keeps it."""
    if column in ("event_id", "corrects"):
        return f"replace({column}::VARCHAR, '-', '')"
    if column.endswith("_at"):
        return f"strftime({column}, '%Y-%m-%dT%H:%M:%S.%fZ')"
    return column


def test_every_span_is_loaded_once_in_batches_of_any_size(place: Place) -> None:
    place.account("acme")
    with place.meter() as meter:
        for number in range(1, 31):
            meter.record_span(span(number))
    assert place.load()["spans"] == 30
    with place.meter() as meter:
        meter.record_span({**span(31), "start_time": "2023-11-16T18:00:00Z"})
    assert [place.load()["spans"] for _ in range(2)] == [1, 0]
    columns = [name for (name,) in place.warehouse_rows("SELECT column_name FROM (DESCRIBE spans)")]
    query = f"SELECT {', '.join(columns[:-2])} FROM spans ORDER BY seq"
    recorded = place.ledger_rows(query)
    assert place.warehouse_rows(query) == recorded
    times = f"SELECT {as_recorded('started_at')}, {as_recorded('ended_at')} FROM spans ORDER BY seq DESC LIMIT 2"
    assert place.warehouse_rows(times) == [("2023-11-16T18:00:00.000000Z",) * 2, ("2023-11-16T18:17:00.000000Z",) * 2]
    place.warehouse.unlink()
    assert run_worker(place, "w.ROWS_PER_TRANSACTION = 7").returncode == 0
    assert place.warehouse_rows(query) == recorded


def probed(number: int, **said: Any) -> ProviderStatus:
    windows = {
        name: LimitWindow(limit=100, remaining=number, percent_used=100.0 - number, reset_in_ms=1_500)
        for name in ("requests", "tokens")
    }
    at = NOVEMBER + timedelta(minutes=5 * number)
    return ProviderStatus(**{"provider": "openai", "account_key": "prod", "checked_at": at, "windows": windows, **said})


def test_every_probe_is_loaded_once_with_its_windows(place: Place) -> None:
    credits_left = {"credits_usd": LimitWindow(remaining=Decimal("-0.000000000001"))}
    failed = NoProviderKey("openai", "no key is configured")
    with closing(Ledger(place.ledger_url)) as ledger:
        for each in ([probed(1), probed(2)], [probed(3, error=failed, windows={}), probed(4, windows=credits_left)]):
            with ledger.write() as connection:
                assert record_statuses(connection, each) == (2, 0)
                assert record_statuses(connection, each) == (0, 0)
    assert [place.load()["provider_windows"] for _ in range(2)] == [6, 0]
    query = (
        "SELECT credential, provider, extract(minute FROM checked_at)::INT, error, name, remaining, percent_used, "
        "date_diff('ms', checked_at, reset_at) FROM provider_windows ORDER BY seq, name"
    )
    expected = [
        ("prod", "openai", 22, None, "requests", Decimal(1), Decimal(99), 1_500),
        ("prod", "openai", 22, None, "tokens", Decimal(1), Decimal(99), 1_500),
        ("prod", "openai", 27, None, "requests", Decimal(2), Decimal(98), 1_500),
        ("prod", "openai", 27, None, "tokens", Decimal(2), Decimal(98), 1_500),
        ("prod", "openai", 32, "NoProviderKey", None, None, None, None),
        ("prod", "openai", 37, None, "credits_usd", Decimal("-0.000000000001"), None, None),
    ]
    assert place.warehouse_rows(query) == expected
    place.warehouse.unlink()
    assert run_worker(place, "w.ROWS_PER_TRANSACTION = 1").returncode == 0
    assert place.warehouse_rows(query) == expected


def test_batches_of_any_size_give_the_same_sums(place: Place) -> None:
    month_of_usage(place, events=100)
    place.cost()
    for size in (1_000_000, 7):
        place.warehouse.unlink(missing_ok=True)
        assert run_worker(place, f"w.ROWS_PER_TRANSACTION = {size}").returncode == 0
        assert watermark(place) == place.newest()
        assert events_loaded(place) == list(range(1, 101))
        assert place.warehouse_rows(ROLLUP) == place.warehouse_rows(FROM_EVENTS)
    (rows,) = place.warehouse_rows("SELECT count(*) FROM usage_15m")[0]
    (groups,) = place.warehouse_rows(f"SELECT count(*) FROM ({ROLLUP})")[0]
    assert rows >= groups > 15


def test_a_kill_between_insert_and_commit_leaves_nothing_of_the_batch(place: Place) -> None:
    month_of_usage(place, events=30)
    place.cost()
    # The second batch dies with its rows and its watermark written, but not committed.
    script = """
import os
w.ROWS_PER_TRANSACTION = 10
session = w.open_for_writing
class Dying:
    def __init__(self, connection): self.connection, self.batches = connection, 0
    def execute(self, query, *values):
        if query == "COMMIT":
            self.batches += 1
            if self.batches == 2: os._exit(9)
        return self.connection.execute(query, *values)
from contextlib import contextmanager
@contextmanager
def dying(path):
    with session(path) as connection:
        yield Dying(connection)
w.open_for_writing = dying
"""
    assert run_worker(place, script).returncode == 9
    assert events_loaded(place) == list(range(1, 11))
    assert place.load() == {"loaded": 20, "watermark": place.newest(), **NO_OTHERS}
    assert place.warehouse_rows(ROLLUP) == place.warehouse_rows(FROM_EVENTS)


def test_a_kill_right_after_commit_keeps_the_batch(place: Place) -> None:
    month_of_usage(place, events=20)
    place.cost()
    script = """
import os
from contextlib import contextmanager
inner = w._attached_ledger
@contextmanager
def dying(connection, ledger):
    with inner(connection, ledger) as ask:
        yield ask
        os._exit(9)
w._attached_ledger = dying
"""
    assert run_worker(place, script).returncode == 9
    assert place.warehouse.with_name("warehouse.duckdb.wal").exists()
    assert place.invoice() is not None  # a reader finds what the log holds
    assert sum(invoice.requests for invoice in place.invoices().values()) == 20
    assert place.load() == {"loaded": 0, "watermark": place.newest(), **NO_OTHERS}
    assert events_loaded(place) == list(range(1, 21))


def test_two_loads_at_once_load_each_event_once(place: Place) -> None:
    month_of_usage(place, events=50)
    place.cost()
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda _: place.load(), range(2)))
    assert sorted(answer["loaded"] for answer in answers) == [0, 50]
    assert events_loaded(place) == list(range(1, 51))


@ON_SQLITE
def test_a_worker_keeps_the_lease_of_a_parent_that_is_gone(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    # An interpreter that answers at once, and leaves behind a process that ends when the pipe does.
    pipe, interpreter = place.home / "pipe", place.home / "python"
    os.mkfifo(pipe)
    interpreter.write_text(
        f"""#!/bin/sh\ncat '{pipe}' >/dev/null 2>&1 &\necho '{{"loaded": 0, "watermark": 0, "spans": 0}}'\n"""
    )
    interpreter.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    assert place.load() == {"loaded": 0, "watermark": 0, "spans": 0}
    with place.warehouse.with_name("warehouse.duckdb.lease").open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    pipe.write_bytes(b"")
    with lease(place.warehouse, exclusive=True):
        pass


def test_another_ledger_is_refused(place: Place, tmp_path: Path, empty_ledger: Path) -> None:
    place.account("acme")
    place.add(event())
    place.aggregate()
    before = place.warehouse.read_bytes()
    place.change("UPDATE ledger_info SET ledger_id = '0123456789abcdef0123456789abcdef'")
    with pytest.raises(WarehouseError, match=r"not from 0123456789abcdef.*METERING_WAREHOUSE elsewhere, or .* rebuild"):
        place.load()
    assert place.warehouse.read_bytes() == before


@ON_SQLITE
def test_a_ledger_that_went_backwards_is_refused(place: Place) -> None:
    place.account("acme")
    place.add(event(), event(), event())
    place.aggregate()
    place.change("DELETE FROM event_costs WHERE seq = 3")
    with pytest.raises(WarehouseError, match="ends at 2, but the warehouse has 3: the ledger went backwards"):
        place.load()


def test_a_ledger_that_went_backwards_and_grew_again_is_refused(place: Place) -> None:
    place.account("acme")
    place.add(event(), event(), event())
    place.aggregate()
    # A backup of after the first event, which has since recorded others.
    place.change("DELETE FROM events WHERE seq > 1")
    place.change("DELETE FROM event_costs WHERE seq > 1")
    if place.is_on_postgres:
        place.change("SELECT setval('events_seq_seq', 1)")
    else:
        place.change("UPDATE sqlite_sequence SET seq = 1 WHERE name = 'events'")
    place.add(*(event() for _ in range(4)))
    place.cost()
    with pytest.raises(WarehouseError, match=r"event 3 of the warehouse is .* went backwards and on from there"):
        place.load()


def test_a_number_is_not_used_again_below_the_watermark(place: Place) -> None:
    place.account("acme")
    place.add(event(), event())
    place.aggregate()
    place.change("DELETE FROM events WHERE seq = 2")
    place.add(event())
    assert place.ledger_rows("SELECT max(seq) FROM events") == [(3,)]
    assert place.aggregate() == {"loaded": 1, "watermark": place.newest(), **NO_OTHERS}


def test_corrections_flow_through(place: Place) -> None:
    place.account("acme")
    original = event(model="mystery", usage=TokenUsage(input_tokens=500))
    place.add(original)
    place.aggregate()
    assert place.warehouse_rows(f"SELECT {SUMS} FROM usage_15m") == [(1, 500, 0, Decimal(0), Decimal(0), 1)]
    with place.meter() as meter:
        meter.correct(original.event_id, usage=TokenUsage(input_tokens=1_000), model="gpt-4.1", reason="renamed")
    place.aggregate()
    assert place.warehouse_rows(f"SELECT {SUMS} FROM usage_15m") == [(1, 1_000, 0, Decimal(0), Decimal("0.002"), 0)]
    assert place.warehouse_rows("SELECT model, unpriced_requests FROM usage_15m ORDER BY ALL") == [
        ("gpt-4.1", 0),
        ("mystery", -1),
        ("mystery", 1),
    ]


def test_the_largest_counts_allowed_add_up(place: Place) -> None:
    place.account("acme")
    most: dict[str, Any] = dict.fromkeys(TOKEN_FIELDS, 2**53)
    most |= {"cache_read_tokens": 0}
    largest = Decimal(f"{MAX_QUANTITY - 1}.999999999999")
    place.add(*(event(usage=TokenUsage(**most), quantity=largest, model="mystery") for _ in range(4_000)))
    place.cycle()
    assert place.warehouse_rows("SELECT sum(input_tokens)::VARCHAR, sum(quantity) FROM usage_15m") == [
        (str(4_000 * 2**53), Decimal("3999999999999999999999.999999996000"))
    ]
    assert rollup_differences(place.ledger_url, place.warehouse, PERIOD) == []
    (invoice,) = place.invoices().values()
    assert invoice.usage[0].quantity == Decimal("3999999999999999999999.999999996")


def test_a_worker_that_fails_says_what_it_said(place: Place) -> None:
    place.warehouse.write_bytes(b"no database at all" * 100)
    with pytest.raises(WarehouseError, match=r"cannot be opened .* rebuild"):
        place.load()
    with lease(place.warehouse, exclusive=True) as held, pytest.raises(StoreUnavailable, match="no-such-ledger"):
        load_into(f"sqlite:///{place.home}/no-such-ledger.db", place.home / "other.duckdb", held)
