"""What was metered on the platform's own keys, held against what the providers report of the same UTC days."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, time
from decimal import Decimal
from typing import TYPE_CHECKING

import sqlalchemy as sa

from metering.ledger import Ledger
from metering.ledger.schema import provider_pulls, provider_usage
from metering.providers import PROVIDERS, Counts, Provider
from metering.providers.reports import ALL_MODELS, COUNTS, ProviderDay, summed
from tasks.models import canonical_model, canonical_provider
from tasks.warehouse import sql

if TYPE_CHECKING:
    import duckdb

__all__ = ["provider_days"]

JUDGED = ("input_tokens", "cache_read_tokens", "cache_write_tokens", "cache_write_1h_tokens", "output_tokens")
"""What has to agree, where it is said. Requests are shown only, because one event may add up the calls of a run; so are
audio and reasoning, which are parts of these, and which providers do not report as they answer them."""

NONE_USED = Counts(requests=0, input_tokens=0, output_tokens=0)


def provider_days(
    ledger_url: str,
    warehouse: duckdb.DuckDBPyConnection,
    start: date,
    end: date,
    *,
    tolerance_tokens: int = 1_000,
    tolerance_usd: Decimal = Decimal("0.01"),
    tolerance_percent: Decimal = Decimal("0.5"),
) -> list[ProviderDay]:
    """The UTC days from `start` to before `end` whose reports were pulled: each whole, then model by model.

    A difference is tolerated up to the larger of an absolute figure and a percentage of what the provider says: a call
    around midnight may be another day's there. What a report that was not pulled might hold is not judged, so a model
    of ours alone is missing where one of the provider's reports of tokens is. Raises what opening the ledger raises.
    """
    tolerance = _Tolerance(tokens=tolerance_tokens, usd=tolerance_usd, percent=tolerance_percent)
    used = _used(warehouse, start, end)
    return [
        compared
        for (day, name), reported in sorted(_reported(ledger_url, start, end).items())
        for compared in _compared(day, PROVIDERS[name], used[day, name], reported, tolerance)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tolerance:
    tokens: int
    usd: Decimal
    percent: Decimal

    def has_tokens(self, difference: Counts, theirs: Counts) -> bool:
        pairs = [(getattr(difference, name), getattr(theirs, name)) for name in JUDGED]
        return all(off is None or abs(off) <= max(self.tokens, self.percent * said / 100) for off, said in pairs)

    def has_cost(self, ours: Decimal, theirs: Decimal) -> bool:
        return abs(ours - theirs) <= max(self.usd, self.percent * abs(theirs) / 100)


@dataclass(slots=True)
class _Used:
    """Our side of a provider's day."""

    models: defaultdict[str | None, list[Counts]] = field(default_factory=lambda: defaultdict(list))
    cost: Decimal = Decimal(0)
    unpriced_requests: int = 0


@dataclass(slots=True)
class _Reported:
    """The provider's side of it."""

    reports: set[str] = field(default_factory=set)
    provisional: bool = False
    models: defaultdict[str | None, list[Counts]] = field(default_factory=lambda: defaultdict(list))
    """Under None what was not grouped by model."""
    cost: Decimal = Decimal(0)


def _used(warehouse: duckdb.DuckDBPyConnection, start: date, end: date) -> defaultdict[tuple[date, str], _Used]:
    used: defaultdict[tuple[date, str], _Used] = defaultdict(_Used)
    found = warehouse.execute(sql("provider_side"), {"start": _midnight(start), "end": _midnight(end)}).fetchall()
    for day, provider, model, *counts, cost, unpriced in found:
        name = canonical_provider(provider, model)
        if name is not None:
            entry = used[day, name]
            entry.models[canonical_model(provider, model)].append(Counts(**dict(zip(COUNTS, counts, strict=True))))
            entry.cost += cost
            entry.unpriced_requests += unpriced
    return used


def _midnight(day: date) -> datetime:
    return datetime.combine(day, time(), UTC)


def _reported(ledger_url: str, start: date, end: date) -> dict[tuple[date, str], _Reported]:
    """What was pulled of each provider's days, of all organizations together."""
    reported: defaultdict[tuple[date, str], _Reported] = defaultdict(_Reported)
    ledger = Ledger(ledger_url)
    try:
        with ledger.read() as connection:
            for row in connection.execute(_days_of(provider_pulls, start, end)):
                entry = reported[date.fromisoformat(row.day), row.provider]
                entry.reports.add(row.report)
                entry.provisional = entry.provisional or bool(row.provisional)
            for row in connection.execute(_days_of(provider_usage, start, end)):
                entry = reported[date.fromisoformat(row.day), row.provider]
                if PROVIDERS[row.provider].report(row.report).says_tokens:
                    counts = Counts(**{name: getattr(row, name) for name in COUNTS})
                    entry.models[canonical_model(row.provider, row.model)].append(counts)
                entry.cost += row.cost or 0
    finally:
        ledger.close()
    return reported


def _days_of(table: sa.Table, start: date, end: date) -> sa.Select[tuple[object, ...]]:
    return sa.select(table).where(table.c.day >= str(start), table.c.day < str(end))


def _compared(
    day: date, provider: Provider, used: _Used, reported: _Reported, tolerance: _Tolerance
) -> list[ProviderDay]:
    says_tokens = {report.name for report in provider.reports if report.says_tokens}
    says_cost = {report.name for report in provider.reports if report.says_cost}
    has_tokens, has_cost = says_tokens <= reported.reports, says_cost <= reported.reports
    all_theirs = summed(counts for same in reported.models.values() for counts in same)
    nothing = _zeros(all_theirs) if reported.models else NONE_USED

    def compare(model: str | None, ours: Counts, theirs: Counts) -> ProviderDay:
        difference = _difference(ours, theirs)
        return ProviderDay(
            day=day,
            provider=provider.name,
            model=model,
            ours=ours,
            theirs=theirs,
            difference=difference,
            provisional=reported.provisional,
            agrees=tolerance.has_tokens(difference, theirs),
        )

    compared = []
    if has_tokens or has_cost:
        all_ours = _added([counts for same in used.models.values() for counts in same])
        whole = compare(ALL_MODELS, all_ours, (all_theirs if reported.models else nothing) if has_tokens else Counts())
        if has_cost:
            whole = replace(
                whole,
                our_cost=used.cost,
                their_cost=reported.cost,
                unpriced_requests=used.unpriced_requests,
                agrees=whole.agrees and tolerance.has_cost(used.cost, reported.cost),
            )
        compared.append(whole)
    if None not in reported.models:
        models = reported.models.keys() | (used.models.keys() if has_tokens else set())
        for model in sorted(models, key=lambda model: (model is None, model or "")):
            theirs = summed(reported.models[model]) if model in reported.models else nothing
            compared.append(compare(model, _added(used.models.get(model, [])), theirs))
    return compared


def _added(counts: list[Counts]) -> Counts:
    """Of ours everything is known: what nobody used is 0."""
    return summed([Counts(**dict.fromkeys(COUNTS, 0)), *counts])


def _zeros(like: Counts) -> Counts:
    return Counts(**{name: None if getattr(like, name) is None else 0 for name in COUNTS})


def _difference(ours: Counts, theirs: Counts) -> Counts:
    both = [(name, getattr(ours, name), getattr(theirs, name)) for name in COUNTS]
    return Counts(**{name: None if theirs is None else ours - theirs for name, ours, theirs in both})
