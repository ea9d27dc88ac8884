"""By how much a change of usage moves what an account owes (pure)."""

from __future__ import annotations

from decimal import Decimal, localcontext
from typing import TYPE_CHECKING

from metering.billing.money import EXACT
from metering.billing.rating import Claim, claims
from metering.errors import MeteringError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from metering.billing.invoices import UsageSum
    from metering.plans import Plan

__all__ = ["Stakes"]


class Stakes:
    """An account's usage of a period at its plans' rates, to see what a change of it would be worth."""

    def __init__(self, plans: Mapping[int, Plan], usage: Sequence[UsageSum], in_force: int) -> None:
        """`plans` are by plan version, and `in_force` is the version at the end of the period."""
        self._plans = plans
        self._usage = usage
        self._in_force = in_force
        self._claims: dict[int, tuple[Claim, ...]] = {}

    @property
    def currency(self) -> str:
        """What amounts are in."""
        return self._plans[self._in_force].currency

    def amount(self, changes: Sequence[UsageSum]) -> Decimal | None:
        """What is owed more once `changes` (which may be negative) are added: exact, before any minimum and rounding.

        None where no price tells: rates that rival each other, another currency, a cost that is not known.
        """
        total = Decimal(0)
        try:
            with localcontext(EXACT):
                for version in {row.plan_version for row in changes}:
                    if self._plans[version].currency != self.currency:
                        return None
                    moved = claims(self._plans[version], [row for row in changes if row.plan_version == version])
                    if self._plans[version].unknown_price == "refuse" and any(
                        claim.unpriced_requests for claim in moved
                    ):
                        return None
                    total += sum(
                        (
                            self._moved(before, claim, version)
                            for before, claim in zip(self._before(version), moved, strict=True)
                        ),
                        Decimal(0),
                    )
        except MeteringError:
            return None
        return total

    def _before(self, version: int) -> tuple[Claim, ...]:
        if version not in self._claims:
            rows = [row for row in self._usage if row.plan_version == version]
            self._claims[version] = claims(self._plans[version], rows)
        return self._claims[version]

    def _moved(self, before: Claim, change: Claim, version: int) -> Decimal:
        rate = before.rate if version == self._in_force else before.rate.metered_only()
        if rate is None or not change.quantity:
            return Decimal(0)
        # What is not loaded yet may be corrected already.
        after = max(Decimal(0), before.quantity + change.quantity)
        return rate.amount(after) - rate.amount(before.quantity)
