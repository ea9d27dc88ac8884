"""Raw events of closed periods: archived, verified, and only then deleted; a few rows at a time.

An archive is of one account, because a legal hold and an erasure are. A run that was killed leaves a file that no row
of `archives` names, which is written again, or a row whose events are still there, which the next run deletes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import msgspec
import sqlalchemy as sa

from metering.ledger import admin_log
from metering.ledger.locks import hold_still
from metering.ledger.retention import FIRST_SIZE, LEAST_REST_S, held_accounts, next_size
from metering.ledger.schema import archives, closes, counters, event_costs, events, frozen_inputs
from metering.ledger.types import instant_text
from tasks.archive_files import (
    ARCHIVED,
    Manifest,
    as_texts,
    check_file,
    numbers_in,
    place_of,
    sums_by_group,
    write_archive,
    write_manifest,
)
from tasks.costs import _COMMIT_XID
from tasks.errors import ArchiveError, JobError
from tasks.warehouse import sql

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from metering.ledger import Ledger

__all__ = [
    "Archived",
    "DuePeriod",
    "archive_period",
    "archived_sums",
    "changed_archives",
    "delete_archived",
    "due_periods",
]

EVENTS_AT_ONCE = 5_000
SETTLED = timedelta(days=32)
"""No window that limits are counted over is longer, so none that is open reaches into what is archived."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DuePeriod:
    """A closed period of an account whose events are to leave the ledger."""

    account: str
    period: str
    start: datetime
    end: datetime
    events: int
    """How many were billed and are not archived yet."""
    part: int
    is_held: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Archived:
    """Events that left the ledger."""

    account: str
    period: str
    events: int


class _Frozen(msgspec.Struct):
    """What is needed of `PeriodInputs`."""

    events: int
    period_start: datetime
    period_end: datetime


def due_periods(ledger: Ledger, now: datetime, after_days: int) -> Iterator[DuePeriod]:
    """Periods that were closed so many days ago, with billed events that are in no archive yet."""
    with ledger.read() as connection:
        closed = connection.execute(
            sa.select(closes.c.account, closes.c.period)
            .where(closes.c.closed_at <= now - timedelta(days=after_days), closes.c.period_end <= now - SETTLED)
            .order_by(closes.c.close)
        ).all()
        held = held_accounts(connection)
    for account, period in closed:
        with ledger.read() as connection:
            frozen = _frozen(connection, account, period)
            parts, archived = connection.execute(
                sa.select(
                    sa.func.count(), sa.cast(sa.func.coalesce(sa.func.sum(archives.c.events), 0), sa.BigInteger)
                ).where(archives.c.account == account, archives.c.period == period)
            ).one()
        if frozen.events > archived:
            yield DuePeriod(
                account=account,
                period=period,
                start=frozen.period_start,
                end=frozen.period_end,
                events=frozen.events - archived,
                part=parts,
                is_held=account in held,
            )


def archive_period(ledger: Ledger, folder: Path, due: DuePeriod, now: datetime) -> bool:
    """Write the archive of a period, read it back, and note it; nothing is deleted yet.

    False where what the ledger has is not what was billed: something came late, and is archived once it is billed too.
    Raises `ArchiveError` where what was written is not what is in the ledger.
    """
    path = folder / place_of(due.account, due.period, due.part)
    with ledger.read() as connection:
        mark = _mark(connection)
        sums = _ledger_sums(connection, due)
        if int(sums["events"]) != due.events or _has_uncosted(connection, due):
            return False
        length, digest = write_archive(path, _pages(connection, due))
    manifest = Manifest(
        ledger_id=ledger.ledger_id.hex,
        account=due.account,
        period=due.period,
        part=due.part,
        file=str(path.relative_to(folder)),
        made_at=instant_text(now),
        bytes=length,
        sha256=digest,
        events=due.events,
        seq_from=int(sums.pop("seq_from")),
        seq_to=int(sums.pop("seq_to")),
        first_at=sums.pop("first_at"),
        last_at=sums.pop("last_at"),
        sums={name: value for name, value in sums.items() if name != "events"},
    )
    write_manifest(path, manifest.text())
    check_file(folder, manifest.text(), thoroughly=True)
    return _note(ledger, due, manifest, mark, now)


def delete_archived(
    ledger: Ledger, folder: Path, now: datetime, *, rest: Callable[[float], None] = time.sleep
) -> tuple[list[Archived], list[str]]:
    """Delete the events of archives, each after its file was read again; what went, and what is wrong with files.

    Only what is in the file goes, and nothing of an account on legal hold. Ids stay in `event_ids` for ever.
    """
    with ledger.read() as connection:
        left = connection.execute(
            sa.select(archives)
            .where(archives.c.deleted_at.is_(None))
            .order_by(archives.c.account, archives.c.period, archives.c.part)
        ).all()
    done, problems = [], []
    for row in left:
        try:
            check_file(folder, row.manifest, thoroughly=False)
        except ArchiveError as exc:
            problems.append(str(exc))
            continue
        gone, is_whole = _delete(ledger, folder / row.file, row.account, rest)
        if is_whole:
            with ledger.write() as connection:
                connection.execute(archives.update().where(*_is(row)).values(deleted_at=now))
        if gone:
            done.append(Archived(account=row.account, period=row.period, events=gone))
    return done, problems


def changed_archives(ledger: Ledger, folder: Path) -> list[str]:
    """Which archives are no longer what was archived, by file; empty if none."""
    with ledger.read() as connection:
        query = sa.select(archives.c.manifest).order_by(archives.c.account, archives.c.period, archives.c.part)
        manifests = connection.execute(query).scalars().all()
    differences = []
    for text in manifests:
        try:
            check_file(folder, text, thoroughly=True)
        except ArchiveError as exc:
            differences.append(str(exc))
    return differences


def archived_sums(connection: sa.Connection, folder: Path, period: str) -> list[dict[str, Any]]:
    """Billable usage of a period that has left the ledger, as `ledger_sums.sql` has that of the others.

    Raises `ArchiveError` for a file that was changed, `JobError` while events are both here and there.
    """
    found = connection.execute(
        sa.select(archives.c.manifest, archives.c.deleted_at).where(archives.c.period == period)
    ).all()
    if any(row.deleted_at is None for row in found):
        raise JobError(f"some events of {period} are archived and not deleted yet: run enforce-retention first")
    files = [str(folder / check_file(folder, row.manifest, thoroughly=False).file) for row in found]
    return sums_by_group(files) if files else []


def _frozen(connection: sa.Connection, account: str, period: str) -> _Frozen:
    query = (
        sa.select(frozen_inputs.c.inputs)
        .where(frozen_inputs.c.account == account, frozen_inputs.c.period == period)
        .order_by(frozen_inputs.c.revision.desc())
        .limit(1)
    )
    return msgspec.json.decode(connection.execute(query).scalar_one(), type=_Frozen)


def _of(due: DuePeriod) -> Sequence[sa.ColumnElement[bool]]:
    return (
        events.c.account == due.account,
        events.c.period == due.period,
        events.c.occurred_at >= due.start,
        events.c.occurred_at < due.end,
    )


def _has_uncosted(connection: sa.Connection, due: DuePeriod) -> bool:
    query = sa.select(events.c.seq).outerjoin(event_costs, event_costs.c.seq == events.c.seq)
    return connection.execute(query.where(*_of(due), event_costs.c.seq.is_(None)).limit(1)).first() is not None


def _ledger_sums(connection: sa.Connection, due: DuePeriod) -> dict[str, str]:
    query = sql("archive_ledger_sums")
    if connection.dialect.name == "postgresql":
        query = query.replace("exact_sum(", "sum(")  # which is exact there
    values = {"account": due.account, "period": due.period, "start": due.start, "end": due.end}
    texts = {name: instant_text(value) if isinstance(value, datetime) else value for name, value in values.items()}
    return as_texts(dict(connection.execute(sa.text(query), texts).mappings().one()))


def _pages(connection: sa.Connection, due: DuePeriod) -> Iterator[Sequence[sa.RowMapping]]:
    order = (events.c.occurred_at, events.c.seq)
    query = (
        sa.select(*ARCHIVED)
        .join_from(events, event_costs, event_costs.c.seq == events.c.seq)
        .where(*_of(due))
        .order_by(*order)
        .limit(EVENTS_AT_ONCE)
    )
    after: tuple[Any, ...] | None = None
    while True:
        beyond = () if after is None else (sa.tuple_(*order) > sa.tuple_(*after),)
        page = connection.execute(query.where(*beyond)).mappings().all()
        if not page:
            return
        yield page
        last = page[-1]
        after = sa.literal(last["occurred_at"], events.c.occurred_at.type), sa.literal(last["seq"])


def _mark(connection: sa.Connection) -> int:
    """What is written after this moment is beyond it."""
    on_postgres = connection.dialect.name == "postgresql"
    query = (
        "SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint - 1"
        if on_postgres
        else "SELECT coalesce(max(seq), 0) FROM events"
    )
    return int(connection.exec_driver_sql(query).scalar_one())


def _note(ledger: Ledger, due: DuePeriod, manifest: Manifest, mark: int, now: datetime) -> bool:
    """Note a verified archive, unless something came meanwhile. From then on nothing in it is corrected any more."""
    with ledger.write() as connection:
        hold_still(connection, [due.account])
        if due.account in held_accounts(connection):
            return False
        written = _COMMIT_XID if ledger.dialect == "postgresql" else events.c.seq
        newer = sa.select(events.c.seq).where(written > mark, *_of(due)).limit(1)
        if connection.execute(newer).first() is not None:
            return False
        connection.execute(
            archives.insert().values(
                account=due.account,
                period=due.period,
                part=due.part,
                made_at=now,
                file=manifest.file,
                digest=manifest.sha256,
                events=manifest.events,
                seq_to=manifest.seq_to,
                first_at=datetime.fromisoformat(manifest.first_at),
                last_at=datetime.fromisoformat(manifest.last_at),
                manifest=manifest.text(),
            )
        )
        # They are caches of what can no longer be counted; their windows have ended.
        connection.execute(
            counters.delete().where(counters.c.account == due.account, counters.c.window_start < due.end)
        )
        admin_log.note(
            connection,
            at=now,
            actor="retention",
            action="events.archive",
            subject=due.account,
            period=due.period,
            file=manifest.file,
            sha256=manifest.sha256,
            events=manifest.events,
        )
    return True


def _delete(ledger: Ledger, path: Path, account: str, rest: Callable[[float], None]) -> tuple[int, bool]:
    """How many events went, and whether all have that are to."""
    gone, size = 0, FIRST_SIZE
    for numbers in numbers_in(path):
        start = 0
        while start < len(numbers):
            batch = numbers[start : start + size]
            with ledger.write() as connection:
                began = time.monotonic()
                if account in held_accounts(connection):
                    return gone, False
                connection.execute(event_costs.delete().where(event_costs.c.seq.in_(batch)))
                gone += connection.execute(events.delete().where(events.c.seq.in_(batch))).rowcount
                worked_s = time.monotonic() - began
            took_s = time.monotonic() - began
            start += len(batch)
            size = next_size(size, worked_s)
            rest(max(took_s, LEAST_REST_S))
    return gone, True


def _is(row: sa.Row[Any]) -> Sequence[sa.ColumnElement[bool]]:
    return archives.c.account == row.account, archives.c.period == row.period, archives.c.part == row.part
