"""What was billed is what was traced, or it is found, classed, priced and put right."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from uuid import UUID

import pytest

from metering.errors import CorrectionConflict
from metering.events import TokenUsage
from tests.tasks.place import COSTED_AT, NOVEMBER
from tests.tasks.runs import USED, Runs, book, exact_total, reconciled, the_one

ON_SQLITE = pytest.mark.parametrize("either_url", ["sqlite"], indirect=True)


@pytest.fixture
def ledger_url(either_url: str) -> str:
    return either_url


def test_planted_faults_are_found_priced_and_put_right(runs: Runs) -> None:
    place = runs.place
    # As it should be: one call, many turns below an agent that repeats them, two models, and noise.
    runs.bill("fine")
    runs.trace("fine")
    agent = runs.trace("turns", TokenUsage(input_tokens=2_000, cache_read_tokens=800, output_tokens=200))
    runs.trace("turns", below=agent)
    runs.trace("turns", below=agent)
    runs.bill("turns")
    runs.bill("turns")
    runs.bill("two models")
    runs.bill("two models", model="gpt-4.1-mini")
    runs.trace("two models")
    runs.trace("two models", model="gpt-4.1-mini")
    runs.bill("noise")
    runs.trace("noise", TokenUsage(input_tokens=1_001, cache_read_tokens=400, output_tokens=99))
    # The faults.
    runs.bill("twice")
    runs.bill("twice")
    runs.trace("twice")
    runs.trace("never")
    runs.bill("cached on top", TokenUsage(input_tokens=1_400, cache_read_tokens=400, output_tokens=100))
    runs.trace("cached on top")
    runs.crash("crashed")
    runs.trace("crashed")
    runs.crash("crashed before it began")
    runs.bill("no trace")
    runs.bill("all on one model", TokenUsage(input_tokens=2_000, cache_read_tokens=800, output_tokens=200))
    runs.trace("all on one model")
    runs.trace("all on one model", model="gpt-4.1-mini")
    runs.bill("other model", model="gpt-4.1-mini")
    runs.trace("other model")
    runs.bill("too little", TokenUsage(input_tokens=900, cache_read_tokens=400, output_tokens=100))
    runs.trace("too little")

    reconciliation, found = reconciled(place)
    assert {run_id: verdict.verdict for run_id, verdict in found.items()} == {
        "twice": "double-counted",
        "never": "unbilled",
        "cached on top": "double-counted",
        "crashed": "abandoned",
        "crashed before it began": "abandoned",
        "no trace": "untraced",
        "all on one model": "mismatched",
        "other model": "mismatched",
        "too little": "mismatched",
    }
    assert reconciliation.runs == {
        "acme": {"matched": 4, "unbilled": 1, "untraced": 1, "double-counted": 2, "abandoned": 2, "mismatched": 3}
    }
    # 600 uncached at 4, 400 cached at 1 and 100 out at 16 dollars a million; of gpt-4.1 at 2, 0.50 and 8.
    call, cost = Decimal("0.0044"), Decimal("0.0022")
    assert {run_id: (verdict.amount, verdict.cost) for run_id, verdict in found.items()} == {
        "twice": (-call, -cost),
        "never": (call, cost),
        "cached on top": (Decimal("-0.0016"), Decimal("-0.0008")),
        "crashed": (call, cost),
        "crashed before it began": (0, 0),
        "no trace": (-call, -cost),
        "all on one model": (0, Decimal("-0.00176")),
        "other model": (0, Decimal("0.00176")),
        "too little": (Decimal("0.0004"), Decimal("0.0002")),
    }
    assert {verdict.currency for verdict in found.values()} == {"USD"}

    owed_before = exact_total(place)
    before = place.warehouse_rows("SELECT sum(cost) FROM usage_15m WHERE billable")
    assert all(book(place, reconciliation, verdict) for verdict in found.values())
    again, left = reconciled(place)
    assert left == {}
    assert again.runs == {"acme": {"matched": 11, "accepted": 2}}
    changed = sum(verdict.cost or 0 for verdict in found.values() if verdict.run_id != "no trace")
    ((after,),) = place.warehouse_rows("SELECT sum(cost) FROM usage_15m WHERE billable")
    assert after - before[0][0] == changed
    owed = sum(verdict.amount or 0 for verdict in found.values() if verdict.run_id != "no trace")
    assert exact_total(place) - owed_before == owed


@ON_SQLITE
def test_a_run_that_may_still_change_is_left_for_the_next_time(runs: Runs) -> None:
    runs.bill("run")
    runs.trace("run", TokenUsage(input_tokens=2_000, output_tokens=100))
    soon = NOVEMBER + timedelta(minutes=30)
    assert reconciled(runs.place, now=soon)[0].runs == {"acme": {"pending": 1}}
    assert reconciled(runs.place)[0].runs == {"acme": {"mismatched": 1}}


@ON_SQLITE
def test_a_hold_that_nobody_has_marked_as_expired_is_abandoned_all_the_same(runs: Runs) -> None:
    with runs.place.meter() as meter:
        secret = meter.keys.create("acme", plan="metered").secret
        meter.reserve(secret, line="application", estimate=USED, run_id="run")
        meter._keeper.close()
    runs.trace("run")
    assert reconciled(runs.place, now=NOVEMBER + timedelta(minutes=5))[0].runs == {"acme": {"pending": 1}}
    assert runs.place.ledger_rows("SELECT state FROM holds") == [("open",)]
    found = the_one(runs.place)
    assert (found[1].verdict, found[1].amount) == ("abandoned", Decimal("0.0044"))


@ON_SQLITE
def test_spans_without_an_account_are_of_the_one_that_was_billed(runs: Runs) -> None:
    runs.bill("billed")
    runs.trace("billed", account=None)
    runs.trace("in part")
    runs.trace("in part", account=None)
    runs.bill("in part")
    runs.bill("in part")
    runs.crash("held")
    runs.trace("held", account=None)
    runs.place.account("other", "metered")
    runs.bill("of two")
    runs.bill("of two", account="other")
    runs.trace("of two", account=None)
    runs.trace("of nobody", account=None)
    runs.trace("of a ghost", account="ghost")
    reconciliation, found = reconciled(runs.place)
    assert reconciliation.runs == {
        "": {"unbilled": 3},
        "acme": {"matched": 2, "abandoned": 1, "untraced": 1},
        "other": {"untraced": 1},
    }
    assert found["of nobody"].amount is None
    assert found["of nobody"].cost == Decimal("0.0022")
    with pytest.raises(CorrectionConflict, match="run 'of nobody' of account None: nothing is proposed that could be"):
        book(runs.place, reconciliation, found["of nobody"])


@ON_SQLITE
def test_what_is_no_call_of_a_model_is_not_compared(runs: Runs) -> None:
    with runs.place.meter() as meter:
        signal = {"account": "acme", "run_id": "run", "idempotency_key": "k"}
        assert meter.record(line="extraction_tokens", usage=TokenUsage(input_tokens=77), **signal)
        assert meter.record(line="learnings_generated", quantity=3, **signal)
    assert reconciled(runs.place)[0].runs == {}
    ((event_id,),) = runs.place.ledger_rows("SELECT event_id FROM events WHERE line = 'extraction_tokens'")
    with runs.place.meter() as meter:
        meter.correct(UUID(event_id), usage=TokenUsage(input_tokens=70), reason="counted anew")
    assert reconciled(runs.place)[0].runs == {}


@ON_SQLITE
def test_a_fault_is_found_in_the_period_it_happened_in_over_the_whole_life_of_its_run(runs: Runs) -> None:
    months = [datetime(2023, month, 28, tzinfo=UTC) for month in (8, 9, 10, 11)]
    for at in months:
        runs.bill("conversation", at=at)
        runs.trace("conversation", at=at)
    runs.bill("conversation", at=months[3])  # once more
    end = datetime(2023, 11, 30, 23, 59, 59, tzinfo=UTC)
    runs.trace("over the edge", at=end)
    runs.bill("over the edge", at=end + timedelta(seconds=2))
    runs.trace("december", at=end + timedelta(seconds=2))
    later = COSTED_AT + timedelta(days=1)
    assert reconciled(runs.place, period="2023-10", now=later)[0].runs == {"acme": {"matched": 1}}
    reconciliation, found = reconciled(runs.place, now=later)
    assert reconciliation.runs == {"acme": {"matched": 1, "double-counted": 1}}
    assert found["conversation"].amount == Decimal("-0.0044")
    assert book(runs.place, reconciliation, found["conversation"])
    assert reconciled(runs.place, now=later)[0].runs == {"acme": {"matched": 2}}
    assert reconciled(runs.place, period="2023-12", now=later)[0].runs == {"acme": {"matched": 1, "unbilled": 1}}


@ON_SQLITE
def test_what_repeats_does_so_however_long_ago(runs: Runs) -> None:
    for month in (3, 7, 11):
        at = datetime(2023, month, 10, tzinfo=UTC)
        runs.bill("conversation", at=at)
        runs.trace("conversation", below=runs.trace("conversation", at=at), at=at)
    runs.bill("conversation", TokenUsage(), at=NOVEMBER)
    runs.trace("conversation", TokenUsage(input_tokens=10), at=NOVEMBER)
    later = COSTED_AT + timedelta(days=1)
    reconciliation, found = reconciled(runs.place, now=later)
    assert found["conversation"].reason == "gpt-4.1: input_tokens billed 3,000, traced 3,010"
    assert book(runs.place, reconciliation, found["conversation"])
    for month in (3, 7, 11):
        assert reconciled(runs.place, period=f"2023-{month:02}", now=later)[0].runs == {"acme": {"matched": 1}}


@ON_SQLITE
def test_what_is_missing_is_billed_in_the_period_it_is_missing_in(runs: Runs) -> None:
    for month in (8, 11):
        runs.trace("conversation", at=datetime(2023, month, 10, tzinfo=UTC))
    runs.bill("conversation", at=datetime(2023, 8, 10, tzinfo=UTC))
    reconciliation, found = reconciled(runs.place)
    assert book(runs.place, reconciliation, found["conversation"])
    assert runs.place.ledger_rows("SELECT period FROM events ORDER BY seq") == [("2023-08",), ("2023-11",)]


@ON_SQLITE
def test_a_hold_and_its_trace_may_lie_in_two_periods(runs: Runs) -> None:
    runs.crash("run")
    runs.trace("run", at=datetime(2023, 12, 1, 0, 0, 5, tzinfo=UTC))
    later = COSTED_AT + timedelta(days=1)
    for period in ("2023-11", "2023-12"):
        reconciliation, found = reconciled(runs.place, period=period, now=later)
        assert reconciliation.runs == {"acme": {"abandoned": 1}}
        assert reconciliation.stakes["acme"].change == found["run"].amount == Decimal("0.0044")


@ON_SQLITE
def test_whose_a_run_is_may_show_in_another_period(runs: Runs) -> None:
    runs.place.account("beta", "metered")
    runs.bill("run")
    runs.bill("run")
    runs.trace("run", account=None)
    runs.trace("run", account="beta", at=datetime(2023, 12, 5, tzinfo=UTC))
    reconciliation, _ = reconciled(runs.place, now=COSTED_AT + timedelta(days=9))
    assert reconciliation.runs == {"": {"unbilled": 1}, "acme": {"untraced": 1}, "beta": {"unbilled": 1}}


@ON_SQLITE
def test_only_what_is_traced_or_asked_for_is_compared(runs: Runs) -> None:
    runs.place.plans("[plans.plain]\nretention_days = 30\n")
    for account in ("untraced", "traced"):
        runs.place.account(account, "plain")
        runs.bill("run", account=account)
    runs.trace("other run", account="traced")
    runs.bill("run")
    reconciliation, _ = reconciled(runs.place)
    assert reconciliation.runs == {"acme": {"untraced": 1}, "traced": {"unbilled": 1, "untraced": 1}}


@ON_SQLITE
def test_calls_nobody_pays_for_are_traced_all_the_same(runs: Runs) -> None:
    runs.bill("run", caller_type="internal", billable=False)
    runs.trace("run")
    runs.bill("free twice", billable=False)
    runs.bill("free twice")
    runs.trace("free twice")
    reconciliation, found = reconciled(runs.place)
    assert reconciliation.runs == {"acme": {"matched": 1, "double-counted": 1}}
    assert found["free twice"].amount == 0
    assert found["free twice"].cost == Decimal("-0.0022")


@ON_SQLITE
def test_a_model_that_is_not_named_is_no_difference(runs: Runs) -> None:
    runs.bill("no model billed", model=None, provider=None)
    runs.trace("no model billed")
    runs.bill("no model traced")
    runs.trace("no model traced", model=None)
    assert reconciled(runs.place)[0].runs == {"acme": {"matched": 2}}


@ON_SQLITE
def test_more_than_can_be_judged_is_counted(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.reconcile.MOST_JUDGED", 2)
    for number in range(1, 5):
        runs.bill(f"run {number}", TokenUsage(input_tokens=100 * number))
    reconciliation, found = reconciled(runs.place)
    assert reconciliation.runs == {"acme": {"untraced": 2, "not judged": 2}}
    assert sorted(found) == ["run 3", "run 4"]
    # What is accepted gives way to the others.
    assert all(book(runs.place, reconciliation, verdict) for verdict in found.values())
    reconciliation, found = reconciled(runs.place)
    assert reconciliation.runs == {"acme": {"untraced": 2, "accepted": 2}}
    assert sorted(found) == ["run 1", "run 2"]


@ON_SQLITE
def test_counts_too_large_for_an_event_are_found_and_nothing_breaks(runs: Runs) -> None:
    runs.bill("huge")
    for _ in range(3):
        runs.trace("huge", TokenUsage(input_tokens=2**53, output_tokens=1))
    assert reconciled(runs.place)[0].runs == {"acme": {"mismatched": 1}}


@ON_SQLITE
def test_where_several_lines_sell_tokens_nobody_guesses(runs: Runs) -> None:
    runs.place.plans("[plans.plain]\nretention_days = 30\n")
    runs.place.account("plain", "plain")
    for line in ("one", "other"):
        runs.bill(line, line=line, account="plain")
        runs.trace(line, account="plain")
    runs.trace("never", account="plain")
    found = the_one(runs.place)
    assert [(step.action, step.line) for step in found[1].corrections] == [("add", None)]
    assert (found[1].amount, found[1].cost) == (None, Decimal("0.0022"))
    with pytest.raises(CorrectionConflict, match=r"it is not known which line it is sold on: use Meter\.record"):
        book(runs.place, *found)
