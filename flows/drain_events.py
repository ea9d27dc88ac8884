"""Every five minutes: what Redis admitted is brought into the ledger, should `tallystick drain --follow` be down."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.states import Completed

from flows.command import run
from metering.settings import Settings
from tasks.drain import drain_shards
from tasks.errors import JobError

__all__ = ["drain_events"]

NOT_ON_REDIS = "METERING_QUOTA_URL is not set: quotas are decided in the ledger, and there is nothing to drain"


@flow
def drain_events() -> Any:
    """Drain each shard once. Returns how many entries became what, and publishes how the shards stand.

    `JobError` where a shard has lost data, or something could not be done; all else is done then.
    """
    if Settings.from_env().quota_url is None:
        return Completed(message=NOT_ON_REDIS, data={"skipped": NOT_ON_REDIS})
    report = drain_shards()
    create_markdown_artifact(report.markdown(), key="drain-events", description="The drain of Redis into the ledger")
    if report.problems:
        raise JobError("; ".join(report.problems))
    return report.done


if __name__ == "__main__":
    run(drain_events)
