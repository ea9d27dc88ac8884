"""What other prices would have made of a period: a dry run, which writes nothing."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from decimal import Decimal, localcontext
from typing import TYPE_CHECKING, Any

from metering.billing.closing import composed
from metering.billing.money import EXACT
from metering.errors import InvalidSetting, MeteringError
from metering.ledger import Ledger
from metering.ledger.closing import frozen_of
from reports.formats import exact_sum
from tasks.bills import cause_of, check_costs
from tasks.periods import loaded, open_inputs, plans_of
from tasks.warehouse import open_for_reading

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime
    from pathlib import Path

    from metering.billing.closing import PeriodInputs
    from metering.plans import Plan

__all__ = ["Rerated", "rerate_period", "rerated_rows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rerated:
    """What an account's period comes to by its own plans, and by others."""

    account: str
    plan: str
    """In force at the end of the period."""
    currency: str
    total: Decimal | None = None
    """None where it cannot be priced."""
    would_be: Decimal | None = None
    would_be_currency: str | None = None
    problem: str | None = None

    @property
    def difference(self) -> Decimal | None:
        """None where it cannot be told, and between two currencies."""
        if self.total is None or self.would_be is None or self.currency != self.would_be_currency:
            return None
        with localcontext(EXACT):
            return self.would_be - self.total


def rerate_period(
    ledger_url: str, warehouse: Path, period: str, other: Mapping[str, Plan], now: datetime
) -> list[Rerated]:
    """By account, what all that is known of a period comes to, also with `other` plans in the place of their namesakes.

    Of a closed period, what was frozen last. Nothing is written. Raises `WarehouseError`, and `InvalidSetting` for
    plans that have no namesake: they would change nothing.
    """
    with (
        closing(Ledger(ledger_url)) as ledger,
        open_for_reading(warehouse) as connection,
        ledger.read() as known,
    ):
        plans = plans_of(known)
        _check_names(other, {plan.name for plan in plans.values()})
        check_costs(known, connection)
        closed = [periods[period][1] for periods in frozen_of(known).values() if period in periods]
        inputs = [*closed, *open_inputs(known, loaded(connection, period), period, now)]
    changed = {version: other.get(plan.name, plan) for version, plan in plans.items()}
    return [_rerated(each, plans, changed) for each in sorted(inputs, key=lambda each: each.account)]


def rerated_rows(rerated: Sequence[Rerated]) -> list[dict[str, Any]]:
    """A row for each account, and one for each currency that is the same before and after."""
    rows = [
        {
            "account": each.account,
            "plan": each.plan,
            "currency": each.currency,
            "total": each.total,
            "would_be": each.would_be,
            "difference": each.difference,
            "problem": each.problem
            or (f"would be in {each.would_be_currency}" if each.would_be_currency != each.currency else None),
        }
        for each in rerated
    ]
    for currency in sorted({each.currency for each in rerated if each.difference is not None}):
        told = [each for each in rerated if each.currency == currency and each.difference is not None]
        rows.append(
            {
                "account": f"all {len(told):,}",
                "plan": None,
                "currency": currency,
                "total": exact_sum(each.total for each in told if each.total is not None),
                "would_be": exact_sum(each.would_be for each in told if each.would_be is not None),
                "difference": exact_sum(each.difference for each in told if each.difference is not None),
                "problem": None,
            }
        )
    return rows


def _check_names(other: Mapping[str, Plan], names: set[str]) -> None:
    unknown = sorted(other.keys() - names)
    if unknown:
        raise InvalidSetting("plan", ", ".join(unknown), f"plans that the ledger has: {', '.join(sorted(names))}")


def _rerated(inputs: PeriodInputs, plans: Mapping[int, Plan], changed: Mapping[int, Plan]) -> Rerated:
    plan = plans[inputs.plan_version]
    rerated = Rerated(account=inputs.account, plan=plan.name, currency=plan.currency)
    try:
        rerated = replace(rerated, total=_total(inputs, plans))
        other = replace(inputs, plans={version: changed[version].digest for version in inputs.plans})
        return replace(
            rerated, would_be=_total(other, changed), would_be_currency=changed[inputs.plan_version].currency
        )
    except MeteringError as exc:
        return replace(rerated, problem=str(cause_of(exc, plans, inputs.usage)))


def _total(inputs: PeriodInputs, plans: Mapping[int, Plan]) -> Decimal:
    with localcontext(EXACT):
        return sum((invoice.total for invoice in composed(inputs, (), plans, {})), Decimal(0))
