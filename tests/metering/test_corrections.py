"""A correction reverses exactly what was billed and books a full replacement; facts never change."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pytest

from metering import TokenUsage
from metering.admission.verify import check_counters
from metering.errors import CorrectionConflict, InvalidEvent, UnknownEvent
from metering.events import TOKEN_FIELDS
from metering.ledger import plan_versions
from metering.plans import Limit, Plan

if TYPE_CHECKING:
    from collections.abc import Iterator

    from metering import Meter

USAGE = TokenUsage(input_tokens=100, cache_read_tokens=40, output_tokens=30, reasoning_tokens=10)
NUMBERS = ("requests", *TOKEN_FIELDS)


@pytest.fixture(autouse=True)
def _counters_agree(meter: Meter) -> Iterator[None]:
    yield
    assert all(check.agrees for check in check_counters(meter.ledger))


@pytest.fixture
def billed(meter: Meter) -> UUID:
    limits = (
        Limit(metric="tokens", per="day", max=Decimal(1_000)),
        Limit(metric="requests", per="day", max=Decimal(9)),
    )
    with meter.ledger.write() as connection:
        plan_versions.apply(
            connection, [Plan(name="p", retention_days=1, limits=limits)], now=plan_versions.EVER, actor="test"
        )
    secret = meter.keys.create("acme", plan="p").secret
    quantity = Decimal("123456789012345678.000000000001")
    return meter.consume(
        secret, line="a", usage=USAGE, quantity=quantity, model="m", provider="p", run_id="r", idempotency_key="k"
    ).event_id


def rows(meter: Meter) -> list[dict[str, Any]]:
    with meter.ledger.read() as connection:
        return [dict(row) for row in connection.exec_driver_sql("SELECT * FROM events ORDER BY seq").mappings()]


def test_a_correction_is_a_reversal_and_a_replacement(meter: Meter, billed: UUID, clock: Any) -> None:
    clock.advance(days=2)
    correction = meter.correct(billed, usage=TokenUsage(input_tokens=90), reason="counted twice")
    original, reversal, replacement = rows(meter)
    assert (correction.original, correction.reversal, correction.replacement) == (
        billed,
        UUID(reversal["event_id"]),
        UUID(replacement["event_id"]),
    )
    assert all(reversal[name] == -original[name] for name in NUMBERS)
    assert reversal["quantity"] == "-" + original["quantity"]
    assert replacement["quantity"] == original["quantity"] == "123456789012345678.000000000001"
    assert (replacement["input_tokens"], replacement["cache_read_tokens"], replacement["output_tokens"]) == (90, 0, 0)
    for row in (reversal, replacement):
        assert (row["kind"], row["corrects"], row["reason"]) == ("correction", billed.hex, "counted twice")
        assert row["recorded_at"] == "2026-03-14T12:00:00.000000Z"
        same = ("account", "key_id", "line", "run_id", "occurred_at", "period", "plan_version", "counted", "model")
        assert [row[name] for name in same] == [original[name] for name in same]
    assert meter.usage("acme")[0].input_tokens == 90
    clock.advance(days=-2)
    assert [status.used for status in meter.quota("acme")] == [90, 1]


def test_the_same_correction_twice_is_one(meter: Meter, billed: UUID) -> None:
    first = meter.correct(billed, quantity=2, reason="r")
    again = meter.correct(billed, quantity=Decimal("2.0"), reason="r")
    assert again == first
    assert first.reversal is not None
    assert len(rows(meter)) == 3


def test_a_correction_that_changes_nothing_books_nothing(meter: Meter, billed: UUID) -> None:
    done = meter.correct(billed, billable=True, reason="r")
    assert (done.original, done.reversal, done.replacement) == (billed, None, None)
    assert len(rows(meter)) == 1


def test_another_correction_of_what_was_replaced_is_refused(meter: Meter, billed: UUID) -> None:
    first = meter.correct(billed, usage=TokenUsage(input_tokens=50), reason="one")
    with pytest.raises(CorrectionConflict, match=str(first.replacement)):
        meter.correct(billed, usage=TokenUsage(input_tokens=51), reason="two")
    assert first.reversal is not None
    with pytest.raises(CorrectionConflict, match="is a reversal"):
        meter.correct(first.reversal, usage=TokenUsage(input_tokens=51), reason="two")
    assert len(rows(meter)) == 3


def test_a_correction_of_a_correction_replaces_it(meter: Meter, billed: UUID) -> None:
    first = meter.correct(billed, usage=TokenUsage(input_tokens=50), reason="one")
    assert first.replacement is not None
    second = meter.correct(first.replacement, usage=TokenUsage(input_tokens=53), reason="two")
    assert second.original == billed
    assert meter.usage("acme")[0].input_tokens == 53
    assert meter.usage("acme")[0].requests == 1
    assert [status.used for status in meter.quota("acme")] == [53, 1]


def test_what_is_not_given_stays(meter: Meter, billed: UUID) -> None:
    meter.correct(billed, provider="q", model="n", billable=False, reason="r")
    original, reversal, replacement = rows(meter)
    assert (reversal["provider"], reversal["model"], reversal["billable"]) == ("p", "m", 1)
    assert (replacement["provider"], replacement["model"], replacement["billable"]) == ("q", "n", 0)
    assert all(replacement[name] == original[name] for name in (*NUMBERS, "quantity"))


def test_a_signal_that_asked_no_limits_moves_none(meter: Meter, billed: UUID) -> None:
    assert meter.record(account="acme", line="a", usage=USAGE, idempotency_key="s")
    signal = UUID(rows(meter)[-1]["event_id"])
    meter.correct(signal, usage=TokenUsage(), reason="r")
    assert [status.used for status in meter.quota("acme")] == [130, 1]


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"event_id": "not-a-uuid"}, "event_id"),
        ({"usage": {"input_tokens": 1}}, "usage"),
        ({"quantity": 1.5}, "quantity"),
        ({"model": ""}, "model"),
        ({"provider": 5}, "provider"),
        ({"billable": "no"}, "billable"),
        ({"reason": ""}, "reason"),
        ({"reason": None}, "reason"),
    ],
)
def test_a_correction_that_cannot_be_is_named(meter: Meter, billed: UUID, given: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidEvent) as caught:
        meter.correct(**{"event_id": billed, "reason": "r", **given})
    assert caught.value.field == field
    assert len(rows(meter)) == 1


def test_what_is_not_there_cannot_be_corrected(meter: Meter) -> None:
    missing = uuid4()
    with pytest.raises(UnknownEvent, match=f"event {missing} is not in the ledger"):
        meter.correct(missing, quantity=1, reason="r")
