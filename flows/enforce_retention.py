"""Daily: what is over goes, by the plans and by age; what a legal hold keeps stays."""

from __future__ import annotations

from prefect import flow

from flows.command import run
from flows.places import Places
from metering.clock import utc_now
from metering.errors import InvalidSetting
from metering.ledger.retention import Kept
from tasks.retention import archive_over, delete_over, find_over

__all__ = ["enforce_retention"]

USUAL = Kept()
MAX_DAYS = 36_500


@flow
def enforce_retention(
    dry_run: bool = False,
    replay_days: int = USUAL.replay_days,
    span_days: int = USUAL.span_days,
    observation_days: int = USUAL.observation_days,
    archive_after_days: int = 400,
) -> list[str]:
    """Delete what is over, a few rows at a time; a line for each table and account.

    The request log goes by the plan in force when it was written, all else after so many days; events so many days
    after the close of their period, once they are archived. With `dry_run` nothing is written, and the lines say what
    would go.
    """
    if not 0 <= archive_after_days <= MAX_DAYS:
        raise InvalidSetting("archive_after_days", archive_after_days, f"0 to {MAX_DAYS} days")
    now = utc_now()
    kept = Kept(replay_days=replay_days, span_days=span_days, observation_days=observation_days)
    places = Places.from_env()
    if dry_run:
        return [str(line) for line in find_over(places.ledger_url, now, kept, archive_after_days)]
    gone = delete_over(places.ledger_url, now, kept)
    return [str(line) for line in gone + archive_over(places.ledger_url, places.archives, now, archive_after_days)]


if __name__ == "__main__":
    run(enforce_retention)
