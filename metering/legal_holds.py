"""Legal holds: nothing of an account is deleted or erased while it has one, by whatever rule it would go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa

from metering import checks
from metering.errors import Conflict, UnknownAccount
from metering.ledger import admin_log
from metering.ledger.schema import accounts, legal_holds
from metering.ledger.types import can_be_name

if TYPE_CHECKING:
    from datetime import datetime

    from metering.ledger import Ledger

__all__ = ["LegalHold", "holds_of", "place_hold", "release_hold"]

MAX_REASON = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class LegalHold:
    """Who put an account on hold, when and why, and who lifted it."""

    account: str
    placed_at: datetime
    placed_by: str
    reason: str
    released_at: datetime | None
    """None: it is in force."""
    released_by: str | None


def place_hold(ledger: Ledger, account: str, *, reason: str, actor: str, now: datetime) -> LegalHold:
    """From now on nothing of the account is deleted. Raises `UnknownAccount`, `InvalidEvent`, `Conflict` if it has one.

    What was deleted before is gone.
    """
    reason = checks.text("reason", reason, MAX_REASON)
    with ledger.write() as connection:
        known = sa.select(accounts.c.account).where(accounts.c.account == account)
        if not can_be_name(account) or connection.execute(known).first() is None:
            raise UnknownAccount(account)
        found = _in_force(connection, account)
        if found is not None:
            raise Conflict(f"account {account!r} is on hold since {found.placed_at.isoformat()}: {found.reason}")
        connection.execute(legal_holds.insert().values(account=account, placed_at=now, placed_by=actor, reason=reason))
        admin_log.note(connection, at=now, actor=actor, action="account.hold", subject=account, reason=reason)
        placed = _in_force(connection, account)
    assert placed is not None
    return placed


def release_hold(ledger: Ledger, account: str, *, actor: str, now: datetime) -> LegalHold:
    """Lift the hold of an account: what is over goes with the next run. Raises `Conflict` where it has none."""
    with ledger.write() as connection:
        found = _in_force(connection, account) if can_be_name(account) else None
        if found is None:
            raise Conflict(f"account {account!r} is not on hold")
        connection.execute(
            legal_holds.update()
            .where(legal_holds.c.account == account, legal_holds.c.released_at.is_(None))
            .values(released_at=now, released_by=actor)
        )
        admin_log.note(connection, at=now, actor=actor, action="account.release", subject=account, reason=found.reason)
    return LegalHold(
        account=account,
        placed_at=found.placed_at,
        placed_by=found.placed_by,
        reason=found.reason,
        released_at=now,
        released_by=actor,
    )


def holds_of(ledger: Ledger, account: str | None = None) -> list[LegalHold]:
    """Every hold that was ever placed, of one account or of all, oldest first."""
    query = sa.select(legal_holds).order_by(legal_holds.c.legal_hold)
    if account is not None:
        query = query.where(legal_holds.c.account == account if can_be_name(account) else sa.false())
    with ledger.read() as connection:
        return [_record(row) for row in connection.execute(query)]


def _in_force(connection: sa.Connection, account: str) -> LegalHold | None:
    query = sa.select(legal_holds).where(legal_holds.c.account == account, legal_holds.c.released_at.is_(None))
    row = connection.execute(query).one_or_none()
    return None if row is None else _record(row)


def _record(row: sa.Row[tuple[object, ...]]) -> LegalHold:
    return LegalHold(**{name: getattr(row, name) for name in LegalHold.__slots__})
