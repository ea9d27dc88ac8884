"""Monthly: price a period, write a draft or a final invoice per account, and the index page."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from prefect import flow

from flows.command import run
from flows.places import MAX_REASON, Places, billed_month, stated
from metering.cli.shared import actor as user
from metering.clock import utc_now
from metering.errors import InvalidSetting
from metering.events import MAX_NAME
from tasks.bills import write_index, write_invoices
from tasks.closing import close_accounts
from tasks.errors import AccountsNotBilled

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["bill_period"]


@flow
def bill_period(
    period: str | None = None, final: bool = False, override: str | None = None, actor: str | None = None
) -> Path:
    """Bill the periods that start in a month (`YYYY-MM`, last month unless said). Returns the index page's path.

    Drafts, unless `final`: then the period of each account is closed, once it is over and nothing speaks against it;
    `override` is why it is closed all the same. `actor` is whom the ledger names, the system's user unless said.

    An account that cannot be billed does not keep the others from it: the index lists it with the reason, and
    `AccountsNotBilled` is raised once everything is written.
    """
    now = utc_now()
    places = Places.from_env()
    month = billed_month(period, now)
    if override is not None:
        if not final:
            raise InvalidSetting("override", override, "nothing without `final`: a draft needs none")
        stated("override", override, MAX_REASON)
    refused: tuple[tuple[str, str], ...] = ()
    if final:
        closed = close_accounts(
            places.ledger_url,
            places.warehouse,
            month,
            now,
            actor=stated("actor", actor or user(), MAX_NAME),
            override=override,
        )
        print(closed, file=sys.stderr)
        refused = closed.refused
    problems = write_invoices(places.ledger_url, places.warehouse, places.out, month)
    problems = list(dict.fromkeys((*refused, *problems)))
    index = write_index(places.warehouse, places.out, month, problems)
    if problems:
        raise AccountsNotBilled(problems, index)
    return index


if __name__ == "__main__":
    run(bill_period)
