"""Probes that cost, counted in the ledger: the day's cap then holds for every process, and what was spent is there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa

from metering.ledger.schema import paid_probes
from metering.providers.paying import PaidProbe

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime
    from decimal import Decimal

    from metering.ledger import Ledger

    CostOf = Callable[[PaidProbe, int, int], Decimal | None]

__all__ = ["LedgerPaidProbes"]


class LedgerPaidProbes:
    """`PaidProbes` of all who use a ledger.

    `cost_of` tells what a probe of so many input and output tokens cost in USD, to 12 decimals; None where no price is
    known. What the ledger raises is raised.
    """

    def __init__(self, ledger: Ledger, *, cost_of: CostOf | None = None) -> None:
        self._ledger = ledger
        self._cost_of = cost_of

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
        """What the answer said, and its cost where that is known."""
        cost = None
        if self._cost_of is not None and input_tokens is not None and output_tokens is not None:
            cost = self._cost_of(paid, input_tokens, output_tokens)
        row = {
            "credential": paid.credential,
            "provider": paid.provider,
            "base_url": paid.base_url,
            "day": str(paid.day),
            "number": paid.number,
        }
        with self._ledger.write() as connection:
            connection.execute(
                paid_probes.update()
                .where(*(paid_probes.c[name] == value for name, value in row.items()))
                .values(input_tokens=input_tokens, output_tokens=output_tokens, latency_ms=latency_ms, cost=cost)
            )
