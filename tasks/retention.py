"""Retention: what is over goes, table by table, and what a legal hold keeps is said."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefect import task

from metering.console import progress_bar
from metering.ledger import Ledger, log_partitions
from metering.ledger.retention import due, rules, shrink, sweep
from metering.ledger.schema import request_log
from tasks.archives import archive_period, delete_archived, due_periods
from tasks.errors import JobError
from tasks.warehouse import lease

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path

    from metering.ledger.retention import Kept, Rule
    from tasks.archives import Archived, DuePeriod

__all__ = ["Over", "archive_over", "delete_over", "find_over"]

HELD = "legal hold"
UNBILLED = "not all of the period is billed or costed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Over:
    """Rows of a table that go, or went, for one account."""

    table: str
    account: str | None
    """None: they are nobody's."""
    rows: int
    stays: str | None = None
    """Why they stay after all."""

    def __str__(self) -> str:
        whose = "" if self.account is None else f" of {self.account}"
        return f"{self.table}: {self.rows:,} rows{whose}{'' if self.stays is None else f' stay: {self.stays}'}"


@task
def find_over(ledger_url: str, now: datetime, kept: Kept, archive_after_days: int) -> list[Over]:
    """What would go at a moment, and what a legal hold keeps. Writes nothing."""
    ledger = Ledger(ledger_url)
    try:
        found = []
        for rule in rules(now, kept):
            with ledger.read() as connection:
                goes, stays = due(connection, rule)
            found += _lines(rule.table.name, goes) + _lines(rule.table.name, stays, stays=HELD)
        for each in due_periods(ledger, now, archive_after_days):
            found.append(_events(each, each.events, HELD if each.is_held else None))
        return found
    finally:
        ledger.close()


@task
def delete_over(ledger_url: str, now: datetime, kept: Kept) -> list[Over]:
    """Delete what is over at a moment; what went, and what a legal hold keeps.

    Memory stays as it is however much that is, and a run that was killed is finished by the next one.
    """
    ledger = Ledger(ledger_url)
    try:
        done = []
        if ledger.dialect == "postgresql":
            log_partitions.make_ahead(ledger, now)
        for rule in rules(now, kept):
            done += _delete(ledger, rule, now)
        shrink(ledger)
        return done
    finally:
        ledger.close()


@task
def archive_over(ledger_url: str, archives: Path, now: datetime, archive_after_days: int) -> list[Over]:
    """Archive the events of periods that were closed so many days ago, and delete them; what went, and what stays.

    An archive is written, read back and compared with the ledger before any of its events goes, and a run that was
    killed is finished by the next one. Raises `JobError` where a file is not what it was; all else is done then.
    """
    ledger = Ledger(ledger_url)
    try:
        with lease(archives, exclusive=True):
            for path in archives.rglob(".*.tmp"):  # of a run that was killed
                path.unlink()
            return _archive(ledger, archives, now, archive_after_days)
    finally:
        ledger.close()


def _archive(ledger: Ledger, archives: Path, now: datetime, after_days: int) -> list[Over]:
    # What another run has left first: only then is what is in the ledger not archived yet.
    gone, problems = delete_archived(ledger, archives, now)
    stays = []
    with progress_bar("archives") as bar:
        waiting = list(due_periods(ledger, now, after_days))
        for number, each in enumerate(waiting):
            if each.is_held:
                stays.append(_events(each, each.events, HELD))
            elif not archive_period(ledger, archives, each, now):
                stays.append(_events(each, each.events, UNBILLED))
            if bar is not None:
                bar((number + 1) / len(waiting))
    also, more_problems = delete_archived(ledger, archives, now)
    if found := list(dict.fromkeys(problems + more_problems)):
        raise JobError("; ".join(found))
    return [_events(each, each.events) for each in gone + also] + stays


def _events(of: DuePeriod | Archived, count: int, stays: str | None = None) -> Over:
    return Over(table=f"events of {of.period}", account=of.account, rows=count, stays=stays)


def _delete(ledger: Ledger, rule: Rule, now: datetime) -> list[Over]:
    gone: Counter[str | None] = Counter()
    with progress_bar(rule.table.name) as bar:
        total = None if bar is None else _total(ledger, rule)
        if rule.table is request_log and ledger.dialect == "postgresql":
            gone.update(log_partitions.drop_past(ledger, now))

        def told(rows: int) -> None:
            gone_of_all = gone.total() + rows
            if bar is not None and total:
                bar(min(1.0, gone_of_all / total))

        swept = sweep(ledger, rule, told=told)
    gone.update(swept.gone)
    with ledger.read() as connection:
        _, stays = due(connection, rule)
    return _lines(rule.table.name, gone) + _lines(rule.table.name, stays, stays=HELD)


def _total(ledger: Ledger, rule: Rule) -> int:
    with ledger.read() as connection:
        goes, _ = due(connection, rule)
    return goes.total()


def _lines(table: str, rows: Counter[str | None], *, stays: str | None = None) -> list[Over]:
    found = sorted(rows.items(), key=lambda each: each[0] or "")
    return [Over(table=table, account=account, rows=count, stays=stays) for account, count in found if count]
