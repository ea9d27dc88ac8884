"""A look at what is configured: is it there, reachable, and of this version?"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa

from metering.admission.verify import check_counters
from metering.errors import MeteringError
from metering.ledger import SCHEMA, Ledger
from metering.ledger.schema import accounts, events, holds
from metering.plans import parse_plans
from metering.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Finding", "examine"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing looked at."""

    what: str
    ok: bool
    says: str


def examine() -> list[Finding]:
    """Look at settings, ledger, plans and counters. Changes nothing and never raises."""
    try:
        settings = Settings.from_env()
    except MeteringError as exc:
        return [Finding(what="settings", ok=False, says=str(exc))]
    findings = [Finding(what="home", ok=True, says=str(settings.home.absolute()))]
    try:
        ledger = Ledger(settings.ledger_url, timeout_s=settings.timeout_s)
    except MeteringError as exc:
        findings.append(Finding(what="ledger", ok=False, says=str(exc)))
    else:
        with_ledger: tuple[tuple[str, Callable[[Ledger], str]], ...] = (
            ("ledger", _ledger),
            ("contents", _contents),
            ("counters", _counters),
        )
        findings += [_finding(what, look, ledger) for what, look in with_ledger]
        ledger.close()
    findings.append(_plans(settings))
    warehouse = "is there" if settings.warehouse.exists() else "is absent: `python -m flows` makes it"
    findings.append(Finding(what="warehouse", ok=True, says=f"{settings.warehouse} {warehouse}"))
    return findings


def _finding(what: str, look: Callable[[Ledger], str], ledger: Ledger) -> Finding:
    try:
        return Finding(what=what, ok=True, says=look(ledger))
    except MeteringError as exc:
        return Finding(what=what, ok=False, says=str(exc))


def _ledger(ledger: Ledger) -> str:
    with ledger.read() as connection:
        mode = connection.exec_driver_sql("PRAGMA journal_mode").scalar()
    return f"{ledger.path}, schema {SCHEMA}, journal {mode}, SQLite {sqlite3.sqlite_version}"


def _contents(ledger: Ledger) -> str:
    with ledger.read() as connection:
        known = connection.execute(sa.select(sa.func.count()).select_from(accounts)).scalar()
        newest = connection.execute(sa.select(sa.func.coalesce(sa.func.max(events.c.seq), 0))).scalar()
        still_open = connection.execute(
            sa.select(sa.func.count()).select_from(holds).where(holds.c.state == "open")
        ).scalar()
    return f"{known} accounts, events up to number {newest}, {still_open} open holds"


def _counters(ledger: Ledger) -> str:
    checks = check_counters(ledger)
    differing = sum(not check.agrees for check in checks)
    if differing:
        raise MeteringError(f"{differing} of {len(checks)} counters differ from the ledger: see `tallystick verify`")
    return f"{len(checks)}, all equal to the ledger"


def _plans(settings: Settings) -> Finding:
    if not settings.plans.exists():
        return Finding(what="plans", ok=True, says=f"{settings.plans} is absent: the four default plans")
    try:
        plans = parse_plans(settings.plans.read_text(encoding="utf-8"))
    except (MeteringError, OSError, UnicodeDecodeError) as exc:
        return Finding(what="plans", ok=False, says=f"{settings.plans}: {exc}")
    return Finding(what="plans", ok=True, says=f"{settings.plans}: {', '.join(plans)}")
