"""What a store cannot be told while it is away it is told once, later; and plans that fail open."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from metering.admission.verify import check_counters
from metering.aio import AsyncMeter
from metering.billing.pricing import Rate
from metering.drain import Drain
from metering.errors import InvalidPlan, RevokedKey, SettleConflict, StoreUnavailable
from metering.events import TokenUsage, new_event_id
from metering.meter import Meter
from metering.plans import Limit, Plan
from tests.servers import PostgresServer, RedisServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.conftest import Clock

USAGE = TokenUsage(input_tokens=3)
SOON_S = 0.1
LIMITS = (Limit(metric="requests", per="day", max=5), Limit(metric="tokens", per="month", max=1_000))


def plan(fail: str) -> Plan:
    return Plan(name="p", retention_days=30, limits=LIMITS, fail=fail)  # type: ignore[arg-type]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another writer holds the ledger."""
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    yield
    other.execute("ROLLBACK")
    other.close()


@pytest.fixture
def meter(open_meter: Callable[..., Meter]) -> Meter:
    opened = open_meter(timeout_s=SOON_S)
    opened.apply_plans([plan("open")])
    return opened


@pytest.fixture
def secret(meter: Meter) -> str:
    return meter.keys.create("acme", plan="p").secret


def billed(meter: Meter, account: str = "acme") -> tuple[int, int]:
    """Requests and input tokens."""
    totals = meter.usage(account)
    return sum(total.requests for total in totals), sum(total.input_tokens for total in totals)


def test_a_settle_waits_for_a_ledger_that_is_away(meter: Meter, secret: str) -> None:
    hold = meter.reserve(secret, line="a", estimate=TokenUsage(input_tokens=10))
    with locked(meter.ledger.path):
        settled = hold.settle(USAGE)
        assert settled.pending
        assert settled.billable
        assert hold.settle(USAGE).pending
        with pytest.raises(SettleConflict, match="was settled before with other usage, which waits in the spool"):
            hold.settle(TokenUsage(input_tokens=4))
    meter.flush()
    assert billed(meter) == (1, 3)
    assert [status.used for status in meter.quota("acme")] == [1, 3]
    assert all(check.agrees for check in check_counters(meter.ledger))


def test_what_a_killed_process_kept_is_carried_by_the_next(ledger_url: str, meter: Meter, secret: str) -> None:
    program = f"""
import os, signal, sqlite3
from metering import Meter, TokenUsage
meter = Meter({ledger_url!r}, timeout_s={SOON_S})
hold = meter.reserve({secret!r}, line="a", estimate=TokenUsage(input_tokens=10))
other = sqlite3.connect(meter.ledger.path, isolation_level=None)
other.execute("BEGIN IMMEDIATE")
assert hold.settle(TokenUsage(input_tokens=3)).pending
assert meter.record(account="acme", line="b", quantity=2)
os.kill(os.getpid(), signal.SIGKILL)
"""
    meter.close()
    killed = subprocess.run([sys.executable, "-c", program], check=False, env={**os.environ})
    assert killed.returncode == -signal.SIGKILL
    with Meter(ledger_url) as later:
        later.flush()
        assert billed(later) == (2, 3)
        assert list((later.ledger.path.parent / "spool").iterdir()) == []


def test_a_signal_waits_for_a_ledger_that_is_away(meter: Meter, secret: str) -> None:
    with locked(meter.ledger.path):
        assert meter.record(account="acme", line="b", quantity=2, idempotency_key="1")
        assert meter.record(account="acme", line="b", quantity=2, idempotency_key="1")
        assert meter.record(account="nobody", line="b", quantity=2)
        assert meter.record(account="acme", line="b", quantity=5)
    meter.flush()
    assert meter.dropped == 0
    [total] = meter.usage("acme")
    assert (total.requests, total.quantity) == (2, 7)


def test_async_words_are_the_same(ledger_url: str, meter: Meter, secret: str, clock: Clock) -> None:
    async def run() -> None:
        async with AsyncMeter(ledger_url, timeout_s=SOON_S, clock=clock) as other:
            assert (await other.consume(secret, line="a", usage=USAGE)).allowed
            hold = await other.reserve(secret, line="a", estimate=USAGE)
            with locked(meter.ledger.path):
                assert (await hold.settle(USAGE)).pending
                assert await other.record(account="acme", line="b", quantity=2)
                assert (await other.consume(secret, line="a", usage=USAGE)).unchecked
            await other.flush()

    asyncio.run(run())
    assert billed(meter) == (4, 9)


def test_a_plan_that_fails_open_admits_without_its_ledger_and_counts_later(meter: Meter, secret: str) -> None:
    assert not meter.consume(secret, line="a", usage=USAGE).unchecked
    with locked(meter.ledger.path):
        for _ in range(6):
            decision = meter.consume(secret, line="a", usage=USAGE, request={"q": 1}, response={"a": 1})
            assert (decision.allowed, decision.unchecked, decision.remaining) == (True, True, None)
    meter.flush()
    assert billed(meter) == (7, 21)
    assert [status.used for status in meter.quota("acme")] == [7, 21]
    assert [status.overrun for status in meter.quota("acme")] == [2, 0]
    assert len(meter.log("acme")) == 6
    assert all(check.agrees for check in check_counters(meter.ledger))
    assert not meter.consume(secret, line="a", usage=USAGE).allowed


def test_a_key_that_is_sent_again_while_the_store_is_away_is_billed_once(meter: Meter, secret: str) -> None:
    meter.consume(secret, line="a", usage=USAGE, idempotency_key="before")
    with locked(meter.ledger.path):
        for key in ("before", "during", "during"):
            assert meter.consume(secret, line="a", usage=USAGE, idempotency_key=key).unchecked
    meter.flush()
    with meter.ledger.read() as connection:
        attempts = connection.exec_driver_sql("SELECT billable, count(*) FROM events GROUP BY billable").all()
    assert dict(map(tuple, attempts)) == {True: 2, False: 2}
    assert meter.consume(secret, line="a", usage=USAGE, idempotency_key="during").replayed


def test_a_line_that_is_delivered_twice_counts_once(meter: Meter, secret: str) -> None:
    meter.consume(secret, line="a", usage=USAGE)
    with locked(meter.ledger.path):
        meter.consume(secret, line="a", usage=USAGE)
        meter.record(account="acme", line="b", quantity=1)
    delivered: list[Any] = []

    def twice(lines: list[Any]) -> list[Any]:
        delivered.extend(lines)
        return meter._courier._deliver(lines) + meter._courier._deliver(lines)

    meter._courier._spool.ship(twice)
    assert len(delivered) == 2
    assert billed(meter) == (3, 6)
    with meter.ledger.read() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM events").scalar() == 3


def test_a_hold_of_a_plan_that_fails_open(meter: Meter, secret: str) -> None:
    meter.consume(secret, line="a", usage=USAGE)
    with locked(meter.ledger.path):
        hold = meter.reserve(secret, line="a", estimate=TokenUsage(input_tokens=10))
        assert hold.decision.unchecked
    assert hold.settle(USAGE).late
    assert billed(meter) == (2, 6)
    assert [status.used for status in meter.quota("acme")] == [2, 6]


@pytest.mark.parametrize("when", ["never seen", "too long ago", "in another period", "the plan fails closed"])
def test_what_fails_closed(meter: Meter, secret: str, clock: Clock, when: str) -> None:
    if when == "the plan fails closed":
        meter.apply_plans([plan("closed")])
    if when != "never seen":
        meter.consume(secret, line="a", usage=USAGE)
    if when == "too long ago":
        clock.advance(minutes=5, seconds=1)
    if when == "in another period":
        clock.now = clock.now.replace(day=31, hour=23, minute=59)
        meter.consume(secret, line="a", usage=USAGE)
        clock.advance(minutes=2)
    with locked(meter.ledger.path), pytest.raises(StoreUnavailable):
        meter.consume(secret, line="a", usage=USAGE)


def test_a_plan_says_how_it_fails() -> None:
    assert plan("open").to_dict()["fail"] == "open"
    assert Plan.from_dict("p", plan("open").to_dict()) == plan("open")
    assert "fail" not in plan("closed").to_dict(), "versions of before are the same text"
    with pytest.raises(InvalidPlan, match=r"plans\.p\.fail: got 'maybe', expected one of closed, open"):
        plan("maybe")


def test_a_plan_fails_open_while_redis_is_frozen(ledger_url: str, tmp_path: Path) -> None:
    with RedisServer() as server:
        options: dict[str, Any] = {"quota_url": server.url, "quota_timeout_s": 1, "spool": tmp_path / "spool"}
        with Meter(ledger_url, **options) as meter:
            meter.apply_plans([plan("open")])
            secret = meter.keys.create("acme", plan="p").secret
            assert meter.consume(secret, line="a", usage=USAGE).allowed
            server.freeze()
            keys = (None, "k", None)
            calls = [meter.consume(secret, line="a", usage=USAGE, idempotency_key=key) for key in keys]
            assert all(call.unchecked for call in calls)
            server.thaw()
            meter.flush()
            assert meter._redis is not None
            Drain(meter.ledger, meter._redis.link).run()
            assert billed(meter) == (4, 12)
            assert [status.used for status in meter.quota("acme")] == [4, 12]
            assert all(check.agrees for check in meter._redis.check_counters())


def test_a_plan_fails_open_while_postgres_is_gone(tmp_path: Path) -> None:
    with (
        PostgresServer() as server,
        Meter(server.database(), create=True, timeout_s=2, spool=tmp_path / "spool") as meter,
    ):
        meter.apply_plans([plan("open")])
        secret = meter.keys.create("acme", plan="p").secret
        assert meter.consume(secret, line="a", usage=USAGE).allowed
        server.kill()
        assert meter.consume(secret, line="a", usage=USAGE).unchecked
        assert meter.record(account="acme", line="b", quantity=1)
        server.start()
        meter.flush()
        assert billed(meter) == (3, 6)
        assert [status.used for status in meter.quota("acme")] == [2, 6]
        assert all(check.agrees for check in check_counters(meter.ledger))


def test_flush_says_what_goes_on_waiting(meter: Meter, secret: str) -> None:
    hold = meter.reserve(secret, line="a", estimate=USAGE)
    with locked(meter.ledger.path):
        assert hold.settle(USAGE).pending
        with pytest.raises(StoreUnavailable, match="1 lines go on waiting in the spool"):
            meter.flush()
    meter.flush()
    assert billed(meter) == (1, 3)


def test_a_settle_that_leaves_out_what_a_rate_needs_is_billed_as_estimated_and_blocks_nothing(
    open_meter: Callable[..., Meter],
) -> None:
    priced = Rate.from_dict(
        {"line": "a", "metric": "input_tokens", "type": "per_unit", "unit_amount": "1", "match": {"model": "gpt-*"}}
    )
    meter = open_meter(timeout_s=SOON_S)
    meter.apply_plans([Plan(name="p", retention_days=30, fail="open", rates=(priced,))])
    secret = meter.keys.create("acme", plan="p").secret
    meter.consume(secret, line="a", usage=USAGE, model="gpt-4.1")
    hold = meter.reserve(secret, line="a", estimate=USAGE)
    with locked(meter.ledger.path):
        assert hold.settle(USAGE).pending
        assert meter.consume(secret, line="a", usage=USAGE).unchecked
        assert meter.consume(secret, line="a", usage=USAGE, model="gpt-4.1").unchecked
    meter.flush()
    with meter.ledger.read() as connection:
        kept = connection.exec_driver_sql("SELECT model, estimated FROM events ORDER BY seq").all()
    assert [tuple(row) for row in kept] == [("gpt-4.1", 0), (None, 1), (None, 1), ("gpt-4.1", 0)]


def test_what_waits_for_one_ledger_is_carried_to_no_other(
    open_meter: Callable[..., Meter], secret: str, meter: Meter, tmp_path: Path, clock: Clock
) -> None:
    spool = meter.ledger.path.parent / "spool"
    with locked(meter.ledger.path):
        assert meter.record(account="acme", line="b", quantity=1)
        meter.close()
        with Meter(f"sqlite:///{tmp_path / 'other.db'}", spool=spool, clock=clock) as other:
            other.keys.create("acme", plan="free")
            other.flush()
            assert billed(other) == (0, 0)
    meter.flush()
    assert billed(meter) == (1, 0)


@pytest.mark.parametrize("why", ["revoked", "the plan fails closed now"])
def test_what_the_store_has_said_last_counts_while_it_is_away(meter: Meter, secret: str, why: str) -> None:
    meter.consume(secret, line="a", usage=USAGE)
    if why == "revoked":
        meter.keys.revoke(meter.keys.lookup(secret).key_id)
        with pytest.raises(RevokedKey):
            meter.consume(secret, line="a", usage=USAGE)
    else:
        meter.apply_plans([plan("closed")])
        meter.consume(secret, line="a", usage=USAGE)
    with locked(meter.ledger.path), pytest.raises(StoreUnavailable):
        meter.consume(secret, line="a", usage=USAGE)


def test_a_flush_waits_for_another_that_has_the_files(meter: Meter, secret: str) -> None:
    meter.consume(secret, line="a", usage=USAGE)
    with locked(meter.ledger.path):
        meter.consume(secret, line="a", usage=USAGE)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: meter.flush(), range(4)))
    assert billed(meter) == (2, 6), "each flush waits for the one before it"


@pytest.mark.parametrize("kind", ["settle", "signal"])
def test_a_line_that_cannot_be_read_stays_and_keeps_no_other(meter: Meter, secret: str, kind: str) -> None:
    hold = meter.reserve(secret, line="a", estimate=USAGE)
    with locked(meter.ledger.path):
        meter._courier.keep(kind, new_event_id(), b"\xc1")
        assert hold.settle(USAGE).pending
        assert meter.record(account="acme", line="b", quantity=1)
    with pytest.raises(StoreUnavailable, match="1 lines go on waiting"):
        meter.flush()
    assert billed(meter) == (2, 3)
