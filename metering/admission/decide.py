"""Where a limit stands and whether a call still fits. Pure: counters and the clock are arguments."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple

from metering.admission.protocol import LimitStatus
from metering.errors import InvalidEvent
from metering.windows import Window, calendar_window

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from decimal import Decimal

    from metering.billing.pricing import Rate
    from metering.events import Call
    from metering.plans import Limit, Plan

__all__ = [
    "Counter",
    "RateCounter",
    "Verdict",
    "asked_amount",
    "asked_of",
    "check_rate",
    "check_window",
    "counter_of",
    "missing_name",
    "moved_arrival",
    "rate_counter_of",
    "refusing",
    "weigh",
]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_LATEST = datetime(9998, 1, 1, tzinfo=UTC)
"""A rate that was overrun by more than time can tell refills then."""


@dataclass(frozen=True, slots=True)
class Counter:
    """What one calendar counter counts: a metric of an account, for a line (`*`: all) and a key (empty: all)."""

    metric: str
    line: str
    key_id: str
    window: Window


@dataclass(frozen=True, slots=True)
class RateCounter:
    """What one rate counts: `units` of a metric per `period_us`."""

    metric: str
    line: str
    key_id: str
    units: int
    period_us: int


def counter_of(limit: Limit, key_id: str, now: datetime, period: Window) -> Counter:
    """The counter a calendar limit looks at; `period` is the account's billing period."""
    window = period if limit.per == "period" else calendar_window(limit.per, now)  # type: ignore[arg-type]
    return Counter(limit.metric, limit.line, key_id if limit.scope == "key" else "", window)


def rate_counter_of(limit: Limit, key_id: str) -> RateCounter:
    """The counter a rate limit looks at."""
    scope_key = key_id if limit.scope == "key" else ""
    return RateCounter(limit.metric, limit.line, scope_key, limit.rate_count, limit.rate_period_s * 1_000_000)


def asked_amount(
    limit: Limit, units: Mapping[str, int | Decimal], *, usage_given: bool, quantity_given: bool, is_estimate: bool
) -> int | Decimal:
    """What a call asks of a limit. Raises `InvalidEvent` where the call leaves the limited metric out.

    A hold that reserves nothing of a limited metric would be admitted at any load, so in an estimate 0 is left out too.
    """
    asked = units[limit.metric]
    if limit.metric == "requests" or (limit.metric == "quantity" and quantity_given and (asked or not is_estimate)):
        return asked
    if limit.metric != "quantity" and usage_given and (asked or not is_estimate):
        return asked
    name = "quantity" if limit.metric == "quantity" else "estimate" if is_estimate else "usage"
    least = f"{limit.metric}, at least 1" if is_estimate else limit.metric
    given = quantity_given if limit.metric == "quantity" else usage_given
    raise InvalidEvent(name, asked if given else None, f"{least}: the plan limits it to {limit}")


def asked_of(
    limits: Iterable[Limit],
    line: str,
    units: Mapping[str, int | Decimal],
    *,
    usage_given: bool,
    quantity_given: bool,
    is_estimate: bool,
) -> list[tuple[Limit, int | Decimal]]:
    """What a call on a line asks of each limit that counts it. Raises as `asked_amount`."""
    return [
        (
            limit,
            asked_amount(limit, units, usage_given=usage_given, quantity_given=quantity_given, is_estimate=is_estimate),
        )
        for limit in limits
        if limit.line in ("*", line)
    ]


def check_window(
    limit: Limit, window: Window, used: int | Decimal, asked: int | Decimal, now: datetime
) -> tuple[bool, LimitStatus]:
    """Whether `asked` fits into a calendar window, and where the limit then stands."""
    assert limit.max is not None
    fits = used + asked <= limit.max
    retry_after_s = None if fits or asked > limit.max else (window.end - now).total_seconds()
    return fits, LimitStatus(
        limit=limit,
        used=_plain(limit, used + asked if fits else used),
        max=_plain(limit, limit.max),
        asked=asked,
        reset_at=window.end,
        retry_after_s=retry_after_s,
    )


def check_rate(
    limit: Limit, arrival: int | Decimal, asked: int | Decimal, now: datetime
) -> tuple[bool, LimitStatus, int | Decimal]:
    """Whether `asked` fits a rate, where it then stands, and its next theoretical arrival time.

    GCRA (ITU-T I.371), with all times multiplied by the rate's count so that they stay whole: one unit takes
    `period_us`, and a burst is `burst` units ahead of now.
    """
    period_us = limit.rate_period_s * 1_000_000
    now_scaled = _scaled(now, limit.rate_count)
    tolerance = limit.burst * period_us
    start = max(arrival, now_scaled)
    after = start + asked * period_us
    fits = after - now_scaled <= tolerance
    settled = after if fits else start
    wait_scaled = after - tolerance - now_scaled
    status = LimitStatus(
        limit=limit,
        used=_ceil_quotient(settled - now_scaled, period_us),
        max=limit.burst,
        asked=asked,
        reset_at=_instant(_ceil_quotient(settled, limit.rate_count)),
        retry_after_s=None if fits or asked > limit.burst else float(wait_scaled) / limit.rate_count / 1_000_000,
    )
    return fits, status, settled


class Verdict(NamedTuple):
    """Where every limit of a call stands, those that refuse it, and the arrival times to keep if none does."""

    statuses: Sequence[LimitStatus]
    refused: tuple[LimitStatus, ...]
    arrivals: dict[RateCounter, int | Decimal]


def weigh(
    asked: Iterable[tuple[Limit, int | Decimal]],
    *,
    key_id: str,
    period: Window,
    now: datetime,
    used: Callable[[Counter], int | Decimal],
    arrival: Callable[[RateCounter], int | Decimal],
) -> Verdict:
    """Whether what a call asks of each limit fits: all or nothing. `used` and `arrival` are what is kept."""
    statuses: list[LimitStatus] = []
    refused: list[LimitStatus] = []
    arrivals: dict[RateCounter, int | Decimal] = {}
    for limit, amount in asked:
        if limit.per is None:
            rate = rate_counter_of(limit, key_id)
            fits, status, arrivals[rate] = check_rate(limit, arrival(rate), amount, now)
        else:
            counter = counter_of(limit, key_id, now, period)
            fits, status = check_window(limit, counter.window, used(counter), amount, now)
        statuses.append(status)
        if not fits:
            refused.append(status)
    if refused:
        statuses = [
            status if any(status is refusal for refusal in refused) else _uncounted(status, key_id, arrival, now)
            for status in statuses
        ]
    return Verdict(tuple(statuses), tuple(refused), arrivals)


def moved_arrival(
    rate: RateCounter, arrival: int | Decimal, claimed: int | Decimal, delta: int | Decimal, now: datetime
) -> int | Decimal:
    """A rate's theoretical arrival time after a call that left it at `claimed` turned out to take `delta` units more.

    What was taken too much is given back only until the claim has worn off. After that the rate has refilled all the
    same, and the units would be there twice.
    """
    now_scaled = _scaled(now, rate.units)
    if delta > 0:
        return max(arrival, now_scaled) + delta * rate.period_us
    return arrival + delta * rate.period_us if now_scaled < claimed else arrival


def _uncounted(
    status: LimitStatus, key_id: str, arrival: Callable[[RateCounter], int | Decimal], now: datetime
) -> LimitStatus:
    """Where a limit that had room stands when another one refused the call."""
    if status.limit.per is None:
        kept = arrival(rate_counter_of(status.limit, key_id))
        return replace(check_rate(status.limit, kept, 0, now)[1], asked=status.asked)
    return replace(status, used=_plain(status.limit, status.used - status.asked))


def missing_name(plan: Plan, call: Call, units: Mapping[str, int | Decimal]) -> tuple[str, Rate] | None:
    """A provider or model that the call does not say, and a rate of its line that cannot price its units without."""
    for rate in plan.rates:
        metric = "tokens" if rate.type == "cost_plus" else rate.metric
        if rate.type == "flat" or metric is None or not units[metric] or rate.line not in ("*", call.line):
            continue
        for name in ("provider", "model"):
            is_needed = getattr(rate.match, name) is not None or (rate.type == "cost_plus" and name == "model")
            if is_needed and getattr(call, name) is None:
                return name, rate
    return None


def refusing(statuses: Sequence[LimitStatus]) -> LimitStatus:
    """Of limits that refuse, the one that takes longest to fit again; one that never will comes first."""
    return max(statuses, key=lambda status: float("inf") if status.retry_after_s is None else status.retry_after_s)


def _scaled(at: datetime, units: int) -> int:
    return ((at - _EPOCH) // _MICROSECOND) * units


def _instant(microseconds: int) -> datetime:
    most = (_LATEST - _EPOCH) // _MICROSECOND
    return _EPOCH + timedelta(microseconds=min(microseconds, most))


def _ceil_quotient(number: int | Decimal, divisor: int) -> int:
    # `//` rounds down for int and towards zero for Decimal; these numbers are never negative, where both agree.
    whole, rest = divmod(number, divisor)
    return int(whole) + bool(rest)


def _plain(limit: Limit, value: int | Decimal) -> int | Decimal:
    return value if limit.metric == "quantity" else int(value)
