"""The main job: aggregate what was recorded, reconcile it where a plan asks for that, then bill one period."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefect import flow

from flows.aggregate_usage import aggregate_usage
from flows.bill_period import bill_period
from flows.command import run
from flows.places import Places, billed_month
from flows.reconcile_tokens import reconcile_period
from metering.clock import utc_now
from tasks.reconcile import is_asked_for

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["billing_cycle"]


@flow
def billing_cycle(
    period: str | None = None, final: bool = False, override: str | None = None, actor: str | None = None
) -> Path:
    """Run the jobs of one period (`YYYY-MM`, last month unless said) in order. Returns the index page's path.

    `final` closes it, as `bill_period` does. Raises what the jobs raise; a period that is not a month before anything
    is done.
    """
    now = utc_now()
    month = billed_month(period, now)
    aggregate_usage()
    places = Places.from_env()
    if is_asked_for(places.ledger_url, month, now):
        reconcile_period(places, month, now)
    return bill_period(month, final=final, override=override, actor=actor)


if __name__ == "__main__":
    run(billing_cycle)
