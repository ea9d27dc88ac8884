"""Which events have left the ledger for an archive: what can no longer be counted or corrected says so."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa

from metering.errors import EventsArchived
from metering.ledger.schema import archives, event_ids

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime
    from uuid import UUID

__all__ = ["archived_periods", "has_archives", "refuse_archived"]


def has_archives(connection: sa.Connection, accounts: str | sa.Select[str], since: datetime | None = None) -> bool:
    """Whether events of an account, or of any of these, that occurred at a time or later are archived."""
    query = sa.select(archives.c.part).limit(1)
    query = query.where(
        archives.c.account == accounts if isinstance(accounts, str) else archives.c.account.in_(accounts)
    )
    if since is not None:
        query = query.where(archives.c.last_at >= since)
    return connection.execute(query).first() is not None


def refuse_archived(connection: sa.Connection, account: str, start: datetime | None, end: datetime | None) -> None:
    """Raise `EventsArchived` where events of an account that occurred in [start, end) are archived."""
    query = sa.select(archives.c.period, archives.c.last_at).where(archives.c.account == account)
    if start is not None:
        query = query.where(archives.c.last_at >= start)
    if end is not None:
        query = query.where(archives.c.first_at < end)
    found = connection.execute(query.order_by(archives.c.last_at.desc()).limit(1)).first()
    if found is not None:
        raise EventsArchived(account, found.period, found.last_at)


def archived_periods(connection: sa.Connection, event_ids_asked: Iterable[UUID]) -> list[str]:
    """The periods of those ids that were billed, oldest first."""
    query = sa.select(event_ids.c.period).where(event_ids.c.event_id.in_(list(event_ids_asked))).distinct()
    return sorted(connection.execute(query).scalars())
