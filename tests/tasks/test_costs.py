"""What the provider charges: exact, once per event, and taken back exactly."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metering.events import TOKEN_FIELDS, TokenUsage
from metering.ledger import Ledger
from tasks import costs
from tests.tasks.place import NOVEMBER, Place, event

if TYPE_CHECKING:
    from collections.abc import Mapping


@pytest.fixture
def ledger_url(either_url: str) -> str:
    return either_url


def row(**said: Any) -> Mapping[str, Any]:
    return {
        **dict.fromkeys(TOKEN_FIELDS, 0),
        "platform_paid": True,
        "provider": "openai",
        "model": "gpt-4.1",
        "service_tier": None,
        "occurred_at": NOVEMBER,
        **said,
    }


def test_a_price_is_exact() -> None:
    # gpt-4.1: 2.00 USD per million in, 0.50 from the cache, 8.00 out.
    event = row(input_tokens=1_000_003, cache_read_tokens=1, output_tokens=7)
    assert costs.provider_cost(event) == Decimal("2.000004500000") + Decimal("0.000056")
    assert costs.provider_cost(row(input_tokens=1)) == Decimal("0.000002")


@pytest.mark.parametrize(
    ("said", "cost"),
    [
        ({"input_tokens": 5, "platform_paid": False}, Decimal(0)),
        ({}, Decimal(0)),
        ({"model": None}, Decimal(0)),
        ({"input_tokens": 5, "model": None}, None),
        ({"input_tokens": 5, "model": "mystery"}, None),
        ({"input_tokens": 5, "provider": "nobody"}, None),
        ({"input_tokens": 5, "model": "", "provider": None}, None),
    ],
)
def test_what_costs_nothing_and_what_has_no_price(said: dict[str, Any], cost: Decimal | None) -> None:
    assert costs.provider_cost(row(**said)) == cost


def test_usage_that_cannot_be_told_apart_has_no_price_and_stops_nothing() -> None:
    overlapping = row(
        provider="google", model="gemini-2.5-flash", input_tokens=100, cache_read_tokens=50, input_audio_tokens=60
    )
    assert costs.provider_cost(overlapping) is None


@given(st.data())
def test_no_usage_that_may_enter_stops_the_costing(data: st.DataObject) -> None:
    total, out = data.draw(st.integers(0, 2**53)), data.draw(st.integers(0, 2**53))
    read = data.draw(st.integers(0, total))
    usage = TokenUsage(
        input_tokens=total,
        cache_read_tokens=read,
        cache_write_tokens=data.draw(st.integers(0, total - read)),
        input_audio_tokens=data.draw(st.integers(0, total)),
        output_tokens=out,
        output_audio_tokens=data.draw(st.integers(0, out)),
    )
    models = [("openai", "gpt-4.1"), ("google", "gemini-2.5-flash"), ("anthropic", "claude-sonnet-4-5"), (None, "x")]
    provider, model = data.draw(st.sampled_from(models))
    tier = data.draw(st.sampled_from([None, "flex", "no such tier"]))
    cost = costs.provider_cost(row(provider=provider, model=model, service_tier=tier, **usage.to_dict()))
    assert cost is None or (cost >= 0 and cost.as_tuple().exponent >= -12)


def booked(place: Place) -> list[tuple[Any, ...]]:
    return place.ledger_rows("SELECT seq, cost, price_version, costed_at FROM event_costs ORDER BY seq")


def test_each_event_is_costed_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "EVENTS_PER_COMMIT", 3)
    place.account("acme")
    place.add(*(event() for _ in range(7)))
    assert place.cost() == 7
    first = booked(place)
    assert [(seq, cost) for seq, cost, _, _ in first] == [(seq, "0.0028") for seq in range(1, 8)]
    assert place.cost() == 0
    place.add(event())
    monkeypatch.setattr(costs, "price_version", lambda: "prices of tomorrow")
    assert place.cost() == 1
    assert booked(place)[:7] == first
    assert booked(place)[7][2] == "prices of tomorrow"


def test_two_costings_at_once_cost_each_event_once(place: Place) -> None:
    place.account("acme")
    place.add(event(), event())
    ledger = Ledger(place.ledger_url)
    slow = costs._next_costs(ledger)
    place.add(event())
    assert place.cost() == 3
    before = booked(place)
    assert costs._book(ledger, slow, datetime(2024, 1, 1, tzinfo=UTC)) == 0
    ledger.close()
    assert booked(place) == before


def test_admissions_do_not_wait_while_prices_are_looked_up(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.account("acme")
    place.add(event())

    def slow_price(_: Mapping[str, Any]) -> Decimal:
        other = Ledger(place.ledger_url, timeout_s=0.2)
        with other.write() as connection:  # raises StoreUnavailable if the costing held the ledger
            connection.exec_driver_sql("UPDATE accounts SET name = 'Acme'")
        other.close()
        return Decimal(1)

    monkeypatch.setattr(costs, "provider_cost", slow_price)
    assert place.cost() == 1


@pytest.mark.parametrize("costed_between", [True, False])
@pytest.mark.parametrize(
    ("model", "tokens", "cost"), [("gpt-4.1", 1_000, "0.002"), ("mystery", 1_000, None), (None, 0, "0")]
)
def test_a_reversal_takes_back_what_was_booked(
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    costed_between: bool,
    model: str | None,
    tokens: int,
    cost: str | None,
) -> None:
    place.account("acme")
    original = event(model=model, provider=None, usage=TokenUsage(input_tokens=tokens), quantity=Decimal(1))
    place.add(original)
    if costed_between:
        place.cost()
    with place.meter() as meter:
        usage = TokenUsage(input_tokens=1)
        first = meter.correct(original.event_id, usage=usage, model="gpt-4.1", reason="recounted")
        if costed_between:
            monkeypatch.setattr(costs, "provider_cost", lambda _: Decimal(5))  # prices went up
            place.cost()
        assert first.replacement is not None
        meter.correct(first.replacement, usage=TokenUsage(input_tokens=2), reason="recounted again")
    place.cost()
    negated = cost if cost in (None, "0") else f"-{cost}"
    corrected = ("5", "-5", "5") if costed_between else ("0.000002", "-0.000002", "0.000004")
    assert [row[1] for row in booked(place)] == [cost, negated, *corrected]


NAMED = """
[plans.named]
retention_days = 1
unknown_price = "openai:gpt-4.1-mini"
"""


def test_a_named_price_stands_in_and_the_ledger_says_so(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "price_version", lambda: "genai-prices 9")
    place.account("strict")
    place.plans(NAMED)
    place.account("acme", "named")
    million = TokenUsage(input_tokens=1_000_000)
    mystery = event(model="mystery", usage=million)
    unfit = TokenUsage(input_tokens=100, cache_read_tokens=50, input_audio_tokens=60)
    place.add(
        mystery,
        event(model=None, provider=None, usage=million),
        event(usage=million),
        event(provider="google", model="gemini-2.5-flash", usage=unfit),
        event("strict", model="mystery", usage=million),
        event(model="mystery", usage=million, platform_paid=False),
    )
    place.cost()
    with place.meter() as meter:
        meter.correct(mystery.event_id, usage=TokenUsage(input_tokens=500_000), reason="recounted")
    monkeypatch.setattr(costs, "price_version", lambda: "genai-prices 10")
    place.cost()
    assert [tuple(row[1:3]) for row in booked(place)] == [
        ("0.4", "genai-prices 9 as openai:gpt-4.1-mini"),
        ("0.4", "genai-prices 9 as openai:gpt-4.1-mini"),
        ("2", "genai-prices 9"),
        ("0.000025", "genai-prices 9 as openai:gpt-4.1-mini"),
        (None, "genai-prices 9"),
        ("0", "genai-prices 9"),
        ("-0.4", "genai-prices 9 as openai:gpt-4.1-mini"),  # what it takes back, as that was booked
        ("0.2", "genai-prices 10 as openai:gpt-4.1-mini"),
    ]


def test_a_named_price_is_known_or_not() -> None:
    assert costs.knows_price("openai:gpt-4.1-mini")
    assert not costs.knows_price("openai:gtp-4.1-mini")
    assert not costs.knows_price("nobody:gpt-4.1-mini")
