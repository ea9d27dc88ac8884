"""The warehouse made anew from the ledger."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefect import task

from tasks.load import load_into
from tasks.warehouse import lease

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["rebuild_warehouse"]


@task
def rebuild_warehouse(ledger_url: str, warehouse: Path, archives: Path | None = None) -> dict[str, int]:
    """Load every event, archived ones too, into a new file, and put it in the old one's place once it is whole.

    Raises what `load_ledger` raises.
    """
    fresh = warehouse.with_name(warehouse.name + ".rebuilding")
    with lease(warehouse, exclusive=True) as held:
        fresh.unlink(missing_ok=True)
        loaded = load_into(ledger_url, fresh, held, archives)
        # In this order: a kill in between leaves an older state that is whole, never a log beside another file.
        warehouse.with_name(warehouse.name + ".wal").unlink(missing_ok=True)
        fresh.replace(warehouse)
    return loaded
