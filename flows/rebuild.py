"""When the warehouse is lost or in doubt: make it anew from the ledger. The bills come out byte for byte the same."""

from __future__ import annotations

from prefect import flow

from flows.command import run
from flows.places import Places
from metering.clock import utc_now
from tasks.costs import cost_events
from tasks.rebuild import rebuild_warehouse

__all__ = ["rebuild"]


@flow
def rebuild() -> dict[str, int]:
    """Replace the warehouse by a new one, loaded from the first event on."""
    places = Places.from_env()
    costed = cost_events(places.ledger_url, utc_now())
    return {"costed": costed, **rebuild_warehouse(places.ledger_url, places.warehouse)}


if __name__ == "__main__":
    run(rebuild)
