"""By hand, after new price data: a period's events costed anew, as an act that the ledger keeps. Bills follow it."""

from __future__ import annotations

from prefect import flow

from flows.command import run
from flows.places import MAX_REASON, Places, billed_month, stated
from metering.cli.shared import actor as user
from metering.clock import utc_now
from metering.events import MAX_NAME
from tasks.costs import cost_events
from tasks.rebuild import rebuild_warehouse
from tasks.recost import Act, CostChange, recost_period

__all__ = ["recost"]


@flow
def recost(period: str, reason: str, actor: str | None = None, dry_run: bool = False) -> list[CostChange]:
    """Cost the events of a period (`YYYY-MM`) by the installed prices, and make the warehouse anew.

    Returns what changes for which account. `actor` is whom the ledger names, the operating system's user unless said.
    A dry run writes nothing. Killed, it is finished by running it again. Raises `InvalidSetting`, `JobError`.
    """
    now = utc_now()
    act = Act(
        period=billed_month(period, now),
        reason=stated("reason", reason, MAX_REASON),
        actor=stated("actor", actor or user(), MAX_NAME),
        made_at=now,
    )
    places = Places.from_env()
    if not dry_run:
        cost_events(places.ledger_url, now)
    changes = recost_period(places.ledger_url, places.warehouse, act, dry_run=dry_run)
    if not dry_run:
        rebuild_warehouse(places.ledger_url, places.warehouse)
    return changes


if __name__ == "__main__":
    run(recost)
