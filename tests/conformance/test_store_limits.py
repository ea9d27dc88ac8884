"""Every limit, all or nothing, each in its window."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest

from metering.errors import InvalidEvent, LimitExceeded
from metering.events import TokenUsage
from metering.plans import Limit

if TYPE_CHECKING:
    from collections.abc import Callable


def test_exactly_the_limit_is_admitted(shop: Any, requests_limit: Callable[..., Limit]) -> None:
    secret = shop.open_account(requests_limit(3))
    decisions = [shop.consume(secret) for _ in range(5)]
    assert [decision.allowed for decision in decisions] == [True, True, True, False, False]
    assert [decision.remaining for decision in decisions] == [2, 1, 0, 0, 0]
    assert shop.used() == [3]
    assert shop.count("events") == 3


def test_a_refusal_says_what_why_and_until_when(shop: Any, requests_limit: Callable[..., Limit]) -> None:
    limit = requests_limit(1)
    secret = shop.open_account(limit)
    shop.consume(secret)
    refused = shop.consume(secret)
    assert refused.refused_by is not None
    assert refused.refused_by.limit == limit
    assert (refused.refused_by.used, refused.refused_by.max, refused.refused_by.asked) == (1, 1, 1)
    assert refused.reset_at == datetime(2026, 4, 1, tzinfo=UTC)
    assert refused.refused_by.retry_after_s == 19.5 * 86_400
    with pytest.raises(LimitExceeded, match=r"asked 1, used 1 of 1; resets at 2026-04-01") as caught:
        refused.raise_for_refusal()
    assert (caught.value.used, caught.value.max, caught.value.remaining) == (1, 1, 0)
    assert caught.value.decision is refused


def test_a_refusal_writes_nothing(shop: Any, requests_limit: Callable[..., Limit]) -> None:
    secret = shop.open_account(
        requests_limit(10),
        Limit(metric="requests", rate="60/minute", burst=10),
        Limit(metric="input_tokens", per="day", max=100),
    )
    shop.consume(secret, 90)
    rows, counters = shop.written(), shop.counters()

    refused = shop.consume(secret, 11, idempotency_key="k", request={}, response={}, error="e")

    assert not refused.allowed
    assert (shop.written(), shop.counters()) == (rows, counters)
    assert [status.used for status in refused.limits] == [1, 1, 90], "where each limit stands, with nothing counted"
    assert [status.remaining for status in refused.limits] == [9, 9, 10]
    assert shop.consume(secret, 10).allowed


def test_what_can_never_fit_has_no_time_to_wait(shop: Any) -> None:
    secret = shop.open_account(
        Limit(metric="tokens", per="hour", max=100), Limit(metric="tokens", rate="10/second", burst=50)
    )
    refused = shop.consume(secret, 101)
    assert refused.refused_by.retry_after_s is None
    assert [status.retry_after_s for status in refused.limits] == [None, None]
    between = shop.consume(secret, 80)
    assert between.refused_by.limit.rate == "10/second"


def test_of_several_refusals_the_longest_is_told(shop: Any, requests_limit: Callable[..., Limit]) -> None:
    secret = shop.open_account(requests_limit(1, "minute"), requests_limit(1, "day"), requests_limit(1, "hour"))
    shop.consume(secret)
    assert shop.consume(secret).refused_by.limit.per == "day"


def test_the_tightest_limit_is_the_one_with_the_least_share_left(shop: Any, requests_limit: Any) -> None:
    secret = shop.open_account(requests_limit(100), Limit(metric="tokens", per="day", max=1000))
    decision = shop.consume(secret, 100)
    assert decision.tightest.limit.metric == "tokens"
    assert (decision.remaining, decision.reset_at) == (900, datetime(2026, 3, 13, tzinfo=UTC))
    unlimited = shop.consume(shop.open_account(account="free"))
    assert (unlimited.tightest, unlimited.remaining, unlimited.reset_at) == (None, None, None)


def test_two_limits_on_one_counter_are_both_held_and_counted_once(shop: Any, requests_limit: Any, clock: Any) -> None:
    """The billing period of a UTC account that begins on the 1st is the calendar month."""
    secret = shop.open_account(requests_limit(3), requests_limit(2, "period"))
    assert [shop.consume(secret).allowed for _ in range(3)] == [True, True, False]
    assert shop.used() == [2, 2]
    assert shop.kept("counters") == 1


USAGE = TokenUsage(
    input_tokens=100,
    cache_read_tokens=40,
    cache_write_tokens=20,
    cache_write_1h_tokens=5,
    input_audio_tokens=7,
    output_tokens=30,
    reasoning_tokens=10,
    output_audio_tokens=3,
)


@pytest.mark.parametrize(
    ("metric", "amount"),
    [
        ("requests", 1),
        ("quantity", 6),
        ("tokens", 130),
        ("input_tokens", 100),
        ("uncached_input_tokens", 40),
        ("cache_read_tokens", 40),
        ("cache_write_tokens", 20),
        ("cache_write_1h_tokens", 5),
        ("input_audio_tokens", 7),
        ("output_tokens", 30),
        ("reasoning_tokens", 10),
        ("output_audio_tokens", 3),
    ],
)
def test_each_metric_counts_its_own(shop: Any, metric: str, amount: int) -> None:
    secret = shop.open_account(Limit(metric=metric, per="day", max=amount))
    assert shop.meter.consume(secret, line="a", usage=USAGE, quantity=6).allowed
    assert shop.used() == [amount]
    assert not shop.meter.consume(secret, line="a", usage=USAGE, quantity=6).allowed


def test_quantities_are_exact(shop: Any) -> None:
    secret = shop.open_account(Limit(metric="quantity", per="day", max=Decimal("0.3")))
    assert [shop.meter.consume(secret, line="a", quantity=Decimal("0.1")).allowed for _ in range(4)] == [True] * 3 + [
        False
    ]
    [status] = shop.meter.quota("acme")
    assert (status.used, status.remaining) == (Decimal("0.3"), 0)


def test_the_last_of_30_digits_counts(shop: Any) -> None:
    large = Decimal("999999999999999999")
    secret = shop.open_account(Limit(metric="quantity", per="day", max=large))
    assert shop.meter.consume(secret, line="a", quantity=Decimal("999999999999999998.999999999999")).allowed
    assert not shop.meter.consume(secret, line="a", quantity=Decimal("0.000000000002")).allowed
    assert shop.meter.consume(secret, line="a", quantity=Decimal("0.000000000001")).allowed
    assert shop.meter.quota("acme")[0].used == large
    assert [event["quantity"] for event in shop.events()] == ["999999999999999998.999999999999", "0.000000000001"]


def test_limits_per_key_and_per_account(shop: Any, requests_limit: Callable[..., Limit]) -> None:
    first = shop.open_account(requests_limit(3), requests_limit(2, scope="key"))
    second = shop.meter.keys.create("acme").secret
    assert [shop.consume(first).allowed for _ in range(3)] == [True, True, False]
    assert [shop.consume(second).allowed for _ in range(2)] == [True, False]
    assert shop.used() == [3]
    key_id = shop.meter.authenticate(second).key_id
    assert shop.used(key_id=key_id) == [3, 1]


def test_limits_of_one_line_leave_the_others_alone(shop: Any, requests_limit: Callable[..., Limit]) -> None:
    secret = shop.open_account(requests_limit(3), requests_limit(1, line="a"))
    assert [shop.consume(secret, line=line).allowed for line in "aabbb"] == [True, False, True, True, False]
    assert shop.used() == [3, 1]


def test_accounts_do_not_share(shop: Any, requests_limit: Callable[..., Limit]) -> None:
    acme, other = shop.open_account(requests_limit(1)), shop.open_account(requests_limit(1), account="other")
    assert [shop.consume(acme).allowed, shop.consume(other).allowed, shop.consume(acme).allowed] == [1, 1, 0]


@pytest.mark.parametrize(("per", "step"), [("minute", {"minutes": 1}), ("hour", {"hours": 1}), ("day", {"days": 1})])
def test_a_new_window_begins_empty(shop: Any, clock: Any, requests_limit: Any, per: str, step: Any) -> None:
    secret = shop.open_account(requests_limit(1, per))
    for _ in range(3):
        assert shop.consume(secret).allowed
        assert not shop.consume(secret).allowed
        clock.advance(**step)
    assert shop.used() == [0]


def test_what_is_recorded_asks_no_limit(shop: Any, requests_limit: Callable[..., Limit]) -> None:
    secret = shop.open_account(requests_limit(1))
    assert shop.meter.record(account="acme", line="a", idempotency_key="k")
    assert shop.meter.record(account="acme", line="a", idempotency_key="k")
    assert shop.meter.record(account="acme", line="a", caller_type="dashboard")
    assert shop.used() == [0]
    assert shop.count("events", "counted") == 0
    assert shop.count("events", "billable") == 1
    assert shop.consume(secret).allowed


@pytest.mark.parametrize(
    ("metric", "given", "field"),
    [
        ("tokens", {}, "usage"),
        ("output_tokens", {"quantity": 1}, "usage"),
        ("quantity", {"usage": USAGE}, "quantity"),
    ],
)
def test_a_limited_metric_must_be_stated(shop: Any, metric: str, given: Any, field: str) -> None:
    secret = shop.open_account(Limit(metric="requests", per="day", max=5), Limit(metric=metric, per="day", max=500))
    before = shop.written()
    with pytest.raises(InvalidEvent, match=f"{field}: got None, expected {metric}") as caught:
        shop.meter.consume(secret, line="a", **given)
    assert (caught.value.field, caught.value.value) == (field, None)
    assert shop.written() == before


def test_an_estimate_of_nothing_is_no_estimate(shop: Any) -> None:
    secret = shop.open_account(Limit(metric="output_tokens", per="day", max=500))
    assert shop.meter.consume(secret, line="a", usage=TokenUsage(input_tokens=3)).allowed
    with pytest.raises(InvalidEvent, match="estimate: got 0, expected output_tokens, at least 1"):
        shop.meter.reserve(secret, line="a", estimate=TokenUsage(input_tokens=3))
    assert shop.place.holds() == {}


def test_quota_tells_the_standing_without_asking(shop: Any, requests_limit: Callable[..., Limit]) -> None:
    secret = shop.open_account(requests_limit(5), Limit(metric="requests", rate="60/minute", burst=5))
    shop.meter.quota("acme")  # a store may keep what it counted
    before = shop.written()
    assert [status.remaining for status in shop.meter.quota("acme")] == [5, 5]
    assert shop.written() == before
    shop.consume(secret)
    monthly, rate = shop.meter.quota("acme")
    assert (monthly.used, monthly.max, monthly.remaining, monthly.asked) == (1, 5, 4, 0)
    assert (rate.used, rate.max, rate.remaining) == (1, 5, 4)
    assert monthly.retry_after_s is rate.retry_after_s is None
