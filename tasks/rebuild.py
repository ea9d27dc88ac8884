"""The warehouse made anew from the ledger."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefect import task

from tasks.load import load_ledger
from tasks.warehouse import lease

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["rebuild_warehouse"]


@task
def rebuild_warehouse(ledger: Path, warehouse: Path) -> dict[str, int]:
    """Load every event into a new file, and put it in the old one's place once it is whole."""
    fresh = warehouse.with_name(warehouse.name + ".rebuilding")
    for leftover in (fresh, fresh.with_name(fresh.name + ".wal")):
        leftover.unlink(missing_ok=True)
    loaded = load_ledger.fn(ledger, fresh)
    with lease(warehouse, exclusive=True):
        warehouse.with_name(warehouse.name + ".wal").unlink(missing_ok=True)
        fresh.replace(warehouse)
        fresh.with_name(fresh.name + ".lease").unlink(missing_ok=True)
    return loaded
