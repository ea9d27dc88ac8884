"""What the ledger knows of a fact: its events and corrections, holds, request log, key reuses and dead letters."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

import msgspec
import sqlalchemy as sa

from metering.admission.redis.stream import decode_event, decode_header
from metering.events import TOKEN_FIELDS, derive_event_id
from metering.ledger.schema import (
    api_keys,
    dead_letters,
    event_costs,
    event_ids,
    events,
    holds,
    key_reuses,
    plan_versions,
    request_log,
)
from metering.ledger.types import can_be_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from decimal import Decimal

    from metering.history.redis import OnRedis

__all__ = [
    "DeadLetter",
    "EventRow",
    "Held",
    "KeyReuse",
    "KeyShown",
    "Known",
    "LogRow",
    "Place",
    "find_places",
    "read_place",
]

KINDS = ("usage", "signal", "import")
"""Those whose ids derive from a key."""
IDS_AT_ONCE = 500
SKEW = timedelta(hours=1)
"""An entry of the request log has the time of its app, and an event that of the store."""


@dataclass(slots=True, kw_only=True)
class Place:
    """Where to look: an account, a line, and the ids of the calls that are asked for."""

    account: str
    line: str
    idempotency_key: str | None
    roots: set[UUID] = field(default_factory=set)

    def has(self, entry: OnRedis) -> bool:
        """Whether an entry of a stream is of these calls."""
        named = (entry.account, entry.line, entry.idempotency_key)
        return entry.event_id in self.roots or named == (self.account, self.line, self.idempotency_key)


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRow:
    """An event of the ledger, with its cost."""

    seq: int
    event_id: UUID
    became: str
    """`usage`, `signal`, `import`, `reversal`, `replacement`, `key used again`, or `second attempt`."""
    corrects: UUID | None
    reason: str | None
    """Why it was corrected."""
    key_id: str | None
    plan: str | None
    version: int | None
    """Of the plan, from 1."""
    plan_version: int
    """The ledger's number of that version."""
    line: str
    operation: str | None
    caller_type: str
    occurred_at: datetime
    """When the call was admitted; of a signal or an import, when it happened."""
    recorded_at: datetime
    period: str
    requests: int
    """1, or -1 of a reversal."""
    quantity: Decimal
    tokens: dict[str, int]
    """Those that are not 0."""
    provider: str | None
    model: str | None
    service_tier: str | None
    run_id: str | None
    request_id: str | None
    session_id: str | None
    billable: bool
    estimated: bool
    counted: bool
    """Asked the limits."""
    late: bool
    error: str | None
    latency_ms: int | None
    source: str | None
    position: str | None
    """Where it stood in Redis: SHARD/EPOCH/STREAM ID."""
    cost: Decimal | None
    """What the provider charges, in USD; None where no price is known, or it is not costed yet."""
    price_version: str | None
    costed_at: datetime | None
    """None: the jobs have not seen it yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Quota that was reserved for a call."""

    hold_id: UUID
    event_id: UUID
    where: str
    """`ledger` or `redis`."""
    state: str
    """`open`, `settled`, `released` or `expired`."""
    key_id: str | None
    admitted_at: datetime | None
    """None where Redis keeps it no more: the hold has ended."""
    expires_at: datetime | None
    reserved: dict[str, str]
    """Amounts by metric."""
    settled_event_id: UUID | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LogRow:
    """That there is an entry of the request log. `tallystick log` shows its bodies."""

    logged_at: datetime
    event_id: UUID | None
    hold_id: UUID | None
    has_request: bool
    has_response: bool
    error: str | None
    latency_ms: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyReuse:
    """The key was used again after Redis had forgotten it."""

    position: str
    noticed_at: datetime
    billed_as: UUID | None
    """None: it was the same request, and not billed again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """What stood in Redis and could not be billed as it was."""

    dead_letter_id: int
    position: str
    noticed_at: datetime
    error: str
    resolved_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyShown:
    """An API key, without its secret."""

    key_id: str
    begins: str
    ends: str
    label: str | None
    revoked_at: datetime | None


class Known(NamedTuple):
    """All of one place."""

    keys: tuple[KeyShown, ...]
    events: tuple[EventRow, ...]
    holds: tuple[Held, ...]
    log: tuple[LogRow, ...]
    reuses: tuple[KeyReuse, ...]
    dead_letters: tuple[DeadLetter, ...]

    def took(self, position: str) -> bool:
        """Whether the ledger has what stood at a place of Redis."""
        rows: list[Any] = [*self.events, *self.reuses, *self.dead_letters]
        return any(row.position == position for row in rows)


def find_places(
    connection: sa.Connection, key: str, event_id: UUID | None, *, account: str | None, line: str | None
) -> dict[tuple[str, str, str | None], Place]:
    """Where a text is an idempotency key, and where it is the id of an event or of a correction of it."""
    places = {}
    if event_id is not None:
        for place in _of_event(connection, event_id):
            if account in (None, place.account) and line in (None, place.line):
                places[place.account, place.line, place.idempotency_key] = place
    if all(can_be_name(name) for name in (key, account or key, line or key)):
        for found in _of_key(connection, key, account, line):
            place = places.setdefault((*found, key), Place(account=found[0], line=found[1], idempotency_key=key))
            place.roots.update(derive_event_id(kind, *found, key) for kind in KINDS)
    return places


def read_place(connection: sa.Connection, place: Place, on_redis: Iterable[Held] = ()) -> Known:
    """All that the ledger has of a place. `on_redis` are its holds there."""
    roots = set(place.roots)
    if place.idempotency_key is not None:
        query = _within(sa.select(events.c.event_id), events, place.account, place.line)
        roots.update(connection.execute(query.where(events.c.idempotency_key == place.idempotency_key)).scalars())
    reused = connection.execute(sa.select(key_reuses).where(key_reuses.c.event_id.in_(roots))).all()
    held = connection.execute(
        sa.select(holds)
        .where(holds.c.account == place.account, holds.c.event_id.in_(roots))
        .order_by(holds.c.admitted_at)
    ).all()
    again = {row.billed_as for row in reused if row.billed_as is not None}
    every: list[Any] = [*held, *on_redis]
    attempts = {derive_event_id("attempt", hold.hold_id.hex) for hold in every}
    roots |= again | attempts
    found = _events(connection, roots, again, attempts)
    hold_ids = [hold.hold_id for hold in every]
    times = [row.occurred_at for row in found] + [hold.admitted_at for hold in every if hold.admitted_at]
    log = _log(connection, place.account, [row.event_id for row in found], hold_ids, min(times) - SKEW) if times else ()
    key_ids = {row.key_id for row in (*found, *every) if row.key_id is not None}
    return Known(
        keys=_keys(connection, key_ids),
        events=found,
        holds=tuple(
            Held(
                hold_id=row.hold_id,
                event_id=row.event_id,
                where="ledger",
                state=row.state,
                key_id=row.key_id,
                admitted_at=row.admitted_at,
                expires_at=row.expires_at,
                reserved=msgspec.json.decode(row.reserved),
                settled_event_id=row.settled_event_id,
            )
            for row in held
        ),
        log=log,
        reuses=tuple(
            KeyReuse(position=row.position, noticed_at=row.noticed_at, billed_as=row.billed_as) for row in reused
        ),
        dead_letters=tuple(
            _letter(dead.row) for dead in _dead(connection, place.account) if _is_of(dead, place, roots)
        ),
    )


def _of_key(connection: sa.Connection, key: str, account: str | None, line: str | None) -> Iterator[tuple[str, str]]:
    """Accounts and lines where a key was used. Holds do not have it: theirs is told by the id that derives from it."""
    if account is not None and line is not None:
        yield account, line
        return
    billed = _within(sa.select(events.c.account, events.c.line), events, account, line)
    for row in connection.execute(billed.where(events.c.idempotency_key == key).distinct()):
        yield row.account, row.line
    for dead in _dead(connection, account):
        if dead.event is not None and dead.event.idempotency_key == key and line in (None, dead.event.line):
            yield dead.event.account, dead.event.line
    pairs = connection.execute(_within(sa.select(holds.c.account, holds.c.line), holds, account, line).distinct())
    ids = {derive_event_id("usage", row.account, row.line, key): (row.account, row.line) for row in pairs}
    for chunk in _chunks(ids):
        for held in connection.execute(sa.select(holds.c.event_id).where(holds.c.event_id.in_(chunk))):
            yield ids[held.event_id]


def _of_event(connection: sa.Connection, event_id: UUID) -> Iterator[Place]:
    """Where an id leads: by way of what it corrects, and of the key it was billed under."""
    query = sa.select(events.c.corrects, events.c.event_id).where(events.c.event_id == event_id)
    row = connection.execute(query).first()
    root = event_id if row is None else row.corrects or row.event_id
    first = sa.select(key_reuses.c.event_id).where(key_reuses.c.billed_as == root)
    root = connection.execute(first).scalar() or root
    columns = (events.c.account, events.c.line, events.c.idempotency_key)
    original = connection.execute(sa.select(*columns).where(events.c.event_id == root)).first()
    if original is not None:
        place = Place(account=original.account, line=original.line, idempotency_key=original.idempotency_key)
        place.roots.add(root)
        yield place
        return
    for held in connection.execute(sa.select(holds.c.account, holds.c.line).where(holds.c.event_id == root).distinct()):
        yield Place(account=held.account, line=held.line, idempotency_key=None, roots={root})
    for dead in _dead(connection, None):
        if dead.event is not None and dead.event_id == root.hex:
            event = dead.event
            yield Place(account=event.account, line=event.line, idempotency_key=event.idempotency_key, roots={root})


def _within(query: Any, table: sa.Table, account: str | None, line: str | None) -> Any:
    if account is not None:
        query = query.where(table.c.account == account)
    return query if line is None else query.where(table.c.line == line)


def _events(connection: sa.Connection, roots: set[UUID], again: set[UUID], attempts: set[UUID]) -> tuple[EventRow, ...]:
    query = (
        sa.select(
            events,
            event_ids.c.position,
            event_costs.c.cost,
            event_costs.c.price_version,
            event_costs.c.costed_at,
            plan_versions.c.plan,
            plan_versions.c.version,
        )
        .outerjoin(event_ids, event_ids.c.event_id == events.c.event_id)
        .outerjoin(event_costs, event_costs.c.seq == events.c.seq)
        .outerjoin(plan_versions, plan_versions.c.plan_version == events.c.plan_version)
        .where(sa.or_(events.c.event_id.in_(roots), events.c.corrects.in_(roots)))
        .order_by(events.c.seq)
    )

    def became(row: Any) -> str:
        if row.kind == "correction":
            return "reversal" if row.requests < 0 else "replacement"
        if row.event_id in again:
            return "key used again"
        return "second attempt" if row.event_id in attempts else str(row.kind)

    return tuple(
        EventRow(
            became=became(row),
            tokens={name: getattr(row, name) for name in TOKEN_FIELDS if getattr(row, name)},
            **{name: getattr(row, name) for name in EventRow.__slots__ if name not in ("became", "tokens")},
        )
        for row in connection.execute(query)
    )


def _log(
    connection: sa.Connection, account: str, ids: list[UUID], hold_ids: list[UUID], since: datetime
) -> tuple[LogRow, ...]:
    named = sa.or_(request_log.c.event_id.in_(ids), request_log.c.hold_id.in_(hold_ids))
    query = (
        sa.select(
            *(request_log.c[name] for name in ("logged_at", "event_id", "hold_id", "error", "latency_ms")),
            request_log.c.request.is_not(None).label("has_request"),
            request_log.c.response.is_not(None).label("has_response"),
        )
        .where(request_log.c.account == account, request_log.c.logged_at >= since, named)
        .order_by(request_log.c.logged_at, request_log.c.log_id)
    )
    return tuple(LogRow(**row) for row in connection.execute(query).mappings())


def _keys(connection: sa.Connection, key_ids: set[str]) -> tuple[KeyShown, ...]:
    query = sa.select(api_keys).where(api_keys.c.key_id.in_(key_ids)).order_by(api_keys.c.created_at)
    return tuple(
        KeyShown(
            key_id=row.key_id,
            begins=row.prefix,
            ends=row.last_four,
            label=row.label,
            revoked_at=row.revoked_at,
        )
        for row in connection.execute(query)
    )


class _Dead(NamedTuple):
    row: Any
    event_id: str | None
    """In hexadecimal; None where it cannot be read."""
    event: Any
    """None where it cannot be read."""


def _dead(connection: sa.Connection, account: str | None) -> Iterator[_Dead]:
    """Dead letters of an account or of all, with those of which nobody knows whose they are. There are few."""
    query = sa.select(dead_letters).order_by(dead_letters.c.dead_letter_id)
    if account is not None:
        query = query.where(sa.or_(dead_letters.c.account == account, dead_letters.c.account.is_(None)))
    for row in connection.execute(query):
        event_id = event = None
        try:
            event_id = decode_header(row.header).event_id
            event = decode_event(row.body)
        except msgspec.MsgspecError:
            pass
        yield _Dead(row, event_id, event)


def _is_of(dead: _Dead, place: Place, roots: set[UUID]) -> bool:
    if dead.event_id is not None and UUID(dead.event_id) in roots:
        return True
    named = (place.account, place.line, place.idempotency_key)
    event = dead.event
    return (
        event is not None
        and place.idempotency_key is not None
        and named == (event.account, event.line, event.idempotency_key)
    )


def _letter(row: Any) -> DeadLetter:
    return DeadLetter(**{name: getattr(row, name) for name in DeadLetter.__slots__})


def _chunks(ids: Iterable[UUID]) -> Iterator[list[UUID]]:
    every = list(ids)
    for start in range(0, len(every), IDS_AT_ONCE):
        yield every[start : start + IDS_AT_ONCE]
