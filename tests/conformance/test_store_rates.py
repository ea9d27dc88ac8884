"""Rates: GCRA with a burst. They are no count of events, so nothing recounts them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metering.admission.decide import check_rate
from metering.events import TokenUsage
from metering.plans import Limit

NOON = datetime(2026, 3, 12, 12, tzinfo=UTC)


def test_a_burst_and_then_the_rate(shop: Any, clock: Any) -> None:
    secret = shop.open_account(Limit(metric="requests", rate="60/minute", burst=3))
    assert [shop.consume(secret).allowed for _ in range(4)] == [True, True, True, False]
    refused = shop.consume(secret)
    assert refused.refused_by.retry_after_s == 1
    assert refused.reset_at == clock.now + timedelta(seconds=3)
    clock.advance(seconds=0.999999)
    assert not shop.consume(secret).allowed
    clock.advance(seconds=0.000001)
    assert shop.consume(secret).allowed
    assert not shop.consume(secret).allowed
    clock.advance(hours=1)
    assert [shop.consume(secret).allowed for _ in range(4)] == [True, True, True, False]


def test_refusals_cost_nothing(shop: Any, clock: Any) -> None:
    secret = shop.open_account(Limit(metric="requests", rate="1/minute"))
    assert shop.consume(secret).allowed
    for _ in range(59):
        clock.advance(seconds=1)
        assert not shop.consume(secret).allowed
    clock.advance(seconds=1)
    assert shop.consume(secret).allowed


def test_without_a_burst_the_count_may_come_at_once(shop: Any) -> None:
    secret = shop.open_account(Limit(metric="tokens", rate="100/hour"))
    assert [shop.consume(secret, 50).allowed for _ in range(3)] == [True, True, False]


def test_a_partly_used_unit_is_used(shop: Any, clock: Any) -> None:
    """Half a minute after the only request, half of it has refilled: a burst of 2 has room for one, not for two."""
    secret = shop.open_account(Limit(metric="requests", rate="1/minute", burst=2))
    shop.consume(secret)
    clock.advance(seconds=30)
    assert shop.meter.quota("acme")[0].remaining == 1
    decision = shop.consume(secret)
    assert (decision.limits[0].used, decision.remaining) == (2, 0)
    assert shop.meter.quota("acme")[0].remaining == 0
    assert not shop.consume(secret).allowed


def test_rates_per_key_and_line(shop: Any) -> None:
    first = shop.open_account(
        Limit(metric="requests", rate="1/hour", scope="key", line="a"), Limit(metric="requests", rate="3/hour")
    )
    second = shop.meter.keys.create("acme").secret
    answers = [shop.consume(key, line=line).allowed for key, line in [(first, "a"), (first, "a"), (second, "a")]]
    assert answers == [True, False, True]
    assert [shop.consume(first, line="b").allowed for _ in range(2)] == [True, False]


def test_two_bursts_on_one_rate_share_its_counter(shop: Any, clock: Any) -> None:
    secret = shop.open_account(
        Limit(metric="requests", rate="60/minute", burst=2), Limit(metric="requests", rate="60/minute", burst=5)
    )
    assert [shop.consume(secret).allowed for _ in range(3)] == [True, True, False]
    assert shop.kept("rate_counters") == 1
    clock.advance(seconds=2)
    assert [shop.consume(secret).allowed for _ in range(3)] == [True, True, False]


def test_a_hold_takes_from_a_rate_and_gives_back_what_it_did_not_use(shop: Any) -> None:
    secret = shop.open_account(Limit(metric="tokens", rate="60/minute", burst=60))
    hold = shop.reserve(secret, 50)
    assert not shop.consume(secret, 11).allowed
    hold.settle(TokenUsage(input_tokens=20))
    assert shop.consume(secret, 40).allowed
    assert not shop.consume(secret, 1).allowed


def test_a_hold_that_cost_more_slows_the_rate_down(shop: Any, clock: Any) -> None:
    secret = shop.open_account(Limit(metric="tokens", rate="60/minute", burst=60))
    hold = shop.reserve(secret, 10)
    clock.advance(minutes=10)
    hold.settle(TokenUsage(input_tokens=100))
    [status] = shop.meter.quota("acme")
    assert (status.used, status.overrun, status.remaining) == (90, 30, 0)
    assert shop.consume(secret, 1).refused_by.retry_after_s == 31


def test_a_late_release_gives_no_burst_twice(shop: Any, clock: Any) -> None:
    """The rate has refilled since, whether or not the hold used what it took."""
    secret = shop.open_account(Limit(metric="requests", rate="60/minute", burst=10))
    holds = [shop.reserve(secret) for _ in range(10)]
    clock.advance(seconds=20)
    assert [shop.consume(secret).allowed for _ in range(11)] == [True] * 10 + [False]
    for hold in holds:
        hold.release()
    assert not shop.consume(secret).allowed
    clock.advance(seconds=1)
    assert [shop.consume(secret).allowed for _ in range(2)] == [True, False]


def test_another_rate_starts_empty(shop: Any) -> None:
    secret = shop.open_account(Limit(metric="requests", rate="1/hour"))
    shop.consume(secret)
    assert not shop.consume(secret).allowed
    shop.set_plan("acme", Limit(metric="requests", rate="2/hour"))
    assert [shop.consume(secret).allowed for _ in range(3)] == [True, True, False]


@pytest.mark.parametrize("rate", ["1/day", "1/second"])
def test_an_overrun_beyond_all_time_still_answers(shop: Any, rate: str) -> None:
    secret = shop.open_account(Limit(metric="tokens", rate=rate, burst=5))
    shop.reserve(secret, 5).settle(TokenUsage(input_tokens=2**53))
    refused = shop.consume(secret, 1)
    assert not refused.allowed
    assert refused.reset_at == datetime(9998, 1, 1, tzinfo=UTC)


calls = st.lists(st.tuples(st.integers(0, 90), st.integers(1, 4)), max_size=40)


@given(calls=calls, burst=st.integers(1, 6), as_kept=st.booleans())
def test_no_stretch_of_time_admits_more_than_burst_and_rate(
    calls: list[tuple[int, int]], burst: int, as_kept: bool
) -> None:
    limit = Limit(metric="requests", rate="2/minute", burst=burst)
    now, arrival = NOON, 0
    admitted: list[tuple[datetime, int]] = []
    for wait_s, asked in calls:
        now += timedelta(seconds=wait_s)
        kept = Decimal(arrival) if as_kept else arrival
        fits, status, after = check_rate(limit, kept, asked, now)
        probe, _, _ = check_rate(limit, after if fits else kept, int(status.remaining) or 1, now)
        assert probe == (status.remaining > 0), "remaining can be had at once, and no more"
        if fits:
            arrival = after
            admitted.append((now, asked))
    for start, (begin, _) in enumerate(admitted):
        for end, _ in admitted[start:]:
            units = sum(asked for at, asked in admitted[start:] if at <= end)
            assert units <= burst + (end - begin).total_seconds() / 30
