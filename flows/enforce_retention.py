"""Daily: what is over goes, by the plans and by age; what a legal hold keeps stays."""

from __future__ import annotations

from prefect import flow

from flows.command import run
from flows.places import Places
from metering.clock import utc_now
from metering.ledger.retention import Kept
from tasks.retention import delete_over, find_over

__all__ = ["enforce_retention"]

USUAL = Kept()


@flow
def enforce_retention(
    dry_run: bool = False,
    replay_days: int = USUAL.replay_days,
    span_days: int = USUAL.span_days,
    observation_days: int = USUAL.observation_days,
) -> list[str]:
    """Delete what is over, a few rows at a time; a line for each table and account.

    The request log goes by the plan in force when it was written, all else after so many days. With `dry_run` nothing
    is written, and the lines say what would go.
    """
    now = utc_now()
    kept = Kept(replay_days=replay_days, span_days=span_days, observation_days=observation_days)
    places = Places.from_env()
    if dry_run:
        return [str(line) for line in find_over(places.ledger_url, now, kept)]
    return [str(line) for line in delete_over(places.ledger_url, now, kept)]


if __name__ == "__main__":
    run(enforce_retention)
