"""Runs that were billed and traced, for the tests of reconciliation."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from metering.billing.reconciliation import Tolerance
from metering.corrections import apply_verdict
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
        at: datetime = NOVEMBER,
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
            "start_time": at.isoformat(),
            "end_time": (at + timedelta(seconds=2)).isoformat(),
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


def reconciled(
    place: Place, *, period: str = PERIOD, now: datetime = COSTED_AT
) -> tuple[Reconciliation, dict[str, RunVerdict]]:
    place.aggregate()
    number = reconcile(place.ledger_url, place.warehouse, period, now=now, tolerance=Tolerance())
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


def the_one(place: Place) -> tuple[Reconciliation, RunVerdict]:
    """The one run that differs."""
    reconciliation, found = reconciled(place)
    (verdict,) = found.values()
    return reconciliation, verdict


def exact_total(place: Place, account: str = "acme") -> Decimal:
    place.invoice()
    return sum((item.exact_amount for item in place.invoices()[account].items), Decimal(0))
