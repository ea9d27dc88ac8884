"""Hourly: cost new events, load them into the warehouse, roll them up. Exactly once, whatever is killed."""

from __future__ import annotations

from prefect import flow

from flows.command import run
from flows.places import Places
from metering.clock import utc_now
from tasks.costs import cost_events
from tasks.load import load_ledger

__all__ = ["aggregate_usage"]


@flow
def aggregate_usage() -> dict[str, int]:
    """Bring the warehouse up to the ledger. Returns how many events were `costed` and `loaded`, and the `watermark`."""
    places = Places.from_env()
    costed = cost_events(places.ledger_url, utc_now())
    return {"costed": costed, **load_ledger(places.ledger_url, places.warehouse)}


if __name__ == "__main__":
    run(aggregate_usage)
