"""Probes that cost, counted in the ledger: the day's cap then holds for every process, and what was spent is there."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import sqlalchemy as sa

from metering.ledger.schema import paid_probes
from metering.providers.paying import PaidProbe

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime
    from decimal import Decimal

    from metering.ledger import Ledger

__all__ = ["LedgerPaidProbes", "cost_paid_probes"]

COSTED = timedelta(days=7)
"""How long prices are looked for."""
_KEY = ("credential", "provider", "base_url", "day", "number")


class LedgerPaidProbes:
    """`PaidProbes` of all who use a ledger, whose errors are raised. Costs come later: `cost_paid_probes`."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def take(
        self, *, credential: str, provider: str, base_url: str, at: datetime, model: str, most: int
    ) -> PaidProbe | None:
        """A row, before the call is made."""
        with self._ledger.write() as connection:
            same = {"credential": credential, "provider": provider, "base_url": base_url, "day": str(at.date())}
            taken = connection.execute(
                sa.select(sa.func.count()).select_from(paid_probes).filter_by(**same)
            ).scalar_one()
            if taken >= most:
                return None
            connection.execute(paid_probes.insert().values(**same, number=taken + 1, asked_at=at, model=model))
        return PaidProbe(
            credential=credential, provider=provider, base_url=base_url, at=at, number=taken + 1, model=model
        )

    def spent(
        self,
        paid: PaidProbe,
        *,
        input_tokens: int | None,
        output_tokens: int | None,
        latency_ms: int | None,
    ) -> None:
        """What the answer said."""
        with self._ledger.write() as connection:
            connection.execute(
                _row_of(paid).values(input_tokens=input_tokens, output_tokens=output_tokens, latency_ms=latency_ms)
            )


def cost_paid_probes(ledger: Ledger, now: datetime, cost_of: Callable[[PaidProbe, int, int], Decimal | None]) -> int:
    """Fill in what probes of the last week cost, whoever made them; how many were filled in.

    `cost_of` tells what a probe of so many input and output tokens cost in USD, to 12 decimals; None where no price is
    known, and then it is asked again the next time.
    """
    row = paid_probes.c
    query = sa.select(*(row[name] for name in _KEY if name != "day"), row.asked_at, row.model, row.input_tokens)
    query = query.add_columns(row.output_tokens).where(row.asked_at >= now - COSTED, row.cost.is_(None))
    query = query.where(row.input_tokens.is_not(None), row.output_tokens.is_not(None))
    with ledger.read() as connection:
        found = [
            (
                PaidProbe(credential=credential, provider=provider, base_url=url, number=number, at=at, model=model),
                *took,
            )
            for credential, provider, url, number, at, model, *took in connection.execute(query)
        ]
    # Prices are looked up outside the write transaction, as those of events are.
    costs = [(paid, cost) for paid, *took in found if (cost := cost_of(paid, *took)) is not None]
    if costs:
        with ledger.write() as connection:
            for paid, cost in costs:
                connection.execute(_row_of(paid).values(cost=cost))
    return len(costs)


def _row_of(paid: PaidProbe) -> sa.Update:
    key = (paid.credential, paid.provider, paid.base_url, str(paid.day), paid.number)
    return paid_probes.update().where(*(paid_probes.c[name] == value for name, value in zip(_KEY, key, strict=True)))
