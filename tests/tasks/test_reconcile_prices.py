"""The money at stake is what booking the corrections does to the bill."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal

from tests.tasks.place import NOVEMBER, Place
from tests.tasks.runs import Runs, book, exact_total, reconciled, the_one

TIERED = """
[plans.tiered]
retention_days = 30
[[plans.tiered.rates]]
line = "application"
metric = "input_tokens"
type = "volume"
tiers = [{ up_to = 3_000, unit_amount = "0.01" }, { unit_amount = "0.002" }]
"""


def test_what_corrections_come_to_together_is_what_they_do_to_the_bill(runs: Runs) -> None:
    runs.place.plans(TIERED)
    runs.place.account("acme-2", "tiered")
    for number in range(5):
        runs.bill(f"fine {number}", account="acme-2")
        runs.trace(f"fine {number}", account="acme-2")
        runs.bill(f"twice {number}", account="acme-2")
        runs.bill(f"twice {number}", account="acme-2")
        runs.trace(f"twice {number}", account="acme-2")
    runs.bill("untold", account="acme-2")
    reconciliation, found = reconciled(runs.place)
    before = exact_total(runs.place, "acme-2")
    stake = reconciliation.stakes["acme-2"]
    for run_id, verdict in found.items():
        if run_id != "untold":
            assert book(runs.place, reconciliation, verdict)
    runs.place.aggregate()
    after = exact_total(runs.place, "acme-2")
    assert (stake.currency, stake.change) == ("USD", after - before)
    assert stake.cost == 5 * Decimal("-0.0022")
    assert not stake.looks_sampled


def test_a_run_is_priced_by_the_plan_and_the_period_it_is_billed_on(runs: Runs) -> None:
    runs.place.account("mover", "metered")
    later = Place(runs.place.home, clock=lambda: NOVEMBER + timedelta(days=5))
    with later.meter() as meter:
        meter.accounts.change_plan("mover", "pro")
    runs.bill("fine", account="mover")
    for run_id in ("fine", "never"):
        runs.trace(run_id, account="mover")
    assert the_one(runs.place)[1].amount == Decimal("0.0044")


def test_what_has_no_price_is_counted_and_in_no_sum(runs: Runs) -> None:
    runs.trace("never", model="mystery")
    reconciliation, verdict = the_one(runs.place)
    assert (verdict.amount, verdict.cost) == (Decimal("0.0044"), None)
    stake = reconciliation.stakes["acme"]
    assert (stake.unpriced, stake.uncosted, stake.change, stake.cost) == (0, 1, Decimal("0.0044"), 0)


def test_traces_that_look_sampled_are_said_to(runs: Runs) -> None:
    for number in range(12):
        for _ in range(3):
            runs.bill(f"run {number}")
        runs.trace(f"run {number}")
    assert reconciled(runs.place)[0].stakes["acme"].looks_sampled
