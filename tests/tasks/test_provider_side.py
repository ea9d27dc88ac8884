"""What was metered against what providers report: per UTC day and model, and what is not judged."""

from __future__ import annotations

import json
import os
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest

from metering.events import TokenUsage
from metering.providers import Counts
from metering.providers.reports import ALL_MODELS, ProviderDay
from tasks.provider_reports import import_reports
from tasks.provider_side import provider_days
from tasks.warehouse import open_for_reading
from tests.metering.providers.pages import (
    activity,
    anthropic_bucket,
    completions,
    messages,
    openai_bucket,
    openai_cost,
    paged,
)
from tests.tasks.place import NOVEMBER, Place, event

if TYPE_CHECKING:
    from pathlib import Path

DAY = NOVEMBER.date()
LATER = datetime(2023, 12, 20, tzinfo=UTC)


def report(place: Place, provider: str, name: str, *results: Any, day: date = DAY, at: datetime = LATER) -> None:
    """Import what a provider reports of a day."""
    bucket = anthropic_bucket if provider == "anthropic" else openai_bucket
    page = {"data": list(results)} if provider == "openrouter" else paged(bucket(*results, day=day))
    path = place.home / "page.json"
    path.write_text(json.dumps(page))
    os.utime(path, (at.timestamp(), at.timestamp()))
    import_reports(place.ledger_url, [path], provider, name)


def report_tokens(place: Place, *results: Any, **said: Any) -> None:
    """All that OpenAI says of tokens: these completions, and no embeddings."""
    report(place, "openai", "usage", *results, **said)
    report(place, "openai", "embeddings", **said)


def said(model: str = "gpt-4.1-2025-04-14", **counts: Any) -> dict[str, Any]:
    """A row of completions that says input and output alone."""
    row = {"input_tokens": 1_000, "output_tokens": 100, "num_model_requests": 1, **counts}
    return {"model": model, **row}


def compared(place: Place, *, days: int = 1, **tolerance: Any) -> list[ProviderDay]:
    place.aggregate()
    exact = {"tolerance_tokens": 0, "tolerance_usd": Decimal(0), "tolerance_percent": Decimal(0), **tolerance}
    with open_for_reading(place.warehouse) as connection:
        return provider_days(place.ledger_url, connection, DAY, DAY + timedelta(days=days), **exact)


def verdicts(place: Place, **said: Any) -> dict[tuple[str, str | None], bool]:
    return {(found.provider, found.model): found.agrees for found in compared(place, **said)}


def test_every_call_on_the_platforms_key_counts(either_url: str, tmp_path: Path) -> None:
    place = Place.at(tmp_path / "home", either_url)
    place.account("acme")
    place.account("zeta")
    wrong = event(usage=TokenUsage(input_tokens=5))
    place.add(
        event(),
        event("zeta", model="gpt-4.1-2025-04-14", provider=None, billable=False, caller_type="internal"),
        event(usage=TokenUsage(input_tokens=10, cache_read_tokens=4), platform_paid=False),
        event(kind="signal", provider=None, model=None, usage=TokenUsage(input_tokens=7)),
        event(at=NOVEMBER + timedelta(days=1)),
        wrong,
    )
    with place.meter() as meter:
        meter.correct(wrong.event_id, usage=TokenUsage(input_tokens=1_000, cache_read_tokens=50), reason="recounted")
    report_tokens(
        place,
        said(input_cached_tokens=50),
        said(service_tier="flex", input_tokens=2_000, num_model_requests=2),
    )
    ours = Counts(
        requests=3,
        input_tokens=3_000,
        cache_read_tokens=50,
        cache_write_tokens=0,
        cache_write_1h_tokens=0,
        input_audio_tokens=0,
        output_tokens=200,
        reasoning_tokens=0,
        output_audio_tokens=0,
    )
    model = ProviderDay(
        day=DAY,
        provider="openai",
        model="gpt-4.1",
        ours=ours,
        theirs=Counts(requests=3, input_tokens=3_000, cache_read_tokens=50, output_tokens=200),
        difference=Counts(requests=0, input_tokens=0, cache_read_tokens=0, output_tokens=0),
        provisional=False,
        agrees=True,
    )
    whole, found = compared(place)
    assert found == model
    assert (whole.model, whole.ours, whole.theirs, whole.agrees) == (ALL_MODELS, ours, model.theirs, True)
    assert (whole.our_cost, whole.their_cost) == (None, None)


def test_signals_that_were_corrected_are_no_calls_either(place: Place) -> None:
    place.account("acme")
    signal = event(kind="signal", model=None, usage=TokenUsage(input_tokens=7))
    nameless = event(model=None, usage=TokenUsage(input_tokens=3))
    place.add(signal, nameless, event())
    with place.meter() as meter:
        meter.correct(signal.event_id, usage=TokenUsage(input_tokens=8), reason="recounted")
    report_tokens(place, said())
    assert [(found.model, found.ours.input_tokens, found.agrees) for found in compared(place)] == [
        (ALL_MODELS, 1_003, False),
        ("gpt-4.1", 1_000, True),
        (None, 3, False),
    ]


@pytest.mark.parametrize(
    ("theirs", "tolerance", "agrees"),
    [
        ({"input_tokens": 1_001}, {}, False),
        ({"input_tokens": 999}, {}, False),
        ({"input_tokens": 1_001}, {"tolerance_tokens": 1}, True),
        ({"input_tokens": 1_002}, {"tolerance_tokens": 1}, False),
        ({"input_tokens": 1_010}, {"tolerance_percent": Decimal(1)}, True),
        ({"output_tokens": 110}, {"tolerance_percent": Decimal(1)}, False),
        ({"output_tokens": 110}, {"tolerance_percent": Decimal(1), "tolerance_tokens": 10}, True),
        ({"input_cached_tokens": 1}, {}, False),
        ({"input_audio_tokens": 1, "num_model_requests": 9}, {}, True),  # shown, and not judged
    ],
)
def test_differences_and_what_is_tolerated(
    place: Place, theirs: dict[str, int], tolerance: dict[str, Any], agrees: bool
) -> None:
    place.account("acme")
    place.add(event())
    report_tokens(place, said(**theirs))
    whole, model = compared(place, **tolerance)
    assert (whole.agrees, model.agrees) == (agrees, agrees)
    [name] = [name for name in theirs if name in ("input_tokens", "output_tokens")] or [None]
    if name is not None:
        assert getattr(model.difference, name) == getattr(model.ours, name) - theirs[name]


def test_what_one_side_alone_knows_does_not_agree(place: Place) -> None:
    place.account("acme")
    place.add(event(), event(model="gpt-5"))
    report_tokens(place, said(), said("o3", input_tokens=2, output_tokens=0))
    found = {each.model: each for each in compared(place)}
    assert {model: each.agrees for model, each in found.items()} == {
        ALL_MODELS: False,
        "gpt-4.1": True,
        "gpt-5": False,
        "o3": False,
    }
    assert (found["gpt-5"].theirs, found["gpt-5"].difference.input_tokens) == (
        Counts(requests=0, input_tokens=0, output_tokens=0),
        1_000,
    )
    assert (found["o3"].ours.input_tokens, found["o3"].difference.input_tokens) == (0, -2)


def test_days_that_were_not_pulled_are_not_compared(place: Place) -> None:
    place.account("acme")
    place.add(event(), event(at=NOVEMBER + timedelta(days=1)), event(at=NOVEMBER + timedelta(days=2)))
    report_tokens(place, said(), day=DAY + timedelta(days=1), at=NOVEMBER + timedelta(days=3))
    report_tokens(place, day=DAY + timedelta(days=2))
    assert [(found.day.day, found.model, found.provisional, found.agrees) for found in compared(place, days=3)] == [
        (17, ALL_MODELS, True, True),
        (17, "gpt-4.1", True, True),
        (18, ALL_MODELS, False, False),
        (18, "gpt-4.1", False, False),
    ]


def test_what_a_report_that_is_missing_might_hold_is_not_judged(place: Place) -> None:
    place.account("acme")
    place.add(event(), event(model="text-embedding-3-small"), event(provider="azure"), event(provider="nobody"))
    report(place, "openai", "usage", said())
    assert verdicts(place) == {("openai", "gpt-4.1"): True}
    report(place, "openai", "embeddings", {"model": "text-embedding-3-small", "input_tokens": 1_000})
    found = {each.model: each for each in compared(place)}
    assert found["text-embedding-3-small"].difference == Counts(input_tokens=0)
    # Our side has 100 tokens of output that the provider's embeddings say nothing of.
    assert [found[name].agrees for name in ("text-embedding-3-small", "gpt-4.1", ALL_MODELS)] == [True, True, False]


def test_a_report_that_is_not_grouped_by_model_is_compared_as_a_whole(place: Place) -> None:
    place.account("acme")
    place.add(event(), event(model="gpt-5"))
    report_tokens(place, said(None, input_tokens=2_000, output_tokens=200))
    assert verdicts(place) == {("openai", ALL_MODELS): True}


@pytest.mark.parametrize(
    ("usd", "tolerance", "agrees"),
    [
        ("0.0056", {}, True),
        ("0.0057", {}, False),
        ("0.0057", {"tolerance_usd": Decimal("0.0001")}, True),
        ("0.0057", {"tolerance_percent": Decimal(2)}, True),
        ("0.0066", {"tolerance_percent": Decimal(2)}, False),
    ],
)
def test_costs_are_compared_by_the_day(place: Place, usd: str, tolerance: dict[str, Any], agrees: bool) -> None:
    place.account("acme")
    place.add(event(), event("acme", model="gpt-4.1"), event(model="mystery"))
    report(place, "openai", "cost", openai_cost(usd))
    [found] = compared(place, **tolerance)
    assert (found.model, found.our_cost, found.their_cost) == (ALL_MODELS, Decimal("0.0056"), Decimal(usd))
    assert (found.theirs, found.unpriced_requests, found.agrees) == (Counts(), 1, agrees)


def test_anthropic_and_openrouter(place: Place) -> None:
    place.account("acme")
    cached = TokenUsage(
        input_tokens=3_200,
        cache_read_tokens=200,
        cache_write_tokens=1_500,
        cache_write_1h_tokens=1_000,
        output_tokens=500,
    )
    place.add(
        event(provider="anthropic", model="claude-sonnet-4-0", usage=cached),
        event(provider="openrouter", model="openai/gpt-4.1", usage=TokenUsage(input_tokens=50, output_tokens=125)),
    )
    report(place, "anthropic", "usage", messages())
    report(place, "openrouter", "usage", activity(DAY, requests=1, usage=0.0011))
    found = {(each.provider, each.model): each for each in compared(place)}
    assert {name: each.agrees for name, each in found.items()} == {
        ("anthropic", ALL_MODELS): True,
        ("anthropic", "claude-sonnet-4-0"): True,
        ("openrouter", ALL_MODELS): True,
        ("openrouter", "openai/gpt-4.1"): True,
    }
    assert found["anthropic", ALL_MODELS].their_cost is None
    assert found["openrouter", ALL_MODELS].their_cost == Decimal("0.0011")


def test_organizations_are_added_up(place: Place, tmp_path: Path) -> None:
    place.account("acme")
    place.add(event(), event())
    report_tokens(place, said())
    path = tmp_path / "other.json"
    path.write_text(json.dumps(paged(openai_bucket(said(), day=DAY))))
    import_reports(place.ledger_url, [path], "openai", "usage", organization="other")
    assert verdicts(place) == {("openai", ALL_MODELS): True, ("openai", "gpt-4.1"): True}


def test_completions_with_all_that_they_say(place: Place) -> None:
    place.account("acme")
    usage = TokenUsage(input_tokens=27_444, cache_read_tokens=8_448, cache_write_tokens=100, output_tokens=500)
    place.add(event(usage=usage))
    report_tokens(place, completions())
    assert set(verdicts(place).values()) == {True}
