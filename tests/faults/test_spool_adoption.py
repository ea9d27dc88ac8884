"""An app is killed with a full spool, and two processes adopt it at once: every line arrives exactly once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from metering.admission.verify import check_counters
from metering.events import TokenUsage
from metering.meter import Meter
from metering.plans import Limit, Plan
from metering.spool import Spool

if TYPE_CHECKING:
    from pathlib import Path

SETTLES, SIGNALS, CALLS = 60, 60, 60
THREADS = 8
DEADLINE_S = 60.0
SOON_S = 0.02
PLAN = Plan(
    name="p",
    retention_days=30,
    fail="open",
    limits=(Limit(metric="requests", per="month", max=1_000), Limit(metric="tokens", per="month", max=100_000)),
)

spawn = multiprocessing.get_context("spawn")


def fill_and_die(url: str, secret: str) -> None:
    """Settle, signal and consume while somebody holds the ledger, and be killed."""
    meter = Meter(url, timeout_s=SOON_S)
    holds = [meter.reserve(secret, line="a", estimate=TokenUsage(input_tokens=9)) for _ in range(SETTLES)]
    other = sqlite3.connect(meter.ledger.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with ThreadPoolExecutor(THREADS) as threads:
        settled = list(threads.map(lambda hold: hold.settle(TokenUsage(input_tokens=2)).pending, holds))
        kept = list(threads.map(lambda n: meter.record(account="acme", line="b", quantity=n), range(SIGNALS)))
        calls = list(
            threads.map(lambda _: meter.consume(secret, line="a", usage=TokenUsage(input_tokens=3)), range(CALLS))
        )
    assert all(settled)
    assert all(kept)
    assert all(call.unchecked for call in calls)
    os.kill(os.getpid(), signal.SIGKILL)


def adopt(go: Any, url: str) -> None:
    with Meter(url) as meter:
        go.wait(DEADLINE_S)
        meter.flush()


def test_a_full_spool_that_two_processes_adopt_arrives_exactly_once(sqlite_url: str, tmp_path: Path) -> None:
    with Meter(sqlite_url) as office:
        office.apply_plans([PLAN])
        secret = office.keys.create("acme", plan="p").secret
    app = spawn.Process(target=fill_and_die, args=(sqlite_url, secret))
    app.start()
    app.join(DEADLINE_S)
    assert app.exitcode == -signal.SIGKILL
    assert Spool(tmp_path / "spool").pending().lines == SETTLES + SIGNALS + CALLS

    go = spawn.Barrier(2)
    adopters = [spawn.Process(target=adopt, args=(go, sqlite_url)) for _ in range(2)]
    for adopter in adopters:
        adopter.start()
    for adopter in adopters:
        adopter.join(DEADLINE_S)
    assert [adopter.exitcode for adopter in adopters] == [0, 0]

    with Meter(sqlite_url) as office:
        with office.ledger.read() as connection:
            rows = connection.exec_driver_sql(
                "SELECT line, input_tokens, quantity, billable, event_id FROM events"
            ).all()
        assert len({row.event_id for row in rows}) == len(rows)
        assert Counter((row.line, row.input_tokens) for row in rows if row.line == "a") == {
            ("a", 2): SETTLES,
            ("a", 3): CALLS,
        }
        assert sorted(int(row.quantity) for row in rows if row.line == "b") == list(range(SIGNALS))
        assert all(row.billable for row in rows)
        assert [status.used for status in office.quota("acme")] == [SETTLES + CALLS, 2 * SETTLES + 3 * CALLS]
        assert [check for check in check_counters(office.ledger) if not check.agrees] == []
        assert list((tmp_path / "spool").iterdir()) == []
