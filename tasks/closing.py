"""Closing periods: what was loaded is frozen, priced, numbered and written into the ledger, an account at a time."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa
from prefect import task

from metering.accounts import list_accounts
from metering.errors import Conflict, MeteringError, PeriodClosed
from metering.ledger import Ledger, plan_versions
from metering.ledger.closing import Act, close_period, document, frozen_of, issue_credit_note, void
from metering.ledger.schema import accounts
from metering.settings import Settings
from metering.windows import period_of_month
from reports.invoice import invoice_csv, invoice_html
from tasks.bills import cause_of, check_costs, newest_recost_of
from tasks.errors import WarehouseError
from tasks.periods import INSTANT, late_inputs, loaded, open_inputs, plans_of, priceable
from tasks.readiness import obstacles
from tasks.warehouse import open_for_reading

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path

    from metering.billing.closing import PeriodInputs
    from metering.billing.invoices import Invoice

__all__ = ["Closed", "act_of", "close_accounts", "credit_invoice", "files_of", "void_invoice"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """What became of each account whose period was open."""

    numbers: tuple[str, ...]
    """Of the final documents, in the order they were issued."""
    accounts: int
    """How many were closed, those included that owe nothing."""
    not_over: int
    """How many have a period that has not ended yet."""
    came_later: int
    """How many were created after the period's end, and have no usage in it: these stay open."""
    refused: tuple[tuple[str, str], ...]
    """(account, why): these stay open, or something that came late for them waits."""

    def __str__(self) -> str:
        """In one line."""
        issued = "no document" if not self.numbers else f"{self.numbers[0]} to {self.numbers[-1]}"
        open_ = f"{self.not_over:,} have a period that is not over, {self.came_later:,} were created after it"
        return f"closed {self.accounts:,} accounts, {issued}; {open_}"


def act_of(settings: Settings, actor: str, at: datetime) -> Act:
    """Who issues documents, as the settings name the issuer. Raises `InvalidSetting`."""
    return Act(issuer=settings.issuer, actor=actor, at=at, files_of=files_of)


@task
def close_accounts(
    ledger_url: str, warehouse: Path, period: str, now: datetime, *, actor: str, override: str | None = None
) -> Closed:
    """Close the period of each account for which nothing speaks against it, and issue what it comes to.

    Each account is one transaction, so a run that is killed is finished by the next, without gap or repeat in the
    numbers. `override` closes those too that something speaks against, and is kept with what that was. Raises
    `WarehouseError`, `InvalidSetting`.
    """
    settings = Settings.from_env()
    act = act_of(settings, actor, now)
    numbers: list[str] = []
    refused: list[tuple[str, str]] = []
    count = 0
    with closing(Ledger(ledger_url)) as ledger:
        with open_for_reading(warehouse) as connection, ledger.read() as known:
            costs = check_costs(known, connection)
            inputs = open_inputs(known, loaded(connection, period), period, now)
            late, plans = late_inputs(known, connection), plans_of(known)
            created = {each.account: each.created_at for each in list_accounts(known, now)}
        ended = [each for each in inputs if each.period_end <= now]
        # Where nobody said since when it is active, an account is so since ever: a typo would bill any period.
        over = [
            each
            for each in ended
            if each.active_from is not None or each.events or created[each.account] < each.period_end
        ]
        against = obstacles(ledger, settings, period, over)
        for each in over:
            reasons = "; ".join(against.get(each.account, ()))
            if reasons and override is None:
                refused.append((each.account, reasons))
                continue
            why = f"{override} ({reasons})" if reasons else None
            fine, waiting = priceable(late.get(each.account, ()), plans)
            refused += waiting
            try:
                with ledger.write() as writing:
                    _check_still(writing, costs, each)
                    numbers += close_period(writing, each, fine, act, override=why)
                count += 1
            except PeriodClosed:
                continue  # by another run, meanwhile
            except MeteringError as exc:
                refused.append((each.account, str(cause_of(exc, plans, each.usage))))
    return Closed(
        numbers=tuple(numbers),
        accounts=count,
        not_over=len(inputs) - len(ended),
        came_later=len(ended) - len(over),
        refused=tuple(refused),
    )


def _check_still(connection: sa.Connection, costs: int, inputs: PeriodInputs) -> None:
    """Raise `WarehouseError` where costs have changed since they were read, `Conflict` where plan or period have."""
    if newest_recost_of(connection) != costs:
        raise WarehouseError("costs were changed meanwhile: run `python -m flows rebuild`, and close again")
    cut = sa.select(accounts.c.time_zone, accounts.c.anchor_day).where(accounts.c.account == inputs.account)
    zone, day = connection.execute(cut).one()
    window = period_of_month(inputs.period, time_zone=zone, anchor_day=day)
    plan = plan_versions.in_force(connection, inputs.account, inputs.period_end - INSTANT)
    now = (window.start, window.end, plan and plan.plan_version)
    if now != (inputs.period_start, inputs.period_end, inputs.plan_version):
        raise Conflict(f"the plan or the period of account {inputs.account!r} was changed meanwhile: close again")


def void_invoice(ledger_url: str, number: str, now: datetime, *, actor: str, reason: str) -> str:
    """Take an invoice back by a new document; its number. What it billed is due with the account's next invoice."""
    with closing(Ledger(ledger_url)) as ledger, ledger.write() as connection:
        return void(connection, number, act_of(Settings.from_env(), actor, now), reason=reason)


def credit_invoice(ledger_url: str, warehouse: Path, number: str, now: datetime, *, actor: str, reason: str) -> str:
    """Give back now what was billed too much of an invoice's period; the number of the credit note.

    Raises `UnknownInvoice`, `InvoiceConflict`, `WarehouseError`.
    """
    with closing(Ledger(ledger_url)) as ledger:
        with open_for_reading(warehouse) as connection, ledger.read() as known:
            check_costs(known, connection)
            found = document(known, number)
            late = {each.period: each for each in late_inputs(known, connection).get(found.account, ())}
            inputs = late.get(found.period) or frozen_of(known, found.account)[found.account][found.period][1]
        with ledger.write() as writing:
            return issue_credit_note(writing, number, inputs, act_of(Settings.from_env(), actor, now), reason=reason)


def files_of(invoice: Invoice) -> tuple[bytes, bytes]:
    """A document as CSV and as HTML."""
    return invoice_csv(invoice).encode(), invoice_html(invoice).encode()
