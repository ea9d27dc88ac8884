"""The meter's own words: what it refuses at the door, what it records, corrects and shows."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from decimal import Decimal, localcontext
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

from metering import Limit, Meter, MeteringError, TokenUsage
from metering.errors import (
    InvalidEvent,
    InvalidPlan,
    InvalidSetting,
    InvalidUsage,
    UnknownAccount,
    UnknownKey,
    UnknownPlan,
)
from metering.testing import temporary_meter

if TYPE_CHECKING:
    from collections.abc import Callable

TABLES = ("accounts", "account_plans", "api_keys", "plan_versions", "events", "event_ids", "holds", "counters")


def written(meter: Meter) -> dict[str, int]:
    with meter.ledger.read() as connection:
        return {
            table: connection.exec_driver_sql(f"SELECT count(*) FROM {table}").scalar_one()
            for table in (*TABLES, "request_log", "replays", "admin_log")
        }


@pytest.fixture
def secret(meter: Meter) -> str:
    return meter.keys.create("acme", plan="pro").secret


BAD_QUANTITIES: list[tuple[Any, str]] = [
    (-1, "0 or more, below 10^18"),
    (Decimal("-0.1"), "0 or more, below 10^18"),
    (Decimal("NaN"), "a finite number"),
    (Decimal("sNaN"), "a finite number"),
    (Decimal("Infinity"), "a finite number"),
    (Decimal(10) ** 18, "0 or more, below 10^18"),
    (Decimal("0.1234567890123"), "at most 12 decimals"),
    (Decimal("123456789012345678.0000000000001"), "at most 12 decimals"),
    (True, "an int or a Decimal (a float is not exact)"),
    (0.1, "an int or a Decimal (a float is not exact)"),
    (float("nan"), "an int or a Decimal (a float is not exact)"),
    ("1", "an int or a Decimal (a float is not exact)"),
]


@pytest.mark.parametrize(("value", "expected"), BAD_QUANTITIES)
def test_a_quantity_that_cannot_be_is_named(meter: Meter, secret: str, value: Any, expected: str) -> None:
    before = written(meter)
    hold = meter.reserve(secret, line="a")
    calls: list[Callable[[], object]] = [
        lambda: meter.consume(secret, line="a", quantity=value),
        lambda: meter.reserve(secret, line="a", quantity=value),
        lambda: meter.record(account="acme", line="a", quantity=value),
        lambda: meter.correct(uuid4(), quantity=value, reason="r"),
        lambda: hold.settle(quantity=value),
    ]
    for call in calls:
        with pytest.raises(InvalidEvent) as caught:
            call()
        assert (caught.value.field, caught.value.expected) == ("quantity", expected)
        assert caught.value.value is value
        assert repr(value) in str(caught.value)
    hold.release()
    assert written(meter) == before | {"holds": 1, "counters": 1}


@pytest.mark.parametrize(
    "quantity", ["0", "-0", "0E-30", "1E+17", "123456789012345678.123456789012", "1.500000000000000"]
)
def test_quantities_keep_every_digit_in_any_context(meter: Meter, secret: str, quantity: str) -> None:
    with localcontext(prec=3):
        meter.consume(secret, line="a", quantity=Decimal(quantity))
        event = meter.usage("acme", by="line")[0]
    assert event.quantity == Decimal(quantity)
    assert event.quantity.is_zero() or not event.quantity.is_signed()


@pytest.mark.parametrize(
    ("counts", "field"),
    [
        ({"input_tokens": -1}, "input_tokens"),
        ({"output_tokens": 2**53 + 1}, "output_tokens"),
        ({"input_tokens": 1.0}, "input_tokens"),
        ({"input_tokens": True}, "input_tokens"),
        ({"input_tokens": Decimal(1)}, "input_tokens"),
        ({"input_tokens": float("nan")}, "input_tokens"),
        ({"input_tokens": 5, "cache_read_tokens": 6}, "cache_read_tokens"),
        ({"output_tokens": 5, "reasoning_tokens": 6}, "reasoning_tokens"),
        (
            {"input_tokens": 5, "cache_read_tokens": 3, "cache_write_tokens": 3},
            "cache_read_tokens + cache_write_tokens",
        ),
    ],
)
def test_token_counts_that_cannot_be_are_named(counts: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidUsage) as caught:
        TokenUsage(**counts)
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: got ")


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"line": ""}, "line"),
        ({"line": "x" * 65}, "line"),
        ({"line": "tab\there"}, "line"),
        ({"line": None}, "line"),
        ({"operation": "x" * 256}, "operation"),
        ({"idempotency_key": "x" * 256}, "idempotency_key"),
        ({"idempotency_key": ""}, "idempotency_key"),
        ({"idempotency_key": 5}, "idempotency_key"),
        ({"fingerprint": "x" * 256}, "fingerprint"),
        ({"model": "gpt\x00"}, "model"),
        ({"latency_ms": -1}, "latency_ms"),
        ({"latency_ms": 1.5}, "latency_ms"),
        ({"attributes": {"x": "y" * 4_090}}, "attributes"),
        ({"attributes": {"x": object()}}, "attributes"),
        ({"usage": {"input_tokens": 1}}, "usage"),
        ({"idempotency_key": "k", "request": object()}, "request"),
    ],
)
def test_a_description_that_cannot_be_kept_is_named(meter: Meter, secret: str, given: Any, field: str) -> None:
    before = written(meter)
    with pytest.raises(InvalidEvent) as caught:
        meter.consume(secret, **{"line": "a", **given})
    assert caught.value.field == field
    assert written(meter) == before


@pytest.mark.parametrize("api_key", [None, "", 5, b"tsk_0123456789abcdef"])
def test_what_is_no_api_key_is_not_shown(meter: Meter, secret: str, api_key: Any) -> None:
    for call in (meter.consume, meter.reserve):
        with pytest.raises(InvalidEvent, match=f"api_key: got '{type(api_key).__name__}'"):
            call(api_key, line="a")


def test_a_stranger_is_unknown_whatever_the_key_spells(meter: Meter, secret: str) -> None:
    for api_key in ("a", "application", "gpt-4.1-mini-2025-04-14"):
        with pytest.raises(UnknownKey):
            meter.consume(api_key, line="application", model="gpt-4.1-mini-2025-04-14")


NAIVE = datetime(2026, 3, 1)  # noqa: DTZ001  the point of the test


def test_times_without_a_zone_are_refused(meter: Meter, secret: str) -> None:
    before = written(meter)
    with pytest.raises(InvalidEvent, match=r"occurred_at: got .* this one has no time zone"):
        meter.record(account="acme", line="a", occurred_at=NAIVE)
    with pytest.raises(InvalidEvent, match="active_from"):
        meter.accounts.create("new", plan="pro", active_from=NAIVE)
    for name in ("start", "end"):
        with pytest.raises(InvalidSetting, match=f"{name}: got .* aware datetime"):
            meter.usage("acme", **{name: NAIVE})  # type: ignore[arg-type]
        with pytest.raises(InvalidSetting, match=f"{name}: got .* aware datetime"):
            meter.log("acme", **{name: NAIVE})  # type: ignore[arg-type]
    assert written(meter) == before


def test_unknown_plans_and_accounts_are_named_and_nothing_is_written(meter: Meter, secret: str) -> None:
    before = written(meter)
    with pytest.raises(UnknownPlan, match="plan 'gold' is not known; known plans: enterprise, free, premium, pro"):
        meter.keys.create("new", plan="gold")
    with pytest.raises(UnknownPlan):
        meter.accounts.change_plan("acme", "gold")
    for call in (meter.quota, meter.usage):
        with pytest.raises(UnknownAccount, match="account 'nobody' is not known"):
            call("nobody")
    with pytest.raises(UnknownAccount):
        meter.record(account="nobody", line="a")
    assert written(meter) == before


def test_limits_in_money_are_for_later() -> None:
    with pytest.raises(InvalidPlan, match="limits in money come in a later version"):
        Limit(metric="spend", per="month", max=Decimal(5))


def test_record_never_raises_but_in_tests(
    open_meter: Callable[..., Meter], caplog: pytest.LogCaptureFixture, clock: Any
) -> None:
    meter = open_meter(strict_signals=False)
    meter.keys.create("acme", plan="pro")
    drops: list[dict[str, Any]] = [
        {"account": "nobody"},
        {"account": None},
        {"line": ""},
        {"quantity": -1},
        {"caller_type": "robot"},
        {"occurred_at": datetime(1969, 12, 31, tzinfo=UTC)},
        {"usage": "five"},
        {"no_such": 1},
        {"requests": -1},
        {"counted": True},
    ]
    for drop in drops:
        assert meter.record(**{"account": "acme", "line": "a", **drop}) is False
    assert meter.dropped == len(drops)
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * len(drops)
    assert meter.record(account="acme", line="a", quantity=3, run_id="r", occurred_at=clock.now - timedelta(days=40))
    [total] = meter.usage("acme")
    assert (total.requests, total.quantity) == (1, 3)
    assert meter.dropped == len(drops)


def test_usage_is_summed_by_what_is_asked(meter: Meter, secret: str, clock: Any) -> None:
    for line, model, tokens in [("a", "m", 1), ("a", "n", 2), ("b", None, 4)]:
        meter.consume(secret, line=line, model=model, usage=TokenUsage(input_tokens=tokens))
        clock.advance(hours=8)
    assert [(total.group, total.input_tokens) for total in meter.usage("acme", by="line")] == [("a", 3), ("b", 4)]
    by_model = {total.group: total.requests for total in meter.usage("acme", by="model")}
    assert by_model == {"m": 1, "n": 1, None: 1}
    by_day = [(total.group, total.requests) for total in meter.usage("acme", by="day")]
    assert by_day == [("2026-03-12", 2), ("2026-03-13", 1)]
    start = datetime(2026, 3, 12, 20, tzinfo=UTC)
    assert meter.usage("acme", start=start)[0].requests == 2
    assert meter.usage("acme", end=start)[0].requests == 1
    with pytest.raises(InvalidSetting, match="by: got 'colour'"):
        meter.usage("acme", by="colour")  # type: ignore[arg-type]


def test_the_log_shows_the_newest_first(meter: Meter, secret: str, clock: Any) -> None:
    for number in range(3):
        meter.consume(secret, line="a", request={"n": number}, response=[number], error="e", latency_ms=number)
        clock.advance(seconds=1)
    entries = meter.log("acme", limit=2)
    assert [entry.request for entry in entries] == [{"n": 2}, {"n": 1}]
    assert (entries[0].response, entries[0].error, entries[0].latency_ms) == ([2], "e", 2)
    assert entries == meter.log(key_id=meter.authenticate(secret).key_id, limit=2)
    assert meter.log("acme", start=clock.now) == []
    for bad in ({"limit": 0}, {"account": None}):
        with pytest.raises(InvalidSetting):
            meter.log(**{"account": "acme", **bad})


def test_a_large_body_is_cut_with_a_mark(meter: Meter, secret: str) -> None:
    meter.consume(secret, line="a", request={"text": "é" * 40_000}, response="x" * 65_534)
    [entry] = meter.log("acme")
    assert entry.request["cut"] is True
    assert entry.request["bytes"] == 80_011
    assert entry.request["start"].startswith('{"text":"ééé')
    assert entry.response == "x" * 65_534


class Broken:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    __str__ = __repr__


@pytest.mark.parametrize("body", [{1, 2}, {"a": float("nan")}, {(1, 2): 3}, "\udcff", Broken(), [Broken()], b"\xff"])
def test_a_body_that_json_cannot_say_stops_nothing(meter: Meter, secret: str, body: Any) -> None:
    assert meter.consume(secret, line="a", request=body, response=body, idempotency_key=None).allowed
    assert len(meter.log("acme")) == 1


@pytest.mark.parametrize(
    "error", ["bad name \udcff", Broken(), ValueError("\udcff"), ValueError(Broken()), "x" * 9_999]
)
def test_an_error_that_text_cannot_say_stops_nothing(meter: Meter, secret: str, error: Any) -> None:
    assert meter.consume(secret, line="a", error=error).allowed
    [entry] = meter.log("acme")
    assert entry.error is not None
    assert len(entry.error) <= 2_000


def test_a_temporary_meter_is_strict_and_leaves_nothing(clock: Any) -> None:
    plans = '[plans.mine]\nretention_days = 1\nlimits = [{ metric = "requests", per = "day", max = 1 }]\n'
    with temporary_meter(plans, clock=clock) as meter:
        folder = meter.ledger.path.parent
        secret = meter.keys.create("acme", plan="mine").secret
        assert [meter.consume(secret, line="a").allowed for _ in range(2)] == [True, False]
        clock.advance(days=1)
        assert meter.consume(secret, line="a").allowed
        with pytest.raises(UnknownAccount):
            meter.record(account="nobody", line="a")
    assert not folder.exists()
    with temporary_meter() as meter:
        assert meter.keys.create("acme", plan="free").plan == "free"
    with pytest.raises(MeteringError, match="plans"), temporary_meter("plans = 5"):
        pass
