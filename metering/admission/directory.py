"""Who calls, on which plan, in which period: read inside the transaction that decides."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from metering.admission.decide import missing_name
from metering.admission.statements import statements
from metering.errors import InvalidEvent, RevokedKey, UnknownAccount, UnknownKey
from metering.ledger.types import instant_text, parse_instant
from metering.plans import Plan
from metering.windows import Window, period_label, period_window

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Mapping
    from datetime import datetime
    from decimal import Decimal

    from metering.events import Call

__all__ = ["Directory", "Placement"]

_SQL = statements("sqlite")

LAST_USED_PRECISION = timedelta(minutes=1)


class Placement(NamedTuple):
    """Where one moment of an account falls."""

    plan_version: int
    plan: Plan
    period: Window
    label: str
    """The month the period starts in, such as `2023-11`."""


class Directory:
    """Keys, accounts and plans as the ledger has them. Plan versions never change, so each is read once."""

    def __init__(self) -> None:
        self._plans: dict[int, Plan] = {}

    def authenticate(self, cursor: sqlite3.Cursor, digest: str, now: datetime) -> tuple[str, str]:
        """Account and key id behind a key's digest; notes when the key was used. Raises UnknownKey, RevokedKey."""
        found = cursor.execute(_SQL["authenticate"], {"digest": digest}).fetchone()
        if found is None:
            raise UnknownKey
        key_id, account, expires_at, revoked_at, last_used_at = found
        if revoked_at is not None or (expires_at is not None and parse_instant(expires_at) <= now):
            raise RevokedKey(key_id, account)
        if last_used_at is None or parse_instant(last_used_at) + LAST_USED_PRECISION <= now:
            cursor.execute(_SQL["touch_key"], {"key_id": key_id, "now": instant_text(now)})
        return account, key_id

    def place(self, cursor: sqlite3.Cursor, account: str, at: datetime) -> Placement:
        """Plan version and billing period of an account at a moment. Raises `UnknownAccount`."""
        found = cursor.execute(_SQL["place"], {"account": account, "at": instant_text(at)}).fetchone()
        if found is None:
            raise UnknownAccount(account)
        time_zone, anchor_day, plan_version = found
        period = period_window(at, time_zone=time_zone, anchor_day=anchor_day)
        return Placement(plan_version, self._plan(cursor, plan_version), period, period_label(period, time_zone))

    def require_names(
        self, cursor: sqlite3.Cursor, plan_version: int, call: Call, units: Mapping[str, int | Decimal]
    ) -> None:
        """Raise `InvalidEvent` where the call leaves out the provider or model that a rate of its plan needs."""
        missing = missing_name(self._plan(cursor, plan_version), call, units)
        if missing is not None:
            name, rate = missing
            raise InvalidEvent(name, None, f"the {name}: the plan prices this usage by it ({rate})")

    def _plan(self, cursor: sqlite3.Cursor, plan_version: int) -> Plan:
        if plan_version not in self._plans:
            name, document = cursor.execute(_SQL["find_plan_version"], {"plan_version": plan_version}).fetchone()
            self._plans[plan_version] = Plan.from_dict(name, msgspec.json.decode(document))
        return self._plans[plan_version]
