"""Who changed what: written in the transaction of the change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import sqlalchemy as sa

from metering.ledger.schema import admin_log

if TYPE_CHECKING:
    from datetime import datetime

__all__ = ["AdminEntry", "entries", "note"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdminEntry:
    """One change: `actor` did `action` (such as `key.revoke`) to `subject`."""

    entry: int
    logged_at: datetime
    actor: str
    action: str
    subject: str
    details: dict[str, Any]


def note(connection: sa.Connection, *, at: datetime, actor: str, action: str, subject: str, **details: Any) -> None:
    """Write one entry."""
    connection.execute(
        admin_log.insert().values(
            logged_at=at,
            actor=actor,
            action=action,
            subject=subject,
            details=msgspec.json.encode(details, order="sorted").decode(),
        )
    )


def entries(connection: sa.Connection, *, limit: int) -> list[AdminEntry]:
    """The newest entries first."""
    rows = connection.execute(sa.select(admin_log).order_by(admin_log.c.entry.desc()).limit(limit)).mappings()
    return [AdminEntry(**{**row, "details": msgspec.json.decode(row["details"])}) for row in rows]
