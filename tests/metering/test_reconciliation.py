"""Judging runs: whatever was billed and traced, what is proposed makes them agree."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metering.billing.judging import judge
from metering.billing.reconciliation import (
    BilledEvent,
    Correction,
    ExpiredHold,
    RunFacts,
    Tolerance,
    TracedModel,
)
from metering.events import TOKEN_FIELDS, TokenUsage

AT = datetime(2023, 11, 16, tzinfo=UTC)
EXACTLY = Tolerance(tokens=0, percent=Decimal(0))
USED = TokenUsage(input_tokens=1_000, cache_read_tokens=400, output_tokens=100, reasoning_tokens=30)


def billed(number: int, usage: TokenUsage = USED, **said: Any) -> BilledEvent:
    values: dict[str, Any] = {
        "seq": number,
        "event_id": UUID(int=number),
        "plan_version": 1,
        "line": "application",
        "provider": "openai",
        "model": "gpt-4.1",
        "service_tier": None,
        "caller_type": "production_agent",
        "period": "2023-11",
        "occurred_at": AT,
        "quantity": Decimal(0),
        "billable": True,
        "platform_paid": True,
        "cost": Decimal(1),
        **said,
    }
    return BilledEvent(known_as=values["model"], usage=usage, **values)


def traced(usage: TokenUsage = USED, model: str | None = "gpt-4.1") -> TracedModel:
    return TracedModel(provider="openai", model=model, known_as=model, usage=usage, calls=1, started_at=AT)


def run(events: list[BilledEvent], spans: list[TracedModel], *, holds: int = 0) -> RunFacts:
    expired = [ExpiredHold(hold_id=UUID(int=900 + n), line="application", admitted_at=AT) for n in range(holds)]
    return RunFacts(account="acme", run_id="r", events=tuple(events), traced=tuple(spans), expired=tuple(expired))


def times(usage: TokenUsage, factor: int) -> TokenUsage:
    return TokenUsage(**{name: count * factor for name, count in usage.to_dict().items()})


def changed(usage: TokenUsage, **by: int) -> TokenUsage:
    return replace(usage, **{name: getattr(usage, name) + count for name, count in by.items()})


@pytest.mark.parametrize(
    ("facts", "verdict", "reason"),
    [
        (run([billed(1)], [traced()]), "matched", ""),
        (run([], []), "matched", ""),
        (run([billed(1, TokenUsage())], []), "matched", ""),
        (run([billed(1), billed(2)], [traced(times(USED, 2))]), "matched", ""),
        (run([billed(1)], [traced()], holds=1), "matched", ""),
        (run([billed(1, model=None)], [traced()]), "matched", ""),
        # Traces that say nothing of a part do not deny it.
        (run([billed(1)], [traced(TokenUsage(input_tokens=1_000, output_tokens=100))]), "matched", ""),
        (run([billed(1, TokenUsage(input_tokens=1_000, output_tokens=100))], [traced()]), "mismatched",
         "gpt-4.1: cache_read_tokens billed 0, traced 400, reasoning_tokens billed 0, traced 30"),
        (run([billed(1)], []), "untraced", "1,100 tokens are billed, none were traced"),
        (run([], [traced()]), "unbilled", "1,100 tokens were traced, none are billed"),
        (run([], [traced()], holds=2), "abandoned",
         "hold 00000000-0000-0000-0000-000000000384 and 1 more on line application was never settled: "
         "1,100 tokens were traced, none are billed"),
        (run([], [], holds=1), "abandoned",
         "hold 00000000-0000-0000-0000-000000000384 on line application was never settled, and nothing was traced"),
        (run([billed(1)], [traced(times(USED, 2))], holds=1), "abandoned",
         "hold 00000000-0000-0000-0000-000000000384 on line application was never settled: gpt-4.1: input_tokens "
         "billed 1,000, traced 2,000, cache_read_tokens billed 400, traced 800, output_tokens billed 100, traced 200, "
         "reasoning_tokens billed 30, traced 60"),
        (run([billed(1), billed(2)], [traced()]), "double-counted",
         "gpt-4.1: 00000000-0000-0000-0000-000000000002 repeats what another event bills"),
        (run([billed(1), billed(2, times(USED, 2))], [traced()]), "double-counted", "gpt-4.1: billed 3 times over"),
        (run([billed(1, changed(USED, input_tokens=400))], [traced()]), "double-counted",
         "gpt-4.1: cache_read_tokens counted on top of input_tokens"),
        (run([billed(1, changed(USED, output_tokens=30))], [traced()]), "double-counted",
         "gpt-4.1: reasoning_tokens counted on top of output_tokens"),
        (run([billed(1, changed(USED, input_tokens=400, output_tokens=30))], [traced()]), "double-counted",
         "gpt-4.1: cache_read_tokens counted on top of input_tokens, reasoning_tokens counted on top of output_tokens"),
        # Another call whose trace is missing is not the same call twice.
        (run([billed(1), billed(2, changed(USED, input_tokens=7))], [traced()]), "mismatched",
         "gpt-4.1: input_tokens billed 2,007, traced 1,000, cache_read_tokens billed 800, traced 400, output_tokens "
         "billed 200, traced 100, reasoning_tokens billed 60, traced 30"),
        (run([billed(1, changed(USED, input_tokens=401))], [traced()]), "mismatched",
         "gpt-4.1: input_tokens billed 1,401, traced 1,000"),
        (run([billed(1, model="mini")], [traced()]), "mismatched",
         "gpt-4.1: 1,100 tokens traced, none billed; mini: 1,100 tokens billed, none traced"),
    ],
)  # fmt: skip
def test_a_run_is_what_its_numbers_say(facts: RunFacts, verdict: str, reason: str) -> None:
    found = judge(facts, EXACTLY, usual_line="application")
    assert (found.verdict, found.reason) == (verdict, reason)
    assert bool(found.corrections) is (verdict != "matched")


def test_noise_is_within_the_larger_of_both_tolerances() -> None:
    facts = run([billed(1, changed(USED, input_tokens=2))], [traced()])
    assert judge(facts, EXACTLY).verdict == "mismatched"
    assert judge(facts, Tolerance(tokens=2, percent=Decimal(0))).verdict == "matched"
    assert judge(facts, Tolerance(tokens=0, percent=Decimal("0.2"))).verdict == "matched"
    assert judge(facts, Tolerance(tokens=1, percent=Decimal("0.19"))).verdict == "mismatched"


def test_a_repeat_is_taken_back_though_it_differs_by_noise() -> None:
    found = judge(run([billed(1), billed(2)], [traced(changed(USED, input_tokens=-1))]), Tolerance())
    assert [(step.action, step.event_id) for step in found.corrections] == [("take_back", UUID(int=2))]


def test_what_nobody_pays_for_is_taken_back_first() -> None:
    found = judge(run([billed(1, billable=False), billed(2)], [traced()]), Tolerance())
    assert [(step.action, step.event_id) for step in found.corrections] == [("take_back", UUID(int=1))]


def test_a_call_on_the_wrong_model_is_moved_to_the_right_one() -> None:
    found = judge(run([billed(1, model="mini")], [traced(), traced(USED, "o3")]), Tolerance())
    assert [(step.action, step.event_id, step.model) for step in found.corrections] == [
        ("replace", UUID(int=1), "gpt-4.1"),
        ("add", None, "o3"),
    ]


def test_an_event_without_a_model_gets_the_one_that_was_traced() -> None:
    found = judge(run([billed(1, TokenUsage(), model=None)], [traced()]), Tolerance())
    assert found.corrections == (
        Correction(
            action="replace", event_id=UUID(int=1), line="application", provider="openai", model="gpt-4.1", usage=USED
        ),
    )


def test_nothing_is_proposed_for_what_is_nobodys() -> None:
    facts = replace(run([], [traced()]), account=None)
    found = judge(facts, Tolerance())
    assert (found.verdict, found.corrections) == ("unbilled", ())
    assert found.reason == "1,100 tokens were traced, none are billed; no span names an account of the ledger"


def test_more_than_an_event_can_have_is_proposed_as_the_most() -> None:
    most = TokenUsage(input_tokens=2**53)
    for events in ([billed(1)], [billed(1, most), billed(2, most), billed(3, model=None)]):
        facts = run(events, [traced(most), traced(most, None), traced(most, "mini")])
        found = judge(facts, Tolerance())
        assert found.verdict == "mismatched"
        assert max(step.usage.input_tokens for step in found.corrections) <= 2**53


def test_what_is_missing_is_never_billed_on_what_nobody_pays_for() -> None:
    two = times(USED, 2)
    found = judge(run([billed(1), billed(2, billable=False)], [traced(times(USED, 3))]), Tolerance())
    assert [(step.action, step.event_id, step.usage) for step in found.corrections] == [("replace", UUID(int=1), two)]
    # A call that failed, or was taken back: what was traced is not billed at all.
    found = judge(run([billed(1, TokenUsage(), billable=False)], [traced()]), Tolerance(), usual_line="application")
    assert (found.verdict, found.corrections[0].action, found.corrections[0].billable) == ("unbilled", "add", True)


def test_what_is_added_is_for_whom_and_at_whose_cost_the_run_is() -> None:
    internal = billed(1, billable=False, caller_type="internal", platform_paid=False, line="other")
    for spans in ([traced(times(USED, 2))], [traced(), traced(USED, "mini")]):
        (added,) = judge(run([internal], spans), Tolerance()).corrections
        assert (added.action, added.usage, added.line) == ("add", USED, "other")
        assert (added.billable, added.caller_type, added.platform_paid) == (False, "internal", False)


def test_a_run_that_is_billed_to_another_account_is_not_billed_to_this_one_too() -> None:
    found = judge(replace(run([], [traced()]), billed_to="beta"), Tolerance(), usual_line="application")
    assert (found.verdict, found.corrections) == ("unbilled", ())
    assert found.reason.endswith("; a run of this id is billed to beta")


def test_a_model_that_was_not_traced_by_name_stays_as_it_is_billed() -> None:
    found = judge(run([billed(1)], [traced(times(USED, 2), None)]), Tolerance())
    assert [(step.action, step.model) for step in found.corrections] == [("replace", "gpt-4.1")]


counts = st.integers(0, 12) | st.integers(0, 3_000)


@st.composite
def usages(draw: st.DrawFn) -> TokenUsage:
    input_tokens, output_tokens = draw(counts), draw(counts)
    read = draw(st.integers(0, input_tokens))
    written = draw(st.integers(0, input_tokens - read))
    return TokenUsage(
        input_tokens=input_tokens,
        cache_read_tokens=read,
        cache_write_tokens=written,
        cache_write_1h_tokens=draw(st.integers(0, written)),
        input_audio_tokens=draw(st.integers(0, input_tokens)),
        output_tokens=output_tokens,
        reasoning_tokens=draw(st.integers(0, output_tokens)),
        output_audio_tokens=draw(st.integers(0, output_tokens)),
    )


models = st.sampled_from(["gpt-4.1", "mini", "o3"])
some = st.lists(st.tuples(usages(), models | st.none(), st.booleans()), max_size=4)
tolerances = st.builds(
    Tolerance, tokens=st.integers(0, 3), percent=st.sampled_from([Decimal(0), Decimal("0.1"), Decimal(5)])
)


@given(some, st.dictionaries(models | st.none(), usages(), max_size=3), st.integers(0, 1), tolerances)
def test_what_is_proposed_makes_a_run_agree(
    events: list[tuple[TokenUsage, str | None, bool]],
    spans: dict[str | None, TokenUsage],
    holds: int,
    tolerance: Tolerance,
) -> None:
    facts = run(
        [billed(number, usage, model=model, billable=pays) for number, (usage, model, pays) in enumerate(events, 1)],
        [traced(usage, model) for model, usage in spans.items()],
        holds=holds,
    )
    found = judge(facts, tolerance, usual_line="application")
    if found.verdict == "matched":
        assert not found.corrections
        return
    assert found.corrections
    assert found.reason
    if found.corrections[0].action == "accept":
        assert found.verdict in ("untraced", "abandoned")
        assert len(found.corrections) == 1
        return
    after = corrected(facts, found.corrections)
    assert judge(after, tolerance).verdict == "matched"
    assert all(getattr(step.usage, name) >= 0 for step in found.corrections for name in TOKEN_FIELDS)


def corrected(facts: RunFacts, steps: tuple[Correction, ...]) -> RunFacts:
    by_id = {event.event_id: event for event in facts.events}
    for number, step in enumerate(steps, 100):
        if step.action == "add":
            assert step.line == "application"
            by_id[UUID(int=number)] = billed(number, step.usage, model=step.model, billable=step.billable)
        else:
            assert step.event_id is not None
            event = by_id[step.event_id]
            by_id[step.event_id] = replace(
                event,
                usage=step.usage,
                model=step.model,
                known_as=step.model,
                billable=event.billable and step.action == "replace",
            )
    return replace(facts, events=tuple(by_id.values()))
