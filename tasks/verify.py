"""Proofs after the fact: what was derived is computed again, another way, and compared."""

from __future__ import annotations

from collections import defaultdict
from decimal import Decimal
from typing import TYPE_CHECKING

import sqlalchemy as sa

from metering.billing.invoices import UsageSum
from metering.events import TOKEN_FIELDS
from metering.ledger import Ledger
from tasks.bills import build_bills, invoice_files, usage_sums
from tasks.warehouse import open_for_reading, sql

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["invoice_differences", "rollup_differences"]


def rollup_differences(ledger_url: str, warehouse: Path, period: str) -> list[str]:
    """Where the warehouse's rollup of a period is not what the ledger's events add up to; empty if nowhere."""
    with open_for_reading(warehouse) as connection:
        rolled_up = usage_sums(connection, period)
    recorded = _ledger_sums(ledger_url, period)
    return [
        f"{account}: the ledger has {_shown(recorded.get(account))}, the rollup {_shown(rolled_up.get(account))}"
        for account in sorted(recorded.keys() | rolled_up.keys())
        if sorted(recorded.get(account, []), key=repr) != sorted(rolled_up.get(account, []), key=repr)
    ]


def invoice_differences(ledger_url: str, out: Path, period: str) -> list[str]:
    """Which invoice files of a period are not, byte for byte, what the ledger's events come to; empty if none."""
    folder = out / period / "invoices"
    expected: dict[str, bytes] = {}
    for invoice in build_bills(ledger_url, _ledger_sums(ledger_url, period), period).invoices:
        expected |= invoice_files(invoice)
    found = {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}
    differences = [f"{name}: is missing" for name in sorted(expected.keys() - found.keys())]
    differences += [f"{name}: bills nothing that is in the ledger" for name in sorted(found.keys() - expected.keys())]
    differences += [
        f"{name}: differs from what the ledger comes to"
        for name in sorted(expected.keys() & found.keys())
        if expected[name] != found[name]
    ]
    return differences


def _ledger_sums(ledger_url: str, period: str) -> dict[str, list[UsageSum]]:
    sums: defaultdict[str, list[UsageSum]] = defaultdict(list)
    ledger = Ledger(ledger_url)
    try:
        with ledger.read() as connection:
            query = sql("ledger_sums")
            if ledger.dialect == "postgresql":
                query = query.replace("exact_sum(", "sum(")  # which is exact there
            for row in connection.execute(sa.text(query), {"period": period}).mappings():
                values = dict(row)
                values["quantity"] = Decimal(values["quantity"])
                values["cost"] = Decimal(values["cost"])
                values |= {name: int(values[name]) for name in TOKEN_FIELDS}
                sums[values.pop("account")].append(UsageSum(**values))
    finally:
        ledger.close()
    return sums


def _shown(sums: list[UsageSum] | None) -> str:
    if not sums:
        return "nothing"
    requests = sum(row.requests for row in sums)
    tokens = sum(row.input_tokens + row.output_tokens for row in sums)
    return f"{requests} requests and {tokens} tokens in {len(sums)} groups"
