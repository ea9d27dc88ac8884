"""Which rate of a plan claims which usage: for each metric the most specific one that matches."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from metering.billing.money import EXACT
from metering.errors import AmbiguousRate

if TYPE_CHECKING:
    from collections.abc import Iterable

    from metering.billing.invoices import UsageSum
    from metering.billing.pricing import Rate
    from metering.plans import Plan

__all__ = ["Claim", "claims", "metric_of"]

_WILDCARD = re.compile(r"\[!?\]?[^\]]*\]|[*?]")
_EXACT_RANK = 1_000_000
_Indexed = tuple[int, "Rate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """All usage that one rate of a plan prices."""

    index: int
    """The rate's place in the plan, from 0."""
    rate: Rate
    quantity: Decimal
    """In the rate's metric; provider cost in USD for `cost_plus`, 0 for `flat`."""
    unpriced_requests: int
    """Requests among it whose provider cost is not known; 0 but for `cost_plus`."""


def claims(plan: Plan, usage: Iterable[UsageSum]) -> tuple[Claim, ...]:
    """One claim for each rate of `plan`, in its order. `usage` is all on that plan; what no rate matches is free.

    A rate is more specific than another when it is so in its line, provider, model or service tier, and less so in
    none of them: an exact name before a glob, a glob with more literal characters before one with fewer, either before
    nothing. Raises `AmbiguousRate` where several match and none of them is more specific than all the others.
    """
    quantities = [Decimal(0)] * len(plan.rates)
    unpriced = [0] * len(plan.rates)
    by_metric: dict[str, list[_Indexed]] = {}
    for index, rate in enumerate(plan.rates):
        if rate.type != "flat" and rate.metric is not None:
            by_metric.setdefault(rate.metric, []).append((index, rate))
    with localcontext(EXACT):
        for row in usage:
            for metric, rates in by_metric.items():
                quantity = metric_of(row, metric)
                without_price = row.unpriced_requests if metric == "cost" else 0
                matching = [(index, rate) for index, rate in rates if _matches(rate, row)]
                if matching and (quantity or without_price):
                    index = _most_specific(plan, row, matching)
                    quantities[index] += quantity
                    unpriced[index] += without_price
    return tuple(
        Claim(index=index, rate=rate, quantity=quantities[index], unpriced_requests=unpriced[index])
        for index, rate in enumerate(plan.rates)
    )


def metric_of(row: UsageSum, metric: str) -> Decimal:
    """How much of `metric` is in a row of usage; `cost` is what the provider charges, in USD."""
    if metric == "tokens":
        return Decimal(row.input_tokens + row.output_tokens)
    if metric == "uncached_input_tokens":
        return Decimal(row.input_tokens - row.cache_read_tokens - row.cache_write_tokens)
    return Decimal(getattr(row, metric))


def _matches(rate: Rate, row: UsageSum) -> bool:
    wanted = rate.match
    return (
        rate.line in ("*", row.line)
        and wanted.provider in (None, row.provider)
        and wanted.service_tier in (None, row.service_tier)
        and (wanted.model is None or (row.model is not None and fnmatchcase(row.model, wanted.model)))
    )


def _most_specific(plan: Plan, row: UsageSum, matching: list[_Indexed]) -> int:
    """The index of the rate that is more specific than every other one."""
    ranks = {index: _rank(rate) for index, rate in matching}
    for index, rank in ranks.items():
        if all(other == index or _above(rank, ranks[other]) for other in ranks):
            return index
    rivals = [
        (index, rate)
        for index, rate in matching
        if not any(_above(ranks[other], ranks[index]) for other in ranks if other != index)
    ]
    (first, one), (second, another) = rivals[:2]
    raise AmbiguousRate(
        f"plan {plan.name!r}: rates[{first}] ({one}) and rates[{second}] ({another}) both claim {one.metric} "
        f"of line {row.line!r}, provider {row.provider!r}, model {row.model!r}, service tier {row.service_tier!r}, "
        "and neither is more specific; narrow one of them, or add a rate for just that usage"
    )


def _rank(rate: Rate) -> tuple[int, int, int, int]:
    return (
        int(rate.line != "*"),
        int(rate.match.provider is not None),
        _model_rank(rate.match.model),
        int(rate.match.service_tier is not None),
    )


def _model_rank(glob: str | None) -> int:
    if glob is None:
        return 0
    if not _WILDCARD.search(glob):
        return _EXACT_RANK
    return 1 + len(_WILDCARD.sub("", glob))


def _above(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return one != other and all(mine >= theirs for mine, theirs in zip(one, other, strict=True))
