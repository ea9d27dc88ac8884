"""A run of retention in small batches: `python -m tests.faults.retention_driver HOME`, to be killed."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path

from metering.ledger import retention
from metering.ledger.retention import Kept
from tasks import archives
from tasks.retention import archive_over, delete_over
from tests.tasks.place import Place

NOW = datetime(2024, 3, 1, tzinfo=UTC)


def enforce(place: Place) -> None:
    """Delete what is over, and archive what was closed."""
    archives.FIRST_SIZE = retention.FIRST_SIZE = retention.LEAST_SIZE = retention.MAX_SIZE = 8
    archives.EVENTS_AT_ONCE = 50
    delete_over.fn(place.ledger_url, NOW, Kept())
    archive_over.fn(place.ledger_url, place.archives, NOW, 0)


if __name__ == "__main__":
    print("ready", flush=True)
    enforce(Place(Path(sys.argv[1])))
