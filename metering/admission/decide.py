"""Where a limit stands and whether a call still fits. Pure: counters and the clock are arguments."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from metering.admission.protocol import LimitStatus
from metering.errors import InvalidEvent
from metering.windows import Window, calendar_window

if TYPE_CHECKING:
    from collections.abc import Mapping
    from decimal import Decimal

    from metering.plans import Limit

__all__ = [
    "Counter",
    "RateCounter",
    "asked_amount",
    "check_rate",
    "check_window",
    "counter_of",
    "rate_counter_of",
    "refusing",
]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


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
    raise InvalidEvent(
        name, asked if usage_given or quantity_given else None, f"{least}: the plan limits it to {limit}"
    )


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
    now_scaled = ((now - _EPOCH) // _MICROSECOND) * limit.rate_count
    tolerance = limit.burst * period_us
    start = max(arrival, now_scaled)
    after = start + asked * period_us
    fits = after - now_scaled <= tolerance
    settled = after if fits else start
    wait_scaled = after - tolerance - now_scaled
    status = LimitStatus(
        limit=limit,
        used=_plain(limit, -((now_scaled - settled) // period_us)),
        max=limit.burst,
        asked=asked,
        reset_at=_EPOCH + timedelta(microseconds=int(-(-settled // limit.rate_count))),
        retry_after_s=None if fits or asked > limit.burst else float(wait_scaled) / limit.rate_count / 1_000_000,
    )
    return fits, status, settled


def refusing(statuses: list[LimitStatus]) -> LimitStatus:
    """Of limits that refuse, the one that takes longest to fit again; one that never will comes first."""
    return max(statuses, key=lambda status: float("inf") if status.retry_after_s is None else status.retry_after_s)


def _plain(limit: Limit, value: int | Decimal) -> int | Decimal:
    return value if limit.metric == "quantity" else int(value)
