"""Faults that others had, each by the name of its source. These stores do not have them."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from redis import crc

import metering
from metering.aio import AsyncMeter
from metering.drain import Drain
from metering.errors import IdempotencyInProgress, LedgerError, LimitExceeded, StoreUnavailable
from metering.events import TokenUsage, UsageEvent, new_event_id
from metering.ledger import Ledger
from metering.meter import Meter
from metering.plans import Limit, Plan
from tests.conformance.conftest import Shop
from tests.conformance.stores import STORES
from tests.proxy import Proxy
from tests.servers import RedisCluster, RedisServer, flavours, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import Clock

DEADLINE_S = 20.0
SOON_S = 0.1
"""The timeout of a store that is known to be away."""


@pytest.fixture(params=["sqlite", next(iter(flavours()))])
def shop(request: pytest.FixtureRequest, sqlite_url: str, clock: Clock) -> Iterator[Shop]:
    opened = Shop(STORES[request.param](sqlite_url, clock))
    yield opened
    opened.close()


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer(appendonly=True) as running:
        yield running


@pytest.fixture
def open_meter(ledger_url: str, clock: Clock) -> Iterator[Callable[..., Meter]]:
    opened: list[Meter] = []

    def open_one(quota_url: str | None = None, timeout_s: float = DEADLINE_S, **options: Any) -> Meter:
        options = {"timeout_s": timeout_s, "quota_timeout_s": timeout_s, "clock": clock, **options}
        opened.append(Meter(ledger_url, quota_url=quota_url, **options))
        return opened[-1]

    yield open_one
    for meter in opened:
        meter.close()


def per(window: str, most: int | str, metric: str = "requests", **options: Any) -> Limit:
    return Limit(metric=metric, per=window, max=Decimal(most), **options)  # type: ignore[arg-type]


def rate(text: str, burst: int, metric: str = "tokens") -> Limit:
    return Limit(metric=metric, rate=text, burst=burst)


def tokens(count: int) -> TokenUsage:
    return TokenUsage(input_tokens=count)


def open_account(meter: Meter, *limits: Limit, account: str = "acme") -> str:
    meter.apply_plans([Plan(name=account, retention_days=1, limits=limits)])
    return meter.keys.create(account, plan=account).secret


def open_awaited(meter: Meter, quota_url: str) -> AsyncMeter:
    url = f"sqlite:///{meter.ledger.path}"
    return AsyncMeter(url, quota_url=quota_url, quota_timeout_s=DEADLINE_S, clock=meter._clock)


def drain(meter: Meter) -> Any:
    meter.flush()
    return Drain(meter.ledger, meter._redis.link, clock=meter._clock).run()  # type: ignore[union-attr]


def billed(meter: Meter) -> int:
    return sum(total.requests for total in meter.usage("acme"))


def used(meter: Meter, account: str = "acme") -> list[int]:
    return [int(status.used) for status in meter.quota(account)]


# What limits decide.


def test_a_refused_hit_burns_no_quota(shop: Shop) -> None:
    """limits: a hit that one limit refuses is counted by the others."""
    secret = shop.open_account(per("day", 10), per("day", 100, "tokens"), rate("10/hour", 10, "requests"))
    shop.consume(secret, 60)
    before = shop.standing()
    for _ in range(20):
        assert not shop.consume(secret, 41).allowed
        with pytest.raises(LimitExceeded):
            shop.reserve(secret, 41)
    assert shop.standing() == before
    assert shop.count("events") == 1
    assert [shop.consume(secret, 4).allowed for _ in range(10)] == [True] * 9 + [False]


def test_no_overshoot_by_n_minus_1(shop: Shop) -> None:
    """Upstash sliding window: the cost is added after the test, so a call of N may overshoot by N - 1."""
    secret = shop.open_account(per("hour", 10, "tokens"))
    assert shop.consume(secret, 9).allowed
    assert not shop.consume(secret, 2).allowed
    assert shop.consume(secret, 1).allowed
    assert not shop.consume(secret, 1).allowed
    assert shop.consume(secret, 0).allowed
    assert shop.used() == [10]


def test_a_bucket_does_not_go_negative(shop: Shop, clock: Clock) -> None:
    """Upstash token bucket: a call larger than what is left takes it below zero."""
    secret = shop.open_account(rate("10/minute", 10))
    assert shop.consume(secret, 6).allowed
    refused = shop.consume(secret, 9)
    assert (refused.allowed, refused.remaining) == (False, 4)
    assert shop.consume(secret, 4).remaining == 0
    clock.advance(seconds=6)
    assert [shop.consume(secret, 1).allowed for _ in range(2)] == [True, False]


@pytest.mark.parametrize(("size", "admitted"), [(133, 0), (60, 1), (34, 2)])
def test_five_parallel_calls_do_not_pass_a_limit_of_100_tokens(shop: Shop, size: int, admitted: int) -> None:
    """litellm #18730: 663 tokens admitted on a limit of 100 by five parallel calls."""
    secret = shop.open_account(per("minute", 100, "tokens"))
    together = threading.Barrier(5)

    def work(index: int) -> bool:
        together.wait(DEADLINE_S)
        try:
            if index % 2:
                return bool(shop.consume(secret, size).allowed)
            shop.reserve(secret, size)
        except LimitExceeded:
            return False
        return True

    with ThreadPoolExecutor(5) as threads:
        assert list(threads.map(work, range(5))).count(True) == admitted
    assert shop.used() == [admitted * size]


def test_refusals_are_not_counted(shop: Shop, clock: Clock) -> None:
    """Kong: refused calls are counted, so that a client that hammers never recovers."""
    secret = shop.open_account(per("minute", 3), rate("1/second", 1, "requests"))
    for _ in range(3):
        assert shop.consume(secret).allowed
        for _ in range(10):
            assert not shop.consume(secret).allowed
            clock.advance(seconds=0.1)
    for _ in range(50):
        assert not shop.consume(secret).allowed
    clock.advance(seconds=57)
    assert shop.consume(secret).allowed
    assert shop.used()[0] == 1


def test_a_reservation_is_refused_never_shrunk(shop: Shop) -> None:
    """litellm PR #26845: a reservation is cut down to the headroom there is."""
    secret = shop.open_account(per("day", 100, "tokens"))
    shop.consume(secret, 60)
    with pytest.raises(LimitExceeded) as refusal:
        shop.reserve(secret, 50)
    assert (refusal.value.used, refusal.value.remaining, shop.used()) == (60, 40, [60])
    with shop.reserve(secret, 40) as hold:
        assert shop.used() == [100]
        hold.settle(tokens(40))


def test_a_settle_moves_the_window_of_its_reservation(shop: Shop, clock: Clock) -> None:
    """api7/aisix #396: usage added where the window is by then lets a client take five times its budget at an edge."""
    secret = shop.open_account(per("minute", 100, "tokens"))
    clock.advance(seconds=59)
    for _ in range(5):
        with shop.reserve(secret, 100) as hold:
            clock.advance(seconds=2)
            assert shop.used() == [0], "the new minute has nothing of it"
            hold.settle(tokens(90))
        assert shop.used() == [0]
        clock.advance(seconds=58)
    by_minute: Counter[str] = Counter()
    for event in shop.events():
        by_minute[event["occurred_at"][:16]] += event["input_tokens"]
    assert list(by_minute.values()) == [90] * 5


def test_holds_do_not_leak(shop: Shop, clock: Clock) -> None:
    """litellm #36926: leases of calls that fail are never given back."""
    secret = shop.open_account(per("month", 50), per("month", 500, "tokens"))
    for number in range(10):
        with pytest.raises(ZeroDivisionError), shop.reserve(secret, 10, idempotency_key=f"failed-{number}"):
            _ = 1 // 0
        shop.reserve(secret, 10, idempotency_key=f"released-{number}").release()
        shop.reserve(secret, 10, idempotency_key=f"forgotten-{number}")
    assert shop.used() == [10, 100]
    clock.advance(minutes=16)
    assert shop.consume(secret, 1).allowed
    assert shop.used() == [1, 1]
    # A key whose call failed is free again.
    assert shop.reserve(secret, 499, idempotency_key="failed-0").settle(tokens(0)).billable
    shop.meter.expire_holds()
    assert shop.holds("open") == 0
    assert shop.used() == [2, 1]


def test_a_period_ends_at_a_local_midnight_off_the_hour(shop: Shop, clock: Clock) -> None:
    """Month starts in Kolkata fall on :30 UTC; a complaint: resets come late by the zone's offset."""
    secret = shop.open_account(per("period", 1), time_zone="Asia/Kolkata")
    assert [shop.consume(secret).allowed for _ in range(2)] == [True, False]
    clock.now = datetime(2026, 3, 31, 18, 29, 59, 999_999, tzinfo=UTC)
    assert not shop.consume(secret).allowed
    clock.now += timedelta(microseconds=1)
    assert shop.consume(secret).allowed


# Numbers.


def test_numbers_above_2_53_keep_their_last_digit(shop: Shop) -> None:
    """Lua numbers, and JSON readers, lose integers above 2^53; 9007199254740993 is the first to go."""
    secret = shop.open_account(per("month", "9007199254740993.000000000003", "quantity"))
    for quantity, allowed, left in (
        ("9007199254740990", True, "3.000000000003"),
        ("3.000000000004", False, "3.000000000003"),
        ("2.000000000001", True, "1.000000000002"),
        ("1.000000000003", False, "1.000000000002"),
        ("1.000000000002", True, "0"),
        ("0.000000000001", False, "0"),
    ):
        decision = shop.meter.consume(secret, line="a", quantity=Decimal(quantity))
        assert (decision.allowed, decision.remaining) == (allowed, Decimal(left))
    shop.place.drain()
    assert shop.meter.usage("acme")[0].quantity == Decimal("9007199254740993.000000000003")


def test_the_largest_token_counts_are_exact(shop: Shop) -> None:
    """The same of token counts: a counter of several goes above 2^53 before it is compared."""
    most = 2**53
    secret = shop.open_account(per("month", most, "tokens"))
    assert shop.consume(secret, most - 1).remaining == 1
    assert not shop.consume(secret, 2).allowed
    assert not shop.consume(secret, most).allowed
    assert shop.consume(secret, 1).remaining == 0
    assert shop.used() == [most]


def test_a_tenth_is_a_tenth(shop: Shop) -> None:
    """SQLite's NUMERIC stores '0.1' as a float and rounds 26 digits; SQLAlchemy's Numeric does too, silently."""
    secret = shop.open_account(per("month", 1, "quantity"))
    assert [shop.meter.consume(secret, line="a", quantity=Decimal("0.1")).remaining for _ in range(10)] == [
        Decimal(tenths) / 10 for tenths in reversed(range(10))
    ]
    assert not shop.meter.consume(secret, line="a", quantity=Decimal("0.000000000001")).allowed
    account = shop.open_account(account="large")
    largest = Decimal("999999999999999999.999999999999")
    shop.meter.consume(account, line="a", quantity=largest)
    shop.place.drain()
    assert shop.meter.usage("large")[0].quantity == largest


# Retries, and stores that are away.


def test_a_retry_after_a_failed_write_is_metered_once(open_meter: Callable[..., Meter]) -> None:
    """openmeter #5118: a retry after a failed write is answered "duplicate", and metered zero times."""
    meter = open_meter(timeout_s=SOON_S)
    secret = open_account(meter, per("month", 10))
    other = Ledger(f"sqlite:///{meter.ledger.path}")
    with other.write(), pytest.raises(LedgerError):
        meter.consume(secret, line="a", idempotency_key="k", response="first")
    other.close()
    again = meter.consume(secret, line="a", idempotency_key="k", response="second")
    assert (again.allowed, again.replayed, billed(meter), used(meter)) == (True, False, 1, [1])
    assert meter.consume(secret, line="a", idempotency_key="k").response == "second"


@pytest.mark.parametrize("lost", ["call", "answer"])
def test_a_retry_after_an_answer_that_never_came_is_metered_once(
    open_meter: Callable[..., Meter], server: RedisServer, lost: str
) -> None:
    """openmeter #5118, on Redis: whether the call was lost or its answer, and whether it was undone or not."""
    with Proxy(server.port) as proxy:
        meter = open_meter(proxy.url, timeout_s=0.5)
        secret = open_account(meter, per("month", 10))
        meter.consume(secret, line="a")
        for key in ("undone", "replayed"):
            if lost == "call":
                proxy.pause()
            else:
                proxy.drop_replies = 1.0
            with pytest.raises(StoreUnavailable):
                meter.consume(secret, line="a", idempotency_key=key, response="first")
            proxy.drop_replies = 0.0
            proxy.resume()
            if key == "undone":
                wait_until(lambda: _ships(meter), "the spool")
            again = meter.consume(secret, line="a", idempotency_key=key, response="second")
            assert again.allowed
            assert again.response == ("first" if again.replayed else None)
            assert key == "replayed" or not again.replayed
            assert meter.consume(secret, line="a", idempotency_key=key).response in {again.response, "second"}
        wait_until(lambda: _ships(meter), "the spool")
        drain(meter)
        assert (billed(meter), used(meter)) == (3, [3])


def _ships(meter: Meter) -> bool:
    """Whether nothing waits in the spool any more."""
    meter.flush()
    return not any((meter.ledger.path.parent / "spool").glob("*"))


def test_three_lost_replies_count_once(open_meter: Callable[..., Meter], server: RedisServer) -> None:
    """redis-py 8 retries ten times by default: three lost replies counted one call four times."""
    with Proxy(server.port, silent=0.0) as proxy:
        meter = open_meter(proxy.url)
        secret = open_account(meter, per("month", 10), rate("10/hour", 10, "requests"))
        meter.consume(secret, line="a")
        proxy.drop_next = 3
        decision = meter.consume(secret, line="a")
        assert (decision.allowed, decision.replayed, decision.remaining) == (True, False, 8)
        assert proxy.counts["dropped"] == 3
        assert used(meter) == [2, 2]
        hold_of = meter.reserve(secret, line="a")
        proxy.drop_next = 3
        assert not hold_of.settle().repeated
        assert used(meter) == [3, 3]
        assert drain(meter).inserted == 3
        assert billed(meter) == 3


def test_a_frozen_server_does_not_hold_a_call(open_meter: Callable[..., Meter], server: RedisServer) -> None:
    """redis-py 8, its default retries: a frozen server held a call of 0.25 s for 6.6 s."""
    meter = open_meter(server.url, timeout_s=0.5)
    secret = open_account(meter)
    meter.consume(secret, line="a")
    server.freeze()
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(meter.consume, secret, line="a")
        assert isinstance(answer.exception(10), StoreUnavailable)
    server.thaw()
    assert meter.consume(secret, line="a").allowed


def test_no_fallback_per_process_when_redis_is_away(open_meter: Callable[..., Meter], server: RedisServer) -> None:
    """litellm: each process goes on by itself when Redis is away, so N of them admit N times the limit."""
    meters = [open_meter(server.url, timeout_s=1) for _ in range(3)]
    secret = open_account(meters[0], per("month", 10))
    assert all(meter.consume(secret, line="a").allowed for meter in meters)
    server.kill()
    for meter in meters:
        with pytest.raises(StoreUnavailable):
            meter.consume(secret, line="a")
    with pytest.raises(StoreUnavailable):
        meters[0].reserve(secret, line="a")
    server.start()
    for meter in meters:
        wait_until(lambda meter=meter: _ships(meter), "the spool")  # type: ignore[misc]
    answers = [meter.consume(secret, line="a").allowed for meter in meters for _ in range(4)]
    assert answers.count(True) == 7
    assert drain(meters[0]).inserted == 10
    assert billed(meters[0]) == 10


def test_one_known_id_does_not_refuse_a_batch(shop: Shop, clock: Clock) -> None:
    """lago-api #3049: a batch with one id that is known is refused as a whole."""
    shop.open_account()
    batch = [
        UsageEvent(event_id=new_event_id(), kind="signal", account="acme", line="a", occurred_at=clock.now)
        for _ in range(5)
    ]
    store = shop.meter._store
    assert store.append([batch[2]]).inserted == 1
    appended = store.append(batch)
    assert (appended.inserted, appended.known, appended.conflicting) == (4, 1, ())
    assert shop.count("events") == 5


# Redis.


def test_one_known_id_does_not_hold_up_a_drain(open_meter: Callable[..., Meter], server: RedisServer) -> None:
    """lago-api #3049, in the drain: an id that Redis had forgotten comes a second time, between others."""
    meter = open_meter(server.url)
    secret = open_account(meter, per("month", 10))
    for key in ("a", "k", "b", "k", "c"):
        assert not meter.consume(secret, line="a", idempotency_key=key).replayed
        with server.client() as client:
            client.delete(*client.keys("tally:{m*}:id:*"))
    drained = drain(meter)
    assert (drained.inserted, drained.reused) == (4, 1)
    assert (billed(meter), used(meter)) == (4, [4])


def test_events_leave_the_queue_after_the_commit(open_meter: Callable[..., Meter], server: RedisServer) -> None:
    """litellm #33872: events are popped from a queue, and lost when the commit that follows fails."""
    meter = open_meter(server.url)
    secret = open_account(meter, per("month", 10))
    for _ in range(5):
        meter.consume(secret, line="a")
    hasty = Ledger(f"sqlite:///{meter.ledger.path}", timeout_s=SOON_S)
    with meter.ledger.write(), pytest.raises(LedgerError):
        Drain(hasty, meter._redis.link).run()  # type: ignore[union-attr]
    hasty.close()
    with server.client() as client:
        [stream] = client.keys("tally:{m*}:events")
        assert client.xlen(stream) == 5
        assert drain(meter).inserted == 5
        assert client.xlen(stream) == 0
    assert billed(meter) == 5


def test_an_entry_that_is_gone_holds_up_nothing(open_meter: Callable[..., Meter], server: RedisServer) -> None:
    """XAUTOCLAIM on Redis 6.2 returns nil for trimmed entries, and keeps them pending for ever."""
    meter = open_meter(server.url)
    secret = open_account(meter, per("month", 10))
    for _ in range(5):
        meter.consume(secret, line="a")
    with server.client() as client:
        [stream] = client.keys("tally:{m*}:events")
        client.xdel(stream, client.xrange(stream)[2][0])
    drained = drain(meter)
    assert (drained.inserted, drained.lost) == (4, 1)
    drained = drain(meter)
    assert (drained.inserted, drained.lost) == (0, 0)
    assert billed(meter) == 4


def test_a_counter_without_a_ttl_heals(open_meter: Callable[..., Meter], server: RedisServer) -> None:
    """A counter whose TTL got lost never heals, unless the script sets it when there is none."""
    meter = open_meter(server.url)
    secret = open_account(meter, per("minute", 100), rate("100/hour", 100, "requests"))
    meter.consume(secret, line="a")
    with server.client() as client:
        kept = client.keys("tally:{m*}:counter:*") + client.keys("tally:{m*}:rate:*")
        assert len(kept) == 2
        for key in kept:
            assert client.persist(key)
        assert all(meter.consume(secret, line="a").allowed for _ in range(16))
        assert min(client.pttl(key) for key in kept) > 0


def test_counters_that_are_gone_are_counted_again(open_meter: Callable[..., Meter], server: RedisServer) -> None:
    """Redis counters are a cache of the ledger: without them the limit is as exact."""
    meter = open_meter(server.url)
    secret = open_account(meter, per("month", 10), per("day", 8))
    for _ in range(3):
        meter.consume(secret, line="a")
    drain(meter)
    for _ in range(2):
        meter.consume(secret, line="a")
    hold = meter.reserve(secret, line="a")
    with server.client() as client:
        client.delete(*client.keys("tally:{m*}:counter:*"))
    assert [meter.consume(secret, line="a").allowed for _ in range(4)] == [True, True, False, False]
    hold.release()
    assert used(meter) == [7, 7]


@pytest.mark.parametrize("verb", ["consume", "reserve"])
def test_a_promoted_replica_that_is_behind_admits_nothing(
    open_meter: Callable[..., Meter], server: RedisServer, verb: str
) -> None:
    """A stale replica promoted: the epoch key was there, the counter was not. Or a hold, of which no event tells."""
    with RedisServer(replica_of=server) as replica, Proxy(server.port) as proxy:
        meter = open_meter(proxy.url, timeout_s=0.5)
        ask: Callable[..., Any] = getattr(meter, verb)
        secret = open_account(meter, per("month", 5))
        ask(secret, line="a")
        with replica.client() as client:
            wait_until(lambda: bool(client.keys("tally:{m*}:counter:*")), "replication")
            client.replicaof("no", "one")
        for _ in range(4):
            ask(secret, line="a")
        proxy.refuse()
        proxy.server_port = replica.port
        proxy.resume()
        for _ in range(2):
            with pytest.raises(StoreUnavailable, match="quota rebuild"):
                ask(secret, line="a")


def test_a_forgotten_script_is_no_error(open_meter: Callable[..., Meter], server: RedisServer) -> None:
    """The script cache is volatile. redis-py #459: NOSCRIPT is not healed in pipelines."""
    meter = open_meter(server.url)
    secret = open_account(meter, per("month", 100))

    async def in_tasks() -> list[bool]:
        async with open_awaited(meter, server.url) as awaited:
            await awaited.consume(secret, line="a")
            with server.client() as client:
                client.script_flush()
            return [
                decision.allowed
                for decision in await asyncio.gather(*(awaited.consume(secret, line="a") for _ in range(30)))
            ]

    with server.client() as client:
        for verb in (lambda: meter.consume(secret, line="a"), lambda: meter.reserve(secret, line="a").settle()):
            verb()
            client.script_flush()
            verb()
    assert asyncio.run(in_tasks()) == [True] * 30
    assert used(meter) == [35]
    assert drain(meter).inserted == 35


def test_a_forgotten_script_is_no_error_on_a_cluster(open_meter: Callable[..., Meter]) -> None:
    """redis-py #3935, #4206: the async cluster client does not heal NOSCRIPT."""
    with RedisCluster() as cluster:
        meter = open_meter(cluster.url)
        secrets = [open_account(meter, per("month", 20), account=f"account-{number}") for number in range(6)]

        async def in_tasks() -> list[bool]:
            async with open_awaited(meter, cluster.url) as awaited:
                answers = []
                for _ in range(3):
                    for node in cluster.nodes:
                        with node.client() as client:
                            client.script_flush()
                    calls = [awaited.consume(secret, line="a") for secret in secrets for _ in range(5)]
                    answers += [decision.allowed for decision in await asyncio.gather(*calls)]
                return answers

        assert asyncio.run(in_tasks()) == [True] * 90
        assert [used(meter, f"account-{number}") for number in range(6)] == [[15]] * 6


def test_all_keys_of_a_script_are_in_one_slot(
    open_meter: Callable[..., Meter], server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slot is the CRC16 of the first non-empty `{...}`, also in what a customer is called."""
    meter = open_meter(server.url)
    link = meter._redis.link  # type: ignore[union-attr]
    slots: list[set[int]] = []
    script = link.script

    def noting(shard: int, name: str, keys: Any, *arguments: Any, **options: Any) -> Any:
        slots.append({crc.key_slot(key.encode()) for key in keys})
        return script(shard, name, keys, *arguments, **options)

    monkeypatch.setattr(link, "script", noting)
    for account in ("{a}", "}{", "{}", "a:b{m1}:c", "\u00e4{\u00f6}"):
        secret = open_account(
            meter, per("month", 9), per("day", 9, "tokens", line="{l}"), rate("9/hour", 9), account=account
        )
        meter.consume(secret, line="{l}", usage=tokens(1), idempotency_key="{k}")
        meter.reserve(secret, line="{l}", estimate=tokens(1)).settle(tokens(2))
        meter.reserve(secret, line="{l}", estimate=tokens(1)).release()
        assert used(meter, account) == [2, 3, 3]
    assert len(slots) > 20
    assert {len(found) for found in slots} == {1}


# SQLite.


def test_no_write_fails_because_it_began_as_a_read(open_meter: Callable[..., Meter]) -> None:
    """SQLITE_BUSY_SNAPSHOT (517): a transaction that starts as a read skips the busy handler when it writes."""
    meters = [open_meter() for _ in range(4)]
    secret = open_account(meters[0], per("month", 150))

    def work(index: int) -> int:
        meter, admitted = meters[index % 4], 0
        for number in range(25):
            used(meter)
            admitted += meter.consume(secret, line="a", idempotency_key=f"{index}-{number}").allowed
        return admitted

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(work, range(8), timeout=DEADLINE_S)) == 150
    assert billed(meters[0]) == 150


def test_a_deleted_top_number_is_not_used_again(open_meter: Callable[..., Meter]) -> None:
    """SQLite without AUTOINCREMENT reuses a deleted top rowid: below the watermark of whoever has read it."""
    meter = open_meter()
    secret = open_account(meter)
    numbers: list[int] = []
    for _ in range(2):
        meter.consume(secret, line="a")
        with meter.ledger.write() as connection:
            numbers += connection.exec_driver_sql("SELECT max(seq) FROM events").scalars()
            connection.exec_driver_sql("DELETE FROM events")
    assert numbers[1] > numbers[0]


def test_no_insert_ignores_more_than_a_known_id() -> None:
    """`INSERT OR IGNORE` also swallows NOT NULL and CHECK failures."""
    sources = [path for path in Path(metering.__file__).parent.rglob("*") if path.suffix in (".py", ".sql")]
    assert len(sources) > 50
    texts = [" ".join(path.read_text(encoding="utf-8").upper().split()) for path in sources]
    assert not [text for text in texts if "OR IGNORE" in text or "OR REPLACE" in text]


def test_a_call_in_progress_is_no_duplicate(shop: Shop, clock: Clock) -> None:
    """openmeter #5118, of holds: an attempt that came to nothing does not answer for the next one."""
    secret = shop.open_account(per("month", 10))
    hold = shop.reserve(secret, idempotency_key="k")
    with pytest.raises(IdempotencyInProgress):
        shop.reserve(secret, idempotency_key="k")
    hold.release()
    assert not shop.reserve(secret, idempotency_key="k").settle().repeated
    assert shop.consume(secret, idempotency_key="k").replayed
    assert shop.count("events") == 1
