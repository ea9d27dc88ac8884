"""What becomes of a reconciliation: its report, and the corrections that are booked."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prefect import task

from metering.billing.reconciliation import VERDICTS
from metering.corrections import apply_verdict
from metering.errors import CorrectionConflict, InvalidSetting
from metering.ledger import Ledger, admin_log, verdicts
from metering.windows import period_of_month
from reports.reconciliation import (
    corrections_csv,
    corrections_json,
    providers_csv,
    reconciliation_html,
    verdicts_csv,
)
from tasks.out import period_folder, write_file
from tasks.provider_side import provider_days
from tasks.reconcile import is_asked_for
from tasks.warehouse import open_for_reading

if TYPE_CHECKING:
    from collections.abc import Collection
    from datetime import datetime
    from pathlib import Path

    from metering.billing.reconciliation import Reconciliation, RunVerdict
    from metering.providers.reports import ProviderDay

__all__ = ["Found", "Outcome", "apply_reconciliation", "write_reconciliation"]


@task
def write_reconciliation(ledger_url: str, warehouse: Path, out: Path, number: int) -> Found:
    """Write a reconciliation's page and files to review under `out`, with what providers report of the same days.

    Raises `UnknownReconciliation`, `WarehouseError`, `ReportError`.
    """
    reconciliation, verdicts_found = _read(ledger_url, number)
    month = period_of_month(reconciliation.period, time_zone="UTC", anchor_day=1)
    with open_for_reading(warehouse) as connection:
        days = provider_days(ledger_url, connection, month.start.date(), month.end.date())
    is_missing = not days and is_asked_for(ledger_url, reconciliation.period, reconciliation.made_at, by=["provider"])
    files = {
        "reconciliation.html": reconciliation_html(reconciliation, verdicts_found, days, is_missing=is_missing),
        "reconciliation.csv": verdicts_csv(reconciliation, verdicts_found),
        "corrections.csv": corrections_csv(reconciliation, verdicts_found),
        "corrections.json": corrections_json(reconciliation, verdicts_found),
        "providers.csv": providers_csv(days),
    }
    with period_folder(out, reconciliation.period) as folder:
        for name, content in files.items():
            write_file(folder / name, content)
    return Found(
        page=folder / "reconciliation.html",
        reconciliation=reconciliation,
        verdicts=verdicts_found,
        provider_days=days,
        is_missing=is_missing,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a reconciliation says, and where."""

    page: Path
    reconciliation: Reconciliation
    verdicts: list[RunVerdict]
    provider_days: list[ProviderDay]
    is_missing: bool
    """Whether a plan asks for what providers report, and no day of it was pulled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of the corrections of a reconciliation, in runs."""

    booked: int = 0
    booked_before: int = 0
    refused: tuple[str, ...] = ()
    """Why each other one was not booked."""


def apply_reconciliation(
    ledger_url: str,
    number: int,
    *,
    actor: str,
    now: datetime,
    only: Collection[int] = (),
    verdicts_of: Collection[str] = (),
) -> Outcome:
    """Book what a reconciliation proposes, each run in a transaction of its own; a run once, whatever is killed.

    All of it, or of the runs with these numbers or these verdicts only. Raises `UnknownReconciliation`, and
    `InvalidSetting` for a number or a verdict that it does not have.
    """
    _, found = _read(ledger_url, number)
    _check("number", only, {verdict.number for verdict in found})
    _check("verdict", verdicts_of, VERDICTS[1:])
    chosen = [
        verdict
        for verdict in found
        if (not only or verdict.number in only) and (not verdicts_of or verdict.verdict in verdicts_of)
    ]
    booked, refused = Counter[bool](), []
    ledger = Ledger(ledger_url)
    try:
        # Before the first of them, so that the log has it whatever is killed; each verdict says who applied it.
        with ledger.write() as connection:
            admin_log.note(
                connection,
                at=now,
                actor=actor,
                action="reconciliation.apply",
                subject=str(number),
                runs=sum(verdict.applied_at is None for verdict in chosen),
            )
        for verdict in chosen:
            if verdict.applied_at is not None:
                booked[False] += 1
                continue
            try:
                booked[apply_verdict(ledger, verdict, reconciliation=number, actor=actor, now=now)] += 1
            except CorrectionConflict as exc:
                refused.append(str(exc))
    finally:
        ledger.close()
    return Outcome(booked=booked[True], booked_before=booked[False], refused=tuple(refused))


def _check(field: str, asked: Collection[Any], known: Collection[Any]) -> None:
    unknown = [value for value in asked if value not in known]
    if unknown:
        shown = ", ".join(map(str, sorted(known)[:20])) or "none"
        raise InvalidSetting(field, unknown[0], f"one that the reconciliation has: {shown}")


def _read(ledger_url: str, number: int) -> tuple[Reconciliation, list[RunVerdict]]:
    ledger = Ledger(ledger_url)
    try:
        with ledger.read() as connection:
            return verdicts.find(connection, number), verdicts.verdicts_of(connection, number)
    finally:
        ledger.close()
