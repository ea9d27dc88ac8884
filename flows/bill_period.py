"""Monthly: price a period, write an invoice per account, and the index page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefect import flow

from flows.command import run
from flows.places import Places, billed_month
from metering.clock import utc_now
from tasks.bills import write_index, write_invoices
from tasks.errors import AccountsNotBilled

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["bill_period"]


@flow
def bill_period(period: str | None = None) -> Path:
    """Bill the periods that start in a month (`YYYY-MM`, last month unless said). Returns the index page's path.

    An account that cannot be billed does not keep the others from it: the index lists it with the reason, and
    `AccountsNotBilled` is raised once everything is written.
    """
    places = Places.from_env()
    month = billed_month(period, utc_now())
    problems = write_invoices(places.ledger_url, places.warehouse, places.out, month)
    index = write_index(places.warehouse, places.out, month, problems)
    if problems:
        raise AccountsNotBilled(problems, index)
    return index


if __name__ == "__main__":
    run(bill_period)
