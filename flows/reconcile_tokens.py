"""Daily: what was billed against what was traced, run by run. Proposes corrections, and books none."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact

from flows.command import run
from flows.places import Places, billed_month
from metering.billing.reconciliation import Tolerance
from metering.clock import utc_now
from metering.errors import InvalidSetting
from reports.reconciliation import summary_markdown, verdict_rows
from tasks.costs import cost_events
from tasks.load import load_ledger
from tasks.reconcile import reconcile_runs
from tasks.reconciled import write_reconciliation

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["months_of", "reconcile_period", "reconcile_tokens"]

USUAL = Tolerance()


@flow
def reconcile_tokens(
    period: str | None = None, tolerance_tokens: int = USUAL.tokens, tolerance_percent: str = str(USUAL.percent)
) -> dict[str, Any]:
    """Load what is new, and judge the runs of a month's periods (`YYYY-MM`; unless said, of last month and this one).

    A count may differ by `tolerance_tokens`, or by `tolerance_percent` of what was traced. Returns for each month the
    `reconciliation` that `python -m flows reconcile apply` takes, its runs by verdict, and the `page`.
    """
    now = utc_now()
    tolerance = _tolerance(tolerance_tokens, tolerance_percent)
    months = months_of(period, now)
    places = Places.from_env()
    cost_events(places.ledger_url, now)
    load_ledger(places.ledger_url, places.warehouse)
    return {month: reconcile_period(places, month, now, tolerance) for month in months}


def reconcile_period(places: Places, month: str, now: datetime, tolerance: Tolerance = USUAL) -> dict[str, Any]:
    """Within a flow: judge a month's runs, write the report, and publish a table and a summary."""
    number = reconcile_runs(places.ledger_url, places.warehouse, month, now, tolerance)
    found = write_reconciliation(places.ledger_url, places.warehouse, places.out, number)
    key = f"reconciliation-{month}"
    create_table_artifact(verdict_rows(found.verdicts), key=key, description="Runs that differ")
    said = summary_markdown(found.reconciliation, found.verdicts, found.provider_days, is_missing=found.is_missing)
    create_markdown_artifact(said, key=f"{key}-summary", description="What was found")
    return {
        "reconciliation": number,
        **found.reconciliation.totals(),
        "provider_days": len(found.provider_days),
        "provider_days_off": sum(not day.agrees for day in found.provider_days),
        "page": str(found.page.absolute()),
    }


def months_of(period: str | None, now: datetime) -> Sequence[str]:
    """The months to reconcile."""
    if period is not None:
        return [billed_month(period, now)]
    return [billed_month(None, now), f"{now:%Y-%m}"]


def _tolerance(tokens: int, percent: str) -> Tolerance:
    if not 0 <= tokens < 2**31:
        raise InvalidSetting("tolerance_tokens", tokens, f"0 to {2**31 - 1}")
    try:
        share = Decimal(percent)
        if 0 <= share <= 100:
            return Tolerance(tokens=tokens, percent=share)
    except InvalidOperation:
        pass
    raise InvalidSetting("tolerance_percent", percent, "a number from 0 to 100")


if __name__ == "__main__":
    run(reconcile_tokens)
