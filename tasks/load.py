"""The load: ledger rows into the warehouse, in an interpreter of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from prefect import task

from tasks.errors import WarehouseError
from tasks.warehouse import lease

__all__ = ["load_into", "load_ledger"]

ROOT = Path(__file__).parent.parent


@task
def load_ledger(ledger: Path, warehouse: Path) -> dict[str, int]:
    """Load what is new; returns `loaded` events and the `watermark` reached. Raises `WarehouseError`."""
    with lease(warehouse, exclusive=True) as held:
        return load_into(ledger, warehouse, held)


def load_into(ledger: Path, warehouse: Path, held: int) -> dict[str, int]:
    """Load what is new, under the lease of descriptor `held`.

    A fresh interpreter, never a fork: see `tasks.load_worker`. It inherits the lease, so that a worker whose parent
    was killed keeps others out until it has ended too.
    """
    worker = subprocess.run(  # noqa: S603  our own module
        [sys.executable, "-m", "tasks.load_worker", str(ledger.absolute()), str(warehouse.absolute())],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        pass_fds=(held,),
    )
    try:
        answer = json.loads(worker.stdout)
    except json.JSONDecodeError:
        raise WarehouseError(f"the load ended with status {worker.returncode}: {worker.stderr[-2000:]}") from None
    if "error" in answer:
        raise WarehouseError(answer["error"])
    return dict(answer)
