"""Archives read back: into tables of their own, which no load and no bill reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa

from metering.ledger import Ledger
from metering.ledger.schema import archives as archives_table
from tasks.archive_files import check_file
from tasks.errors import JobError
from tasks.warehouse import lease, open_for_writing, sql

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["restore_period"]


def restore_period(ledger_url: str, warehouse: Path, archives: Path, period: str) -> dict[str, int]:
    """Read the archives of a period into `restored.usage_events` of the warehouse; how many files and events.

    Doing it again replaces what is there of the period, and a rebuild of the warehouse leaves it out. Raises
    `JobError` where the period has no archive, `ArchiveError` for a file that was changed, and then reads none.
    """
    ledger = Ledger(ledger_url)
    try:
        with ledger.read() as connection:
            query = sa.select(archives_table.c.manifest).where(archives_table.c.period == period)
            manifests = connection.execute(query.order_by(archives_table.c.file)).scalars().all()
    finally:
        ledger.close()
    if not manifests:
        raise JobError(f"no events of {period} are archived: those that were recorded are in the ledger")
    files = [str(archives / check_file(archives, text, thoroughly=True).file) for text in manifests]
    with lease(warehouse, exclusive=True), open_for_writing(warehouse) as connection:
        connection.execute("BEGIN")
        connection.execute("CREATE SCHEMA IF NOT EXISTS restored")
        connection.execute(sql("restored"), {"files": files})
        connection.execute("DELETE FROM restored.usage_events WHERE period = $period", {"period": period})
        connection.execute("INSERT INTO restored.usage_events FROM read_parquet($files)", {"files": files})
        ((events,),) = connection.execute(
            "SELECT count(*) FROM restored.usage_events WHERE period = $period", {"period": period}
        ).fetchall()
        connection.execute("COMMIT")
    return {"files": len(files), "events": int(events)}
