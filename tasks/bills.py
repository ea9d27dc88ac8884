"""Bills: a period's usage priced per account, and written as invoices and an index page."""

from __future__ import annotations

import hashlib
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote

from prefect import task

from metering.billing.closing import composed
from metering.billing.invoices import Invoice
from metering.clock import utc_now
from metering.errors import InvalidPlan, MeteringError, UnpricedUsage
from metering.ledger import Ledger
from metering.ledger.closing import billed_of, document, documents_of
from reports.invoice import invoice_csv, invoice_html
from reports.summary import AccountRow, ModelRow, PeriodSummary, UsageDay, summary_html
from tasks.costs import knows_price, price_version
from tasks.out import period_folder, write_file
from tasks.periods import late_inputs, loaded, open_inputs, plans_of, priceable, rows
from tasks.warehouse import check_recost, newest_recost, open_for_reading, sql

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    import duckdb
    import sqlalchemy as sa

    from metering.billing.closing import PeriodInputs
    from metering.billing.invoices import UsageSum
    from metering.ledger.closing import FinalDocument
    from metering.plans import Plan
    from tasks.periods import Loaded

__all__ = [
    "Bills",
    "build_bills",
    "cause_of",
    "check_costs",
    "file_stem",
    "invoice_files",
    "write_document",
    "write_index",
    "write_invoices",
]

LONGEST_FILE_NAME = 150


@dataclass(frozen=True, slots=True, kw_only=True)
class Bills:
    """A period's invoices, by account, and the accounts that could not be billed."""

    invoices: tuple[Invoice, ...]
    problems: tuple[tuple[str, str], ...]
    """(account, reason)."""


@task
def write_invoices(ledger_url: str, warehouse: Path, out: Path, period: str) -> list[tuple[str, str]]:
    """Write the period's documents as JSON, CSV and HTML under `out`; returns (account, reason) of those not billed.

    Final documents of accounts whose period is closed, drafts of the others. Files that are neither go. Raises
    `WarehouseError`, `ReportError`.
    """
    with closing(Ledger(ledger_url)) as ledger, open_for_reading(warehouse) as connection, ledger.read() as known:
        check_costs(known, connection)
        bills = build_bills(known, loaded(connection, period), period, late_inputs(known, connection))
        finals = documents_of(known, period=period)
    with period_folder(out, period) as folder:
        current = set()
        for final in finals:
            current |= _write_final(folder / "invoices", final)
        for invoice in bills.invoices:
            for name, content in invoice_files(invoice).items():
                write_file(folder / "invoices" / name, content)
                current.add(name)
        for path in (folder / "invoices").iterdir():
            if path.name not in current:
                path.unlink()
    return list(bills.problems)


def write_document(ledger_url: str, out: Path, number: str) -> None:
    """Write the files of one final document under `out`. Raises `UnknownInvoice`, `ReportError`."""
    with closing(Ledger(ledger_url)) as ledger, ledger.read() as known:
        final = document(known, number)
    with period_folder(out, final.period) as folder:
        _write_final(folder / "invoices", final)


def _write_final(folder: Path, final: FinalDocument) -> set[str]:
    """Write those files of a final document that are not there as they were issued; the names of all."""
    files = {
        f"{final.number}.{kind}": digest
        for kind, digest in (
            ("json", final.document_digest),
            ("csv", final.csv_digest),
            ("html", final.html_digest),
        )
    }
    kept = {name for name, digest in files.items() if _digest_of(folder / name) == digest}
    if files.keys() != kept:
        for name, content in invoice_files(final.invoice).items():
            if name not in kept:
                write_file(folder / name, content)
    return set(files)


def _digest_of(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return None


@task
def write_index(warehouse: Path, out: Path, period: str, problems: list[tuple[str, str]]) -> Path:
    """Write the index page of the invoices under `out`; returns its path. Raises `WarehouseError`, `ReportError`."""
    with open_for_reading(warehouse) as connection:
        days = tuple(UsageDay(**row) for row in rows(connection, "usage_by_day", period))
        models = tuple(ModelRow(**row) for row in rows(connection, "usage_by_model", period))
    with period_folder(out, period) as folder:
        invoices = [Invoice.from_json(path.read_bytes()) for path in (folder / "invoices").glob("*.json")]
        invoices.sort(key=lambda invoice: (invoice.account, invoice.number or "", invoice.currency))
        summary = PeriodSummary(
            period=period,
            accounts=tuple(_account_row(invoice) for invoice in invoices),
            days=days,
            models=models,
            problems=tuple((account, reason) for account, reason in problems),
        )
        page = folder / "index.html"
        write_file(page, summary_html(summary))
    return page


def build_bills(
    connection: sa.Connection, known: Loaded, period: str, late: Mapping[str, Sequence[PeriodInputs]]
) -> Bills:
    """The drafts of each account whose period is open, with what came late for closed ones.

    None for an account with nothing to pay and no usage, nor for one that began later and has no usage.
    """
    invoices: list[Invoice] = []
    problems: list[tuple[str, str]] = []
    plans = plans_of(connection)
    for inputs in open_inputs(connection, known, period, utc_now()):
        account = inputs.account
        fine, waiting = priceable(late.get(account, ()), plans)
        problems += waiting
        try:
            invoices += composed(inputs, fine, plans, billed_of(connection, account))
        except MeteringError as exc:
            problems.append((account, str(cause_of(exc, plans, inputs.usage))))
    return Bills(invoices=tuple(invoices), problems=tuple(problems))


def check_costs(connection: sa.Connection, warehouse: duckdb.DuckDBPyConnection) -> int:
    """The ledger's newest recost. Raises `WarehouseError` where costs have changed since they were loaded."""
    newest = newest_recost_of(connection)
    check_recost(warehouse, newest)
    return newest


def newest_recost_of(connection: sa.Connection) -> int:
    """The number of the ledger's newest recost, 0 for none. Raises `WarehouseError` where it has not ended."""
    return newest_recost([tuple(row) for row in connection.exec_driver_sql(sql("newest_recost"))])


def cause_of(error: MeteringError, plans: Mapping[int, Plan], usage: Iterable[UsageSum]) -> MeteringError:
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
    """The files a document is written as, by name."""
    stem = file_stem(invoice)
    return {
        f"{stem}.json": invoice.to_json(),
        f"{stem}.csv": invoice_csv(invoice).encode(),
        f"{stem}.html": invoice_html(invoice).encode(),
    }


def file_stem(invoice: Invoice) -> str:
    """The name of a document's files: its number, or of a draft its reference; a second one's with its currency.

    It is made safe; a long one is cut and told apart by a digest.
    """
    if invoice.number is not None:
        return invoice.number
    name = quote(invoice.reference, safe=" ")
    if len(name) <= LONGEST_FILE_NAME:
        return name
    return f"{name[:LONGEST_FILE_NAME]}-{hashlib.sha256(invoice.reference.encode()).hexdigest()[:16]}"


def _account_row(invoice: Invoice) -> AccountRow:
    # A second document has the currency of earlier periods, and of the plans that they were on.
    is_second = invoice.reference.endswith(f"-{invoice.currency}")
    margin_is_known = invoice.currency == "USD" and not invoice.unpriced_requests and not is_second
    return AccountRow(
        account=invoice.account,
        name=invoice.name,
        number=invoice.number,
        about=None if invoice.names is None else f"{invoice.kind.replace('_', ' ')} of {invoice.names}",
        plan=None if is_second else invoice.plan,
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
