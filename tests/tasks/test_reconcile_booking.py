"""What a reconciliation proposes is booked once, and not where anything else came to be known of the run."""

from __future__ import annotations

from typing import Any

import pytest

from metering.admission.verify import check_counters
from metering.errors import CorrectionConflict, InvalidSetting, UnknownReconciliation
from metering.events import TokenUsage
from tasks.reconciled import apply_reconciliation
from tests.tasks.place import COSTED_AT
from tests.tasks.runs import USED, Runs, book, reconciled, the_one


@pytest.mark.parametrize("fault", ["twice", "never", "no trace"])
def test_what_two_reconciliations_propose_is_booked_once(runs: Runs, fault: str) -> None:
    if fault != "never":
        runs.bill("run")
    if fault == "twice":
        runs.bill("run")
    if fault != "no trace":
        runs.trace("run")
    one, another = the_one(runs.place), the_one(runs.place)
    assert one[1].corrections == another[1].corrections
    assert book(runs.place, *one)
    rows = runs.place.ledger_rows("SELECT count(*) FROM events")
    # An accepted run has nothing to book, and stands as it did.
    assert book(runs.place, *another) is (fault == "no trace")
    assert book(runs.place, *one) is (fault == "no trace")
    assert runs.place.ledger_rows("SELECT count(*) FROM events") == rows
    assert reconciled(runs.place)[1] == {}
    assert runs.place.ledger_rows("SELECT applied_by FROM verdicts") == [("test",), ("test",)]


@pytest.mark.parametrize("fault", ["twice", "never", "no trace"])
def test_a_correction_is_refused_once_something_else_is_billed(runs: Runs, fault: str) -> None:
    if fault != "never":
        runs.bill("run")
    if fault == "twice":
        runs.bill("run")
    if fault != "no trace":
        runs.trace("run")
    found = the_one(runs.place)
    runs.bill("run", TokenUsage(input_tokens=1))  # what had waited in a spool
    rows = runs.place.ledger_rows("SELECT count(*) FROM events")
    with pytest.raises(CorrectionConflict, match="run 'run' of account 'acme': it has changed since"):
        book(runs.place, *found)
    assert runs.place.ledger_rows("SELECT count(*) FROM events") == rows
    assert runs.place.ledger_rows("SELECT applied_by FROM verdicts") == [(None,)]


def test_a_correction_is_refused_once_something_else_is_traced(runs: Runs) -> None:
    runs.bill("run")
    runs.bill("run")
    runs.trace("run")
    found = the_one(runs.place)
    runs.trace("run")  # the other half
    with pytest.raises(CorrectionConflict, match="run 'run' of account 'acme': it has changed since it was judged"):
        book(runs.place, *found)
    assert reconciled(runs.place)[0].runs == {"acme": {"matched": 1}}


def test_a_correction_by_hand_is_not_taken_for_the_proposed_one(runs: Runs) -> None:
    runs.bill("run", TokenUsage(input_tokens=900, cache_read_tokens=400, output_tokens=100))
    runs.trace("run")
    found = the_one(runs.place)
    (step,) = found[1].corrections
    assert step.event_id is not None
    with runs.place.meter() as meter:
        meter.correct(step.event_id, usage=TokenUsage(input_tokens=1_200), reason="by hand")
    with pytest.raises(CorrectionConflict, match="it has changed since it was judged"):
        book(runs.place, *found)


def test_an_abandoned_run_that_was_accepted_is_found_again_once_its_trace_comes(runs: Runs) -> None:
    runs.crash("run")
    assert book(runs.place, *the_one(runs.place))
    assert reconciled(runs.place)[0].runs == {"acme": {"accepted": 1}}
    runs.trace("run")
    assert the_one(runs.place)[1].corrections[0].action == "add"


def test_an_accepted_run_is_found_again_once_its_trace_comes(runs: Runs) -> None:
    runs.bill("run")
    assert book(runs.place, *the_one(runs.place))
    assert reconciled(runs.place)[0].runs == {"acme": {"accepted": 1}}
    runs.trace("run", TokenUsage(input_tokens=1_000, output_tokens=50))
    assert the_one(runs.place)[1].verdict == "mismatched"


def test_a_correction_is_refused_once_a_child_of_another_run_is_traced(runs: Runs) -> None:
    agent = runs.trace("agent")
    found = the_one(runs.place)
    with runs.place.meter() as meter:
        assert meter.record_span(
            {"trace_id": "trace of agent", "span_id": "child", "parent_span_id": agent, "attributes": {}},
            account="acme",
            run_id="another",
        )
    with pytest.raises(CorrectionConflict, match="it has changed since it was judged"):
        book(runs.place, *found)


def test_applying_goes_on_where_it_was_stopped(runs: Runs) -> None:
    for number in range(3):
        runs.bill(f"run {number}")
        runs.bill(f"run {number}")
        runs.trace(f"run {number}")
    runs.bill("changed")
    reconciliation, found = reconciled(runs.place)
    assert book(runs.place, reconciliation, found["run 1"])  # and then it was killed
    runs.bill("changed", TokenUsage(input_tokens=1))
    outcome = apply_reconciliation(runs.place.ledger_url, reconciliation.number, actor="finance", now=COSTED_AT)
    assert (outcome.booked, outcome.booked_before) == (2, 1)
    assert [reason.partition(":")[0] for reason in outcome.refused] == ["run 'changed' of account 'acme'"]
    again = apply_reconciliation(runs.place.ledger_url, reconciliation.number, actor="finance", now=COSTED_AT)
    assert (again.booked, again.booked_before, len(again.refused)) == (0, 3, 1)
    assert runs.place.ledger_rows(
        "SELECT actor, action, subject, details FROM admin_log ORDER BY entry DESC LIMIT 1"
    ) == [("finance", "reconciliation.apply", "1", '{"runs":1}')]
    with pytest.raises(UnknownReconciliation, match="reconciliation 77 is not in the ledger"):
        apply_reconciliation(runs.place.ledger_url, 77, actor="finance", now=COSTED_AT)


def test_a_correction_gives_back_the_quota_it_took(runs: Runs) -> None:
    with runs.place.meter() as meter:
        secret = meter.keys.create("acme", plan="metered").secret
        for _ in range(2):
            meter.consume(secret, line="application", usage=USED, model="gpt-4.1", provider="openai", run_id="run")
    runs.trace("run")
    reconciliation, found = reconciled(runs.place)
    assert book(runs.place, reconciliation, found["run"])
    with runs.place.meter() as meter:
        assert all(check.agrees for check in check_counters(meter.ledger))


def test_a_run_of_another_account_is_not_billed_twice(runs: Runs) -> None:
    runs.place.account("beta", "metered")
    runs.bill("run", account="beta")
    runs.trace("run")
    reconciliation, _ = reconciled(runs.place)
    assert reconciliation.runs == {"acme": {"unbilled": 1}, "beta": {"untraced": 1}}
    outcome = apply_reconciliation(runs.place.ledger_url, 1, actor="finance", now=COSTED_AT)
    (refused,) = outcome.refused
    assert refused.endswith("tokens were traced, none are billed; a run of this id is billed to beta)")
    # Also once it is accepted there.
    assert reconciled(runs.place)[0].runs == {"acme": {"unbilled": 1}, "beta": {"accepted": 1}}
    apply_reconciliation(runs.place.ledger_url, 2, actor="finance", now=COSTED_AT)
    assert runs.place.ledger_rows("SELECT account FROM events") == [("beta",)]


def test_a_reviewer_chooses_what_is_booked(runs: Runs) -> None:
    for run_id in ("a", "b"):
        runs.bill(run_id)
        runs.bill(run_id)
        runs.trace(run_id)
    runs.bill("untold")
    reconciliation, found = reconciled(runs.place)

    def apply(**chosen: Any) -> tuple[int, int]:
        outcome = apply_reconciliation(
            runs.place.ledger_url, reconciliation.number, actor="finance", now=COSTED_AT, **chosen
        )
        return outcome.booked, outcome.booked_before

    assert apply(only=[found["b"].number]) == (1, 0)
    assert apply(verdicts_of=["double-counted"]) == (1, 1)
    with pytest.raises(InvalidSetting, match="number: got 77, expected one that the reconciliation has: 1, 2, 3"):
        apply(only=[77])
    with pytest.raises(InvalidSetting, match="verdict: got 'wrong', expected one that the reconciliation has: aband"):
        apply(verdicts_of=["wrong"])
    assert reconciled(runs.place)[0].runs == {"acme": {"matched": 2, "untraced": 1}}


def test_of_many_reconciliations_only_the_newest_proposals_are_kept(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metering.ledger.verdicts.KEPT", 2)
    runs.bill("a")
    runs.bill("b")
    reconciliation, found = reconciled(runs.place)
    assert book(runs.place, reconciliation, found["a"])
    for _ in range(3):
        reconciled(runs.place)
    kept = runs.place.ledger_rows("SELECT reconciliation, run_id FROM verdicts ORDER BY reconciliation, run_id")
    assert kept == [(1, "a"), (3, "b"), (4, "b")]
