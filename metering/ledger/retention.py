"""What goes when its time is over: a few rows at a time, and nothing of an account on legal hold.

Every batch is a transaction of its own, so a run that was killed is finished by another one. What is due is looked for
outside of it, and its size follows the time it takes: no admission waits for long.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from metering.errors import InvalidSetting
from metering.ledger.schema import (
    closes,
    events,
    legal_holds,
    paid_probes,
    provider_probes,
    provider_windows,
    replays,
    request_log,
    spans,
)
from metering.ledger.transactions import cursor_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime

    from metering.ledger import Ledger

__all__ = ["Kept", "Rule", "Swept", "due", "held_accounts", "next_size", "rules", "shrink", "sweep"]

FIRST_SIZE = 64
LEAST_SIZE = 8
MAX_SIZE = 1_000
SLOW_S = 0.025
FAST_S = 0.010
LEAST_REST_S = 0.005
VACUUMED_PAGES = 512


_NOBODY: sa.ColumnElement[Any] = sa.null()


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """For how many days what is kept that no plan says anything about."""

    replay_days: int = 7
    """What a retry under the same idempotency key would be answered; it is for a day only."""
    span_days: int = 90
    """Traced spans; of an account also not before its period is closed, because they are what it is reconciled with."""
    observation_days: int = 90
    """Probes of providers' limits, what they found, and what they cost."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not 0 <= getattr(self, name) <= 36_500:
                raise InvalidSetting(name, getattr(self, name), "0 to 36500 days")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Which rows of a table go."""

    table: sa.Table
    keys: tuple[sa.Column[Any], ...]
    """In the order of which they go; they tell one row from another."""
    is_due: sa.ColumnElement[bool]
    account: sa.ColumnElement[str | None]
    """Whose a row is; NULL where it is nobody's."""
    source: Any
    """The table, joined with what tells whose its rows are."""
    children: tuple[sa.Column[Any], ...] = ()
    """Columns of other tables that refer to the first key, and go first."""
    emptied: tuple[sa.Column[Any], ...] = ()
    """What goes of a row that stays; empty where the whole row goes."""


@dataclass(slots=True, kw_only=True)
class Swept:
    """What went of a table."""

    gone: Counter[str | None] = field(default_factory=Counter)
    """Rows by account; None is nobody's."""
    longest_s: float = 0.0
    """The longest time for which a batch kept other writers out."""


def rules(now: datetime, kept: Kept) -> list[Rule]:
    """What is over at a moment, table by table."""
    closed_to = sa.select(sa.func.max(closes.c.period_end)).where(closes.c.account == spans.c.account)
    traced_at = sa.func.coalesce(spans.c.ended_at, spans.c.started_at, spans.c.recorded_at)
    return [
        Rule(
            table=request_log,
            keys=(request_log.c.expires_at, request_log.c.log_id),
            is_due=request_log.c.expires_at <= now,
            account=request_log.c.account,
            source=request_log,
        ),
        Rule(
            table=replays,
            keys=(replays.c.stored_at, replays.c.event_id),
            is_due=replays.c.stored_at <= now - timedelta(days=kept.replay_days),
            account=events.c.account,
            source=replays.outerjoin(events, events.c.event_id == replays.c.event_id),
        ),
        Rule(
            table=spans,
            keys=(spans.c.seq,),
            is_due=sa.and_(
                spans.c.recorded_at <= now - timedelta(days=kept.span_days),
                sa.or_(spans.c.account.is_(None), traced_at < closed_to.scalar_subquery()),
            ),
            account=spans.c.account,
            source=spans,
        ),
        Rule(
            table=provider_probes,
            keys=(provider_probes.c.seq,),
            is_due=provider_probes.c.checked_at <= now - timedelta(days=kept.observation_days),
            account=_NOBODY,
            source=provider_probes,
            children=(provider_windows.c.seq,),
        ),
        Rule(
            table=paid_probes,
            keys=tuple(paid_probes.primary_key.columns),
            is_due=paid_probes.c.asked_at <= now - timedelta(days=kept.observation_days),
            account=_NOBODY,
            source=paid_probes,
        ),
    ]


def due(connection: sa.Connection, rule: Rule) -> tuple[Counter[str | None], Counter[str | None]]:
    """How many rows of each account are due; and how many a legal hold keeps."""
    query = (
        sa.select(rule.account.label("account"), sa.func.count().label("rows"))
        .select_from(rule.source)
        .where(rule.is_due)
        .group_by(sa.literal_column("1"))
    )
    found = {account: int(rows) for account, rows in connection.execute(query)}
    held = held_accounts(connection)
    goes, stays = ({a: n for a, n in found.items() if (a in held) == is_held} for is_held in (False, True))
    return Counter(goes), Counter(stays)


def no_one(gone: int) -> None:
    """Nobody is told how far it is."""


def sweep(
    ledger: Ledger,
    rule: Rule,
    *,
    told: Callable[[int], object] = no_one,
    rest: Callable[[float], None] = time.sleep,
) -> Swept:
    """Delete what is due. `told` is called with the rows that went so far.

    After each batch it rests as long as that took, or other writers would seldom find the ledger free: SQLite's waiting
    ones look now and then, in no order.
    """
    swept = Swept()
    after: Sequence[Any] | None = None
    size = FIRST_SIZE
    while True:
        with ledger.read() as connection:
            page = connection.execute(_page(rule, after, size)).all()
        if not page:
            return swept
        *after, _ = page[-1]
        with ledger.write() as connection:
            began = time.monotonic()
            held = held_accounts(connection)
            going = [row for row in page if row[-1] not in held]
            gone = _delete(connection, rule, going)
            worked_s = time.monotonic() - began
        took_s = time.monotonic() - began
        swept.gone.update(gone)
        swept.longest_s = max(swept.longest_s, took_s)
        told(swept.gone.total())
        size = next_size(size, worked_s)
        rest(max(took_s, LEAST_REST_S))


def held_accounts(connection: sa.Connection) -> set[str]:
    """Those that have a legal hold."""
    return set(
        connection.execute(sa.select(legal_holds.c.account).where(legal_holds.c.released_at.is_(None))).scalars()
    )


def next_size(size: int, worked_s: float) -> int:
    """How much to do at once, if `size` took so long, without the commit, which takes its time for a row as for many.

    Rows may be of 100 bytes or of 100 KB, and disks differ.
    """
    if worked_s > SLOW_S:
        return max(LEAST_SIZE, size // 2)
    return min(MAX_SIZE, size * 2) if worked_s < FAST_S else size


def shrink(ledger: Ledger, *, rest: Callable[[float], None] = time.sleep) -> int:
    """Give what was deleted back to the disk, a few pages at a time; how many pages. On SQLite, see `doctor`.

    Postgres does it by dropping partitions, and its autovacuum uses the space of the rest again.
    """
    if ledger.dialect != "sqlite":
        return 0
    size, returned = FIRST_SIZE, 0
    while True:
        with ledger.write() as connection:
            began = time.monotonic()
            cursor = cursor_of(connection)
            (before,) = cursor.execute("PRAGMA freelist_count").fetchone()
            for _ in range(min(size, before)):
                cursor.execute("PRAGMA incremental_vacuum(1)")  # of more pages the driver would take one as well
            (left,) = cursor.execute("PRAGMA freelist_count").fetchone()
            worked_s = time.monotonic() - began
        took_s = time.monotonic() - began
        returned += before - left
        if left in (0, before):
            return int(returned)
        size = min(VACUUMED_PAGES, next_size(size, worked_s))
        rest(max(took_s, LEAST_REST_S))


def _page(rule: Rule, after: Sequence[Any] | None, size: int) -> sa.Select[Any]:
    held = sa.select(legal_holds.c.account).where(legal_holds.c.released_at.is_(None))
    query = (
        sa.select(*rule.keys, rule.account.label("account"))
        .select_from(rule.source)
        .where(rule.is_due, sa.or_(rule.account.is_(None), rule.account.not_in(held)))
        .order_by(*rule.keys)
        .limit(size)
    )
    if after is None:
        return query
    values = (sa.literal(value, key.type) for value, key in zip(after, rule.keys, strict=True))
    return query.where(sa.tuple_(*rule.keys) > sa.tuple_(*values))


def _delete(connection: sa.Connection, rule: Rule, rows: Sequence[Sequence[Any]]) -> Counter[str | None]:
    if not rows:
        return Counter()
    *keys, last = rule.keys
    conditions = [last.in_([row[len(keys)] for row in rows])]
    if len(keys) == 1:  # a day of the request log is one partition: others are not looked into
        conditions.append(keys[0].between(rows[0][0], rows[-1][0]))
    elif keys:
        conditions = [sa.tuple_(*rule.keys).in_([tuple(row[: len(rule.keys)]) for row in rows])]
    for child in rule.children:
        connection.execute(child.table.delete().where(child.in_([row[0] for row in rows])))
    owners = {tuple(row[:-1]): row[-1] for row in rows}
    change: Any = rule.table.delete()
    if rule.emptied:
        change = rule.table.update().values(dict.fromkeys(column.name for column in rule.emptied))
    gone = connection.execute(change.where(*conditions).returning(*rule.keys))
    return Counter(owners[tuple(row)] for row in gone)
