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
    from collections.abc import Mapping
    from datetime import datetime
    from decimal import Decimal

    from metering.events import Call
    from metering.ledger.transactions import Cursor

__all__ = ["CurrentDirectory", "Directory", "Placement"]

_SQL = statements()

LAST_USED_PRECISION = timedelta(minutes=1)

MOST_REMEMBERED = 10_000
"""Keys and accounts, together."""


class Placement(NamedTuple):
    """Where one moment of an account falls."""

    plan_version: int
    plan: Plan
    period: Window
    label: str
    """The month the period starts in, such as `2023-11`."""


class _Key(NamedTuple):
    key_id: str
    account: str
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None


class Directory:
    """Keys, accounts and plans as the ledger has them. Plan versions never change, so each is read once."""

    def __init__(self) -> None:
        self._plans: dict[int, Plan] = {}

    def authenticate(self, cursor: Cursor, digest: str, now: datetime) -> tuple[str, str]:
        """Account and key id behind a key's digest; notes when the key was used. Raises UnknownKey, RevokedKey."""
        key = self._key(cursor, digest)
        if key.revoked_at is not None or (key.expires_at is not None and key.expires_at <= now):
            raise RevokedKey(key.key_id, key.account)
        if key.last_used_at is None or key.last_used_at + LAST_USED_PRECISION <= now:
            cursor.execute(_SQL["touch_key"], {"key_id": key.key_id, "now": instant_text(now)})
            self._forget(digest)
        return key.account, key.key_id

    def place(self, cursor: Cursor, account: str, at: datetime) -> Placement:
        """Plan version and billing period of an account at a moment. Raises `UnknownAccount`."""
        found = cursor.execute(_SQL["place"], {"account": account, "at": instant_text(at)}).fetchone()
        if found is None:
            raise UnknownAccount(account)
        time_zone, anchor_day, plan_version = found
        period = period_window(at, time_zone=time_zone, anchor_day=anchor_day)
        return Placement(plan_version, self._plan(cursor, plan_version), period, period_label(period, time_zone))

    def require_names(self, cursor: Cursor, plan_version: int, call: Call, units: Mapping[str, int | Decimal]) -> None:
        """Raise `InvalidEvent` where the call leaves out the provider or model that a rate of its plan needs."""
        missing = missing_name(self._plan(cursor, plan_version), call, units)
        if missing is not None:
            name, rate = missing
            raise InvalidEvent(name, None, f"the {name}: the plan prices this usage by it ({rate})")

    def log_expiry(self, cursor: Cursor, account: str, logged_at: datetime) -> datetime:
        """When a row of the request log goes: by the plan in force when it was logged. Raises `UnknownAccount`."""
        return logged_at + timedelta(days=self.place(cursor, account, logged_at).plan.retention_days)

    def _key(self, cursor: Cursor, digest: str) -> _Key:
        found = cursor.execute(_SQL["authenticate"], {"digest": digest}).fetchone()
        if found is None:
            raise UnknownKey
        key_id, account, *times = found
        return _Key(key_id, account, *(None if time is None else parse_instant(time) for time in times))

    def _forget(self, digest: str) -> None:
        """What was read of a key is no longer so."""

    def _plan(self, cursor: Cursor, plan_version: int) -> Plan:
        if plan_version not in self._plans:
            name, document = cursor.execute(_SQL["find_plan_version"], {"plan_version": plan_version}).fetchone()
            self._plans[plan_version] = Plan.from_dict(name, msgspec.json.decode(document))
        return self._plans[plan_version]


class CurrentDirectory(Directory):
    """The directory of the ledger's writer, one transaction after the other on its one connection.

    The writer itself changes no account, plan or key but for `last_used_at`, so what was read stays true until another
    connection, of this process or another, has committed anything. SQLite tells.
    """

    def __init__(self) -> None:
        super().__init__()
        self._cursor: Cursor | None = None
        self._version: int | None = None
        self._keys: dict[str, _Key] = {}
        self._places: dict[str, tuple[datetime, datetime, Placement]] = {}

    def authenticate(self, cursor: Cursor, digest: str, now: datetime) -> tuple[str, str]:
        """See `Directory.authenticate`. Comes first in every transaction: what is no longer true is forgotten here."""
        if cursor is not self._cursor:
            self._begin(cursor)
        return super().authenticate(cursor, digest, now)

    def place(self, cursor: Cursor, account: str, at: datetime) -> Placement:
        """See `Directory.place`."""
        known = self._places.get(account)
        if known is not None and known[0] <= at < known[1]:
            return known[2]
        placed = super().place(cursor, account, at)
        scope = {"account": account, "plan": placed.plan.name, "at": instant_text(at)}
        since, until = cursor.execute(_SQL["find_plan_changes"], scope).fetchone()
        start = max(parse_instant(since), placed.period.start)
        end = placed.period.end if until is None else min(parse_instant(until), placed.period.end)
        self._places[account] = start, end, placed
        return placed

    def _begin(self, cursor: Cursor) -> None:
        (version,) = cursor.execute(_SQL["find_changes_by_others"]).fetchone()
        is_known = self._cursor is not None and self._cursor.connection is cursor.connection
        if not is_known or version != self._version or len(self._keys) + len(self._places) > MOST_REMEMBERED:
            self._keys.clear()
            self._places.clear()
        self._cursor, self._version = cursor, version

    def _key(self, cursor: Cursor, digest: str) -> _Key:
        key = self._keys.get(digest)
        if key is None:
            key = self._keys[digest] = super()._key(cursor, digest)
        return key

    def _forget(self, digest: str) -> None:
        del self._keys[digest]
