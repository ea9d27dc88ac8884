"""Frozen inputs, adjustments, voids and credit notes: the rules alone, on any usage."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metering.billing.closing import (
    PeriodInputs,
    adjustments,
    billed_parts,
    composed,
    credit_note,
    numbered,
    voided,
)
from metering.billing.invoices import UsageSum
from metering.errors import InvalidPlan, InvalidSetting
from metering.plans import Plan

PLANS = {
    1: Plan.from_dict(
        "old",
        {
            "retention_days": 1,
            "rates": [{"line": "*", "metric": "requests", "type": "per_unit", "unit_amount": "0.00333"}],
        },
    ),
    2: Plan.from_dict(
        "new",
        {
            "retention_days": 1,
            "base_fee": "3.10",
            "minimum": "5",
            "rates": [
                {
                    "line": "*",
                    "metric": "input_tokens",
                    "type": "volume",
                    "tiers": [{"up_to": 100, "unit_amount": "0.017"}, {"unit_amount": "0.011"}],
                },
                {"line": "*", "metric": "quantity", "type": "package", "package_size": 7, "package_amount": "0.99"},
            ],
        },
    ),
}

ISSUED_AT = datetime(2023, 12, 5, 16, tzinfo=UTC)

rows = st.builds(
    UsageSum,
    plan_version=st.sampled_from([1, 2]),
    line=st.sampled_from(["a", "b"]),
    provider=st.none() | st.just("openai"),
    model=st.none() | st.sampled_from(["m", "n"]),
    service_tier=st.none(),
    requests=st.integers(0, 500),
    quantity=st.decimals(0, 50, places=3),
    input_tokens=st.integers(0, 300),
    cost=st.decimals(0, 5, places=12),
)
usages = st.lists(rows, max_size=4).map(tuple)


def inputs(usage: tuple[UsageSum, ...] = (), period: str = "2023-11", **said: Any) -> PeriodInputs:
    month = int(period[-2:])
    values = {
        "account": "acme",
        "name": "Acme \u00e9",
        "address": ("1 Road", "Town"),
        "time_zone": "UTC",
        "active_from": None,
        "period_start": datetime(2023, month, 1, tzinfo=UTC),
        "period_end": datetime(2023, month + 1, 1, tzinfo=UTC) if month < 12 else datetime(2024, 1, 1, tzinfo=UTC),
        "plan_version": 2,
        "plans": {version: plan.digest for version, plan in PLANS.items()},
        "price_versions": ("genai-prices 1",),
        "events": 3,
        "watermark": 7,
        "last_seq": 9,
        **said,
    }
    return PeriodInputs(period=period, usage=usage, **values)


@given(usages, st.none() | st.datetimes(timezones=st.just(UTC)))
def test_what_is_frozen_is_read_back(usage: tuple[UsageSum, ...], active_from: datetime | None) -> None:
    frozen = inputs(usage, active_from=active_from)
    again = PeriodInputs.from_json(frozen.to_json())
    assert again == frozen
    assert (again.to_json(), again.digest) == (frozen.to_json(), frozen.digest)
    assert composed(again, (), PLANS, {}) == composed(frozen, (), PLANS, {})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"usage": 3}', inputs().to_json().replace("2023-11-01", "soon")])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(InvalidSetting, match=r"what PeriodInputs\.to_json wrote"):
        PeriodInputs.from_json(text)


@given(st.lists(usages, min_size=1, max_size=5), st.data())
def test_the_documents_of_a_period_add_up_to_its_price(stages: list[tuple[UsageSum, ...]], data: st.DataObject) -> None:
    """Whatever is known at each close, with voids and credit notes in between."""
    billed: dict[str, dict[str, Decimal]] = {"2023-11": {}}

    def issue(*documents: Any) -> None:
        for document in documents:
            issued.append(numbered(document, f"INV-{len(issued):06d}", ISSUED_AT))
            for period, item_id, amount in billed_parts(issued[-1]):
                of_period = billed.setdefault(period, {})
                of_period[item_id] = of_period.get(item_id, Decimal(0)) + amount

    issued: list[Any] = []
    issue(*composed(inputs(stages[0]), (), PLANS, billed))
    for usage in stages[1:]:
        known = inputs(usage)
        if data.draw(st.booleans()) and not any(each.kind == "void" for each in issued):
            issue(voided(issued[0]))
        if data.draw(st.booleans()):
            note = credit_note(issued[0], known, PLANS, billed["2023-11"])
            if note.total < 0:
                issue(note)
                assert adjustments(known, PLANS, billed["2023-11"])[1] == ()
        issue(*composed(inputs(period="2023-12"), (known,), PLANS, billed))
        [whole] = composed(known, (), PLANS, {})
        assert sum(billed["2023-11"].values()) == whole.total
        assert adjustments(known, PLANS, billed["2023-11"])[1] == ()


def test_a_plan_that_is_not_the_frozen_one_is_refused() -> None:
    for plans in ({1: PLANS[1]}, {**PLANS, 2: replace(PLANS[2], base_fee=Decimal(4))}):
        with pytest.raises(InvalidPlan, match="plan version 2 is not the one that 2023-11 was priced with"):
            composed(inputs(), (), plans, {})


def test_what_is_no_longer_due_is_given_back_by_its_name() -> None:
    _, items = adjustments(
        inputs(), PLANS, {"base_fee": Decimal("3.10"), "minimum": Decimal("1.90"), "v9/rates/0": Decimal("2.00")}
    )
    [gone] = items
    assert (gone.item_id, gone.amount, gone.already_billed) == ("2023-11/v9/rates/0", Decimal("-2.00"), Decimal("2.00"))
    assert gone.description == "2023-11: v9/rates/0 is no longer due"


def test_a_document_is_issued_on_the_local_date() -> None:
    [draft] = composed(inputs(time_zone="Asia/Tokyo"), (), PLANS, {})
    assert str(draft.issued_on) == "2023-12-01"
    assert str(numbered(draft, "INV-000001", ISSUED_AT).issued_on) == "2023-12-06"
