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

if TYPE_CHECKING:
    from datetime import datetime

    from metering.ledger.retention import Kept, Rule

__all__ = ["Over", "delete_over", "find_over"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Over:
    """Rows of a table that go, or went, for one account."""

    table: str
    account: str | None
    """None: they are nobody's."""
    rows: int
    is_held: bool = False
    """They would, but for a legal hold."""

    def __str__(self) -> str:
        whose = "" if self.account is None else f" of {self.account}"
        return f"{self.table}: {self.rows:,} rows{whose}{' stay: legal hold' if self.is_held else ''}"


@task
def find_over(ledger_url: str, now: datetime, kept: Kept) -> list[Over]:
    """What would go at a moment, and what a legal hold keeps. Writes nothing."""
    ledger = Ledger(ledger_url)
    try:
        found = []
        for rule in rules(now, kept):
            with ledger.read() as connection:
                goes, stays = due(connection, rule)
            found += _lines(rule.table.name, goes) + _lines(rule.table.name, stays, is_held=True)
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
    return _lines(rule.table.name, gone) + _lines(rule.table.name, stays, is_held=True)


def _total(ledger: Ledger, rule: Rule) -> int:
    with ledger.read() as connection:
        goes, _ = due(connection, rule)
    return goes.total()


def _lines(table: str, rows: Counter[str | None], *, is_held: bool = False) -> list[Over]:
    found = sorted(rows.items(), key=lambda each: each[0] or "")
    return [Over(table=table, account=account, rows=count, is_held=is_held) for account, count in found if count]
