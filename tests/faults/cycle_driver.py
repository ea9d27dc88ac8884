"""The steps of a billing cycle without Prefect's engine: `python -m tests.faults.cycle_driver HOME`, to be killed."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.tasks.place import Place

if __name__ == "__main__":
    print("ready", flush=True)
    Place(Path(sys.argv[1])).cycle()
