"""A recost by prices twice as high, in small batches: `python -m tests.faults.recost_driver HOME`, to be killed."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tasks import costs
from tasks.rebuild import rebuild_warehouse
from tasks.recost import Act, recost_period
from tests.tasks.place import PERIOD, Place

ACT = Act(period=PERIOD, actor="ann", reason="twice as high", made_at=datetime(2023, 12, 5, tzinfo=UTC))


def recost(place: Place) -> list[str]:
    """What changes for which account."""
    of_today = costs.provider_cost

    def twice(event: Any) -> Any:
        cost = of_today(event)
        return None if cost is None else 2 * cost

    costs.provider_cost, costs.price_version = twice, lambda: "twice"  # type: ignore[assignment]
    costs.EVENTS_PER_COMMIT = 10
    changes = recost_period.fn(place.ledger_url, place.warehouse, ACT, dry_run=False)
    rebuild_warehouse.fn(place.ledger_url, place.warehouse)
    return [str(change) for change in changes]


if __name__ == "__main__":
    print("ready", flush=True)
    recost(Place(Path(sys.argv[1])))
