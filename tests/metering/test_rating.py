from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metering.billing.invoices import UsageSum
from metering.billing.rating import claims, metric_of
from metering.errors import AmbiguousRate
from metering.events import METRICS
from metering.plans import Plan


def usage(**more: Any) -> UsageSum:
    given_values: dict[str, Any] = {
        "plan_version": 1,
        "line": "application",
        "provider": "openai",
        "model": "gpt-4.1-mini",
        "service_tier": None,
        "requests": 1,
        "quantity": Decimal(0),
        "cost": Decimal(0),
    }
    return UsageSum(**given_values | more)


def plan(*rates: dict[str, Any]) -> Plan:
    priced = [{"metric": "output_tokens", "type": "per_unit", "unit_amount": "1"} | rate for rate in rates]
    return Plan.from_dict("pro", {"retention_days": 1, "rates": priced})


def claimed_by(rates: list[dict[str, Any]], row: UsageSum) -> int | None:
    """The index of the one rate that claims all of `row`."""
    by_rate = {claim.index: claim.quantity for claim in claims(plan(*rates), [row]) if claim.quantity}
    assert len(by_rate) <= 1
    return next(iter(by_rate), None)


@pytest.mark.parametrize(
    ("rates", "winner"),
    [
        ([{}], 0),
        ([{}, {"line": "application"}], 1),
        ([{"line": "other"}], None),
        ([{"match": {"model": "gpt-4*"}}, {"match": {"model": "gpt-4.1*"}}], 1),
        ([{"match": {"model": "gpt-4.1-mini"}}, {"match": {"model": "gpt-4.1-mini*"}}], 0),
        ([{"match": {"model": "*"}}, {}], 0),
        ([{"match": {"model": "gpt-[45].1-????"}}, {"match": {"model": "gpt-*"}}], 0),
        ([{"match": {"model": "GPT-4.1-mini"}}], None),
        ([{"match": {"provider": "openai"}}, {"match": {"provider": "openai", "model": "gpt-*"}}], 1),
        ([{"match": {"provider": "azure"}}, {}], 1),
        ([{"match": {"service_tier": "flex"}}, {}], 1),
        (
            [{"line": "application"}, {"line": "application", "match": {"model": "gpt-*"}}, {"match": {"model": "g*"}}],
            1,
        ),
    ],
)
def test_the_most_specific_rate_wins(rates: list[dict[str, Any]], winner: int | None) -> None:
    assert claimed_by(rates, usage(output_tokens=10)) == winner


def test_usage_that_does_not_say_matches_no_rate_that_asks() -> None:
    row = usage(model=None, provider=None, output_tokens=10)
    assert claimed_by([{"match": {"model": "*"}}, {"match": {"provider": "openai"}}], row) is None
    assert claimed_by([{}], row) == 0


@pytest.mark.parametrize(
    ("one", "another"),
    [
        ({"line": "application"}, {"match": {"model": "gpt-4.1-mini"}}),
        ({"match": {"provider": "openai"}}, {"match": {"model": "gpt-*"}}),
        ({"match": {"model": "gpt-*"}}, {"match": {"model": "*mini"}}),
    ],
)
def test_an_overlap_that_nothing_decides_is_an_error(one: dict[str, Any], another: dict[str, Any]) -> None:
    with pytest.raises(AmbiguousRate) as caught:
        claims(plan({}, one, another), [usage(output_tokens=10)])
    message = str(caught.value)
    for part in ("'pro'", "rates[1]", "rates[2]", "output_tokens", "'application'", "'gpt-4.1-mini'"):
        assert part in message


def test_a_rate_above_both_settles_an_overlap() -> None:
    rates: list[dict[str, Any]] = [
        {"line": "application"},
        {"match": {"model": "gpt-*"}},
        {"line": "application", "match": {"model": "gpt-*"}},
    ]
    assert claimed_by(rates, usage(output_tokens=10)) == 2


def test_an_overlap_over_nothing_is_no_error() -> None:
    rates: list[dict[str, Any]] = [{"line": "application"}, {"match": {"model": "gpt-*"}}]
    assert claimed_by(rates, usage(output_tokens=0, input_tokens=5)) is None


def test_metrics_do_not_compete() -> None:
    document = [{"metric": "requests"}, {"metric": "tokens"}, {"metric": "output_tokens", "line": "application"}]
    rows = [usage(requests=2, input_tokens=5, output_tokens=7), usage(line="other", requests=1, output_tokens=1)]
    assert [claim.quantity for claim in claims(plan(*document), rows)] == [3, 13, 7]


def test_cost_plus_claims_cost_and_says_what_has_no_price() -> None:
    document = {
        "retention_days": 1,
        "rates": [
            {"type": "cost_plus", "markup_percent": 20},
            {"type": "cost_plus", "markup_percent": 30, "match": {"provider": "anthropic"}},
            {"type": "flat", "amount": "9"},
        ],
    }
    rows = [
        usage(cost=Decimal("1.5"), unpriced_requests=2),
        usage(provider="anthropic", cost=Decimal("0.25")),
        usage(provider="anthropic", model="new", cost=Decimal(0), unpriced_requests=1),
    ]
    found = claims(Plan.from_dict("pro", document), rows)
    assert [(claim.quantity, claim.unpriced_requests) for claim in found] == [
        (Decimal("1.5"), 2),
        (Decimal("0.25"), 1),
        (0, 0),
    ]


def test_sums_keep_every_digit() -> None:
    rows = [usage(quantity=Decimal("99999999999999999999999999")), usage(quantity=Decimal("0.000000000001"))]
    (claim,) = claims(plan({"metric": "quantity"}), rows)
    assert str(claim.quantity) == "99999999999999999999999999.000000000001"


def test_every_metric_can_be_read_from_a_sum() -> None:
    row = usage(
        requests=1,
        quantity=Decimal("2.5"),
        input_tokens=100,
        cache_read_tokens=30,
        cache_write_tokens=20,
        cache_write_1h_tokens=5,
        input_audio_tokens=3,
        output_tokens=40,
        reasoning_tokens=10,
        output_audio_tokens=2,
    )
    assert {metric: metric_of(row, metric) for metric in METRICS} == {
        "requests": 1,
        "quantity": Decimal("2.5"),
        "tokens": 140,
        "uncached_input_tokens": 50,
        "input_tokens": 100,
        "cache_read_tokens": 30,
        "cache_write_tokens": 20,
        "cache_write_1h_tokens": 5,
        "input_audio_tokens": 3,
        "output_tokens": 40,
        "reasoning_tokens": 10,
        "output_audio_tokens": 2,
    }


SELECTORS = st.fixed_dictionaries(
    {"line": st.sampled_from(["*", "application", "other"])},
    optional={
        "match": st.fixed_dictionaries(
            {},
            optional={
                "provider": st.sampled_from(["openai", "azure"]),
                "model": st.sampled_from(["*", "gpt-*", "gpt-4*", "*-mini", "gpt-4.1-mini"]),
                "service_tier": st.sampled_from(["flex"]),
            },
        )
    },
)


def same_selector(rate: dict[str, Any]) -> str:
    return repr((rate["line"], sorted(rate.get("match", {}).items())))


@given(
    st.lists(SELECTORS, min_size=1, max_size=6, unique_by=same_selector).flatmap(
        lambda rates: st.tuples(st.just(rates), st.permutations(rates))
    ),
    st.sampled_from(["application", "other"]),
    st.sampled_from(["openai", "azure", None]),
    st.sampled_from(["gpt-4.1-mini", "gpt-5", "claude", None]),
    st.sampled_from(["flex", None]),
)
def test_the_order_of_rates_decides_nothing(
    both: tuple[list[dict[str, Any]], list[dict[str, Any]]],
    line: str,
    provider: str | None,
    model: str | None,
    service_tier: str | None,
) -> None:
    row = usage(line=line, provider=provider, model=model, service_tier=service_tier, output_tokens=10)

    def winner(rates: list[dict[str, Any]]) -> object:
        try:
            index = claimed_by(rates, row)
        except AmbiguousRate:
            return "ambiguous"
        return None if index is None else rates[index]

    assert winner(both[0]) == winner(both[1])
