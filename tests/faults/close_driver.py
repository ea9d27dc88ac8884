"""A close of a month: `python -m tests.faults.close_driver HOME`, to be killed."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.tasks.place import PERIOD, Place


def close(place: Place) -> None:
    """Close what is loaded, and write the documents."""
    place.close_loaded(PERIOD, override="no price for one model")
    place.invoice()


if __name__ == "__main__":
    print("ready", flush=True)
    close(Place(Path(sys.argv[1])))
