"""Bills: a period's usage priced per account, and written as invoices and an index page."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from prefect import task

from metering.accounts import list_accounts
from metering.billing.invoices import Invoice, UsageSum, build_invoice
from metering.clock import utc_now
from metering.errors import InvalidPlan, MeteringError, UnpricedUsage
from metering.events import TOKEN_FIELDS
from metering.ledger import Ledger, plan_versions
from metering.windows import period_of_month
from reports.invoice import invoice_csv, invoice_html
from reports.summary import AccountRow, ModelRow, PeriodSummary, UsageDay, summary_html
from tasks.costs import knows_price, price_version
from tasks.out import period_folder, write_file
from tasks.warehouse import check_recost, newest_recost, open_for_reading, sql

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    import duckdb

    from metering.plans import Plan

__all__ = ["Bills", "build_bills", "file_stem", "invoice_files", "usage_sums", "write_index", "write_invoices"]

LONGEST_FILE_NAME = 150
INSTANT = timedelta(microseconds=1)
AMOUNTS = ("requests", "quantity", *TOKEN_FIELDS, "cost", "unpriced_requests")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bills:
    """A period's invoices, by account, and the accounts that could not be billed."""

    invoices: tuple[Invoice, ...]
    problems: tuple[tuple[str, str], ...]
    """(account, reason)."""


@task
def write_invoices(ledger_url: str, warehouse: Path, out: Path, period: str) -> list[tuple[str, str]]:
    """Write the period's invoices as JSON, CSV and HTML under `out`; returns (account, reason) of those not billed.

    Files of invoices that are no longer there go. Raises `WarehouseError`, `ReportError`.
    """
    with open_for_reading(warehouse) as connection:
        check_recost(connection, _newest_recost(ledger_url))
        usage = usage_sums(connection, period)
    bills = build_bills(ledger_url, usage, period)
    with period_folder(out, period) as folder:
        current = set()
        for invoice in bills.invoices:
            for name, content in invoice_files(invoice).items():
                write_file(folder / "invoices" / name, content)
                current.add(name)
        for path in (folder / "invoices").iterdir():
            if path.name not in current:
                path.unlink()
    return list(bills.problems)


@task
def write_index(warehouse: Path, out: Path, period: str, problems: list[tuple[str, str]]) -> Path:
    """Write the index page of the invoices under `out`; returns its path. Raises `WarehouseError`, `ReportError`."""
    with open_for_reading(warehouse) as connection:
        days = tuple(UsageDay(**row) for row in _rows(connection, "usage_by_day", period))
        models = tuple(ModelRow(**row) for row in _rows(connection, "usage_by_model", period))
    with period_folder(out, period) as folder:
        invoices = [Invoice.from_json(path.read_bytes()) for path in (folder / "invoices").glob("*.json")]
        summary = PeriodSummary(
            period=period,
            accounts=tuple(_account_row(invoice) for invoice in sorted(invoices, key=lambda invoice: invoice.account)),
            days=days,
            models=models,
            problems=tuple((account, reason) for account, reason in problems),
        )
        page = folder / "index.html"
        write_file(page, summary_html(summary))
    return page


def build_bills(ledger_url: str, usage: Mapping[str, Iterable[UsageSum]], period: str) -> Bills:
    """Price each account's usage.

    No invoice for an account with nothing to pay and no usage, nor for one that began later and has no usage.
    """
    invoices: list[Invoice] = []
    problems: list[tuple[str, str]] = []
    ledger = Ledger(ledger_url)
    try:
        with ledger.read() as connection:
            plans = {version.plan_version: version.plan for version in plan_versions.versions(connection)}
            for account in list_accounts(connection, utc_now()):
                window = period_of_month(period, time_zone=account.time_zone, anchor_day=account.anchor_day)
                began_later = account.active_from is not None and account.active_from >= window.end
                # A correction may have taken all of a group back.
                used = [row for row in usage.get(account.account, ()) if any(getattr(row, name) for name in AMOUNTS)]
                if began_later and not used:
                    continue
                in_force = plan_versions.in_force(connection, account.account, window.end - INSTANT)
                assert in_force is not None
                try:
                    invoice = build_invoice(
                        account=account.account,
                        name=account.name,
                        address=account.address,
                        plans=plans,
                        plan_version=in_force.plan_version,
                        period=period,
                        period_start=window.start,
                        period_end=window.end,
                        time_zone=account.time_zone,
                        usage=used,
                        active_from=account.active_from,
                    )
                except MeteringError as exc:
                    problems.append((account.account, str(_cause(exc, plans, used))))
                    continue
                if invoice.usage or invoice.total:
                    invoices.append(invoice)
    finally:
        ledger.close()
    return Bills(invoices=tuple(invoices), problems=tuple(problems))


def _cause(error: MeteringError, plans: Mapping[int, Plan], usage: Iterable[UsageSum]) -> MeteringError:
    """Usage may be without a price because a plan names one that there is not."""
    for row in usage if isinstance(error, UnpricedUsage) else ():
        plan = plans[row.plan_version]
        if row.unpriced_requests and plan.named_price is not None and not knows_price(plan.named_price):
            return InvalidPlan(
                f"plans.{plan.name}.unknown_price",
                f"got {plan.named_price!r}, which {price_version()} has no price for (plan version {row.plan_version}, "
                f"with {row.unpriced_requests:,} requests of unknown price on line {row.line!r})",
            )
    return error


def invoice_files(invoice: Invoice) -> dict[str, bytes]:
    """The files an invoice is written as, by name."""
    stem = file_stem(invoice)
    return {
        f"{stem}.json": invoice.to_json(),
        f"{stem}.csv": invoice_csv(invoice).encode(),
        f"{stem}.html": invoice_html(invoice).encode(),
    }


def file_stem(invoice: Invoice) -> str:
    """The name of an invoice's files: its reference, made safe; a long one is cut and told apart by a digest."""
    name = quote(invoice.reference, safe=" ")
    if len(name) <= LONGEST_FILE_NAME:
        return name
    return f"{name[:LONGEST_FILE_NAME]}-{hashlib.sha256(invoice.reference.encode()).hexdigest()[:16]}"


def usage_sums(connection: duckdb.DuckDBPyConnection, period: str) -> dict[str, list[UsageSum]]:
    """Billable usage of a period, by account."""
    sums: defaultdict[str, list[UsageSum]] = defaultdict(list)
    for row in _rows(connection, "usage_sums", period):
        sums[row.pop("account")].append(UsageSum(**row))
    return sums


def _newest_recost(ledger_url: str) -> int:
    ledger = Ledger(ledger_url)
    try:
        with ledger.read() as connection:
            return newest_recost([tuple(row) for row in connection.exec_driver_sql(sql("newest_recost"))])
    finally:
        ledger.close()


def _rows(connection: duckdb.DuckDBPyConnection, query: str, period: str) -> list[dict[str, Any]]:
    result = connection.execute(sql(query), {"period": period})
    names = [column[0] for column in result.description or ()]
    return [dict(zip(names, row, strict=True)) for row in result.fetchall()]


def _account_row(invoice: Invoice) -> AccountRow:
    margin_is_known = invoice.currency == "USD" and not invoice.unpriced_requests
    return AccountRow(
        account=invoice.account,
        name=invoice.name,
        plan=invoice.plan,
        currency=invoice.currency,
        requests=invoice.requests,
        input_tokens=invoice.input_tokens,
        output_tokens=invoice.output_tokens,
        total=invoice.total,
        provider_cost=invoice.provider_cost,
        margin=invoice.total - invoice.provider_cost if margin_is_known else None,
        unpriced_requests=invoice.unpriced_requests,
        invoice_href=f"invoices/{file_stem(invoice)}",
    )
