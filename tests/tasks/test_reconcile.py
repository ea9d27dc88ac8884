"""What was billed is what was traced, or it is found, classed, priced and put right."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest

from metering.billing.reconciliation import Tolerance
from metering.corrections import apply_verdict
from metering.errors import CorrectionConflict
from metering.events import TokenUsage
from metering.ledger import Ledger, verdicts
from tasks.reconcile import reconcile
from tests.tasks.place import COSTED_AT, NOVEMBER, PERIOD, Place, event

if TYPE_CHECKING:
    from metering.billing.reconciliation import Reconciliation, RunVerdict

PLANS = """
[plans.metered]
retention_days = 30
reconcile = "traces"
rates = [
  { line = "application", metric = "uncached_input_tokens", type = "per_unit", unit_amount = "4.00", per = 1_000_000 },
  { line = "application", metric = "cache_read_tokens", type = "per_unit", unit_amount = "1.00", per = 1_000_000 },
  { line = "application", metric = "output_tokens", type = "per_unit", unit_amount = "16.00", per = 1_000_000 },
]
"""
USED = TokenUsage(input_tokens=1_000, cache_read_tokens=400, output_tokens=100)


@dataclass
class Runs:
    """Writes what was billed and what was traced of one account's runs."""

    place: Place
    spans: int = field(default=0)

    def bill(self, run_id: str, usage: TokenUsage = USED, **said: Any) -> None:
        self.place.add(event(run_id=run_id, usage=usage, **said))

    def trace(
        self,
        run_id: str,
        usage: TokenUsage = USED,
        *,
        model: str | None = "gpt-4.1-2025-04-14",
        below: str | None = None,
        account: str | None = "acme",
    ) -> str:
        self.spans += 1
        said = {
            "gen_ai.usage.input_tokens": usage.input_tokens,
            "gen_ai.usage.output_tokens": usage.output_tokens,
            "gen_ai.usage.cache_read.input_tokens": usage.cache_read_tokens,
            "gen_ai.response.model": model,
            "gen_ai.provider.name": "openai",
        }
        span = {
            "trace_id": f"trace of {run_id}",
            "span_id": f"span {self.spans}",
            "parent_span_id": below,
            "start_time": NOVEMBER.isoformat(),
            "end_time": (NOVEMBER + timedelta(seconds=2)).isoformat(),
            "attributes": {name: value for name, value in said.items() if value is not None},
        }
        with self.place.meter() as meter:
            assert meter.record_span(span, account=account, run_id=run_id)
        return f"span {self.spans}"

    def crash(self, run_id: str, line: str = "application") -> None:
        """A call whose process dies before it settles."""
        with self.place.meter() as meter:
            secret = meter.keys.create("acme", plan="metered").secret
            meter.reserve(secret, line=line, estimate=TokenUsage(input_tokens=50, output_tokens=50), run_id=run_id)
            meter._keeper.close()
        later = Place(self.place.home, self.place.url, clock=lambda: NOVEMBER + timedelta(hours=1))
        with later.meter() as meter:
            assert meter.expire_holds() == 1


ON_SQLITE = pytest.mark.parametrize("either_url", ["sqlite"], indirect=True)


@pytest.fixture
def ledger_url(either_url: str) -> str:
    return either_url


@pytest.fixture
def runs(place: Place) -> Runs:
    place.plans(PLANS)
    place.account("acme", "metered")
    return Runs(place)


def reconciled(place: Place, tolerance: Tolerance = Tolerance()) -> tuple[Reconciliation, dict[str, RunVerdict]]:  # noqa: B008
    place.aggregate()
    number = reconcile(place.ledger_url, place.warehouse, PERIOD, now=COSTED_AT, tolerance=tolerance)
    ledger = Ledger(place.ledger_url)
    with ledger.read() as connection:
        found = verdicts.find(connection, number), verdicts.verdicts_of(connection, number)
    ledger.close()
    return found[0], {verdict.run_id: verdict for verdict in found[1]}


def book(place: Place, reconciliation: Reconciliation, verdict: RunVerdict) -> bool:
    ledger = Ledger(place.ledger_url)
    try:
        return apply_verdict(ledger, verdict, reconciliation=reconciliation.number, actor="test", now=COSTED_AT)
    finally:
        ledger.close()


def exact_total(place: Place) -> Decimal:
    place.invoice()
    return sum((item.exact_amount for item in place.invoices()["acme"].items), Decimal(0))


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


def state_of(place: Place) -> tuple[Reconciliation, RunVerdict]:
    """The one run that differs."""
    reconciliation, found = reconciled(place)
    (verdict,) = found.values()
    return reconciliation, verdict


@ON_SQLITE
@pytest.mark.parametrize("fault", ["twice", "never", "no trace"])
def test_what_two_reconciliations_propose_is_booked_once(runs: Runs, fault: str) -> None:
    if fault != "never":
        runs.bill("run")
    if fault == "twice":
        runs.bill("run")
    if fault != "no trace":
        runs.trace("run")
    one, another = state_of(runs.place), state_of(runs.place)
    assert one[1].corrections == another[1].corrections
    assert book(runs.place, *one)
    rows = runs.place.ledger_rows("SELECT count(*) FROM events")
    # An accepted run has nothing to book, and stands as it did.
    assert book(runs.place, *another) is (fault == "no trace")
    assert book(runs.place, *one) is (fault == "no trace")
    assert runs.place.ledger_rows("SELECT count(*) FROM events") == rows
    assert reconciled(runs.place)[1] == {}
    assert runs.place.ledger_rows("SELECT applied_by FROM verdicts") == [("test",), ("test",)]


@ON_SQLITE
@pytest.mark.parametrize("fault", ["twice", "never", "no trace"])
def test_a_correction_is_refused_once_something_else_is_billed(runs: Runs, fault: str) -> None:
    if fault != "never":
        runs.bill("run")
    if fault == "twice":
        runs.bill("run")
    if fault != "no trace":
        runs.trace("run")
    found = state_of(runs.place)
    runs.bill("run", TokenUsage(input_tokens=1))  # what had waited in a spool
    rows = runs.place.ledger_rows("SELECT count(*) FROM events")
    with pytest.raises(
        CorrectionConflict, match=r"run 'run' of account 'acme': what is billed for it has changed since"
    ):
        book(runs.place, *found)
    assert runs.place.ledger_rows("SELECT count(*) FROM events") == rows
    assert runs.place.ledger_rows("SELECT applied_by FROM verdicts") == [(None,)]


@ON_SQLITE
def test_an_accepted_run_is_found_again_once_its_trace_comes(runs: Runs) -> None:
    runs.bill("run")
    assert book(runs.place, *state_of(runs.place))
    assert reconciled(runs.place)[0].runs == {"acme": {"accepted": 1}}
    runs.trace("run", TokenUsage(input_tokens=1_000, output_tokens=50))
    assert state_of(runs.place)[1].verdict == "mismatched"
