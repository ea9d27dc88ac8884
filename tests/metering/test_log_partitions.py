"""How space is given back: partitions of the request log on Postgres, and a file of SQLite that shrinks."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from metering import Meter
from metering.ledger import log_partitions
from metering.legal_holds import place_hold, release_hold
from metering.plans import Plan
from tests.metering.retaining import call, logged, run


@pytest.fixture
def ledger_url(postgres_url: str) -> str:
    return postgres_url


def days(meter: Meter) -> list[str]:
    with meter.ledger.read() as connection:
        return [str(day) for day in log_partitions.partitioned_days(connection)]


def partition_rows(meter: Meter) -> dict[str, int]:
    with meter.ledger.read() as connection:
        found = connection.exec_driver_sql("SELECT tableoid::regclass::text, count(*) FROM request_log GROUP BY 1")
        return dict(found.all())


def test_partitions_are_made_ahead_for_every_plan(meter: Meter, clock: Any) -> None:
    meter.apply_plans([Plan(name="p", retention_days=2), Plan(name="q", retention_days=40)])
    assert log_partitions.make_ahead(meter.ledger, clock.now) == 16
    assert (
        days(meter)[::7]
        == ["2026-03-14", "2026-04-21", "2026-04-27"][:1]
        + ["2026-03-21", "2026-04-27"][:0]
        + ["2026-03-21"][:0]
        + days(meter)[7::7]
    )
    assert log_partitions.make_ahead(meter.ledger, clock.now) == 0
    assert log_partitions.make_ahead(meter.ledger, clock.advance(days=1)) == 2


def test_a_row_without_a_partition_is_kept_all_the_same(meter: Meter, clock: Any) -> None:
    secret = meter.keys.create("acme", plan="free").secret
    call(meter, secret)
    assert partition_rows(meter) == {"request_log_default": 1}
    # Its day stays with the default partition; the days after have their own.
    assert log_partitions.make_ahead(meter.ledger, clock.now) == 7
    clock.advance(days=1)
    call(meter, secret)
    assert partition_rows(meter) == {"request_log_default": 1, "request_log_20260320": 1}
    clock.advance(days=8)
    run(meter, clock)
    assert logged(meter) == {}


def test_a_partition_is_dropped_once_its_day_is_over(meter: Meter, clock: Any) -> None:
    secret = meter.keys.create("acme", plan="free").secret
    log_partitions.make_ahead(meter.ledger, clock.now)
    call(meter, secret)
    clock.now += timedelta(days=7, hours=11, minutes=59)
    assert log_partitions.drop_past(meter.ledger, clock.now) == {}
    assert days(meter)[0] == "2026-03-19"
    clock.advance(minutes=1)
    assert log_partitions.drop_past(meter.ledger, clock.now) == {"acme": 1}
    assert days(meter)[0] == "2026-03-20"
    assert logged(meter) == {}


def test_a_held_row_keeps_its_partition_and_nothing_else_of_it(meter: Meter, clock: Any) -> None:
    secrets = [meter.keys.create(name, plan="free").secret for name in ("held", "other")]
    log_partitions.make_ahead(meter.ledger, clock.now)
    for secret in secrets:
        call(meter, secret)
    place_hold(meter.ledger, "held", reason="case", actor="counsel", now=clock.now)
    clock.advance(days=9)
    assert run(meter, clock)["request_log"] == {"other": 1}
    assert logged(meter) == {"held": 1}
    release_hold(meter.ledger, "held", actor="counsel", now=clock.now)
    assert log_partitions.drop_past(meter.ledger, clock.now) == {"held": 1}


def test_a_reader_of_the_log_does_not_make_admissions_wait_for_a_drop(meter: Meter, clock: Any) -> None:
    secret = meter.keys.create("acme", plan="free").secret
    log_partitions.make_ahead(meter.ledger, clock.now)
    call(meter, secret)
    clock.advance(days=9)
    with meter.ledger.read() as connection:
        connection.exec_driver_sql("SELECT count(*) FROM request_log")
        # It gives up rather than queue for the lock, and the row is left to be deleted by itself.
        assert log_partitions.drop_past(meter.ledger, clock.now) == {}
        assert logged(meter) == {"acme": 1}
    assert log_partitions.drop_past(meter.ledger, clock.now) == {"acme": 1}


def test_a_file_shrinks_again(sqlite_url: str, clock: Any) -> None:
    with Meter(sqlite_url, clock=clock) as meter:
        secret = meter.keys.create("acme", plan="free").secret
        for _ in range(40):
            meter.consume(secret, line="a", request="x" * 30_000)
        before = pages(meter)
        clock.advance(days=7)
        run(meter, clock)
        assert pages(meter) < before - 200


def pages(meter: Meter) -> int:
    with meter.ledger.read() as connection:
        return int(connection.exec_driver_sql("PRAGMA page_count").scalar_one())
