"""When a provider's limit will be used up, and how full it is, from what was read of it over time (pure)."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from decimal import Context, Decimal, InvalidOperation
from statistics import linear_regression
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from metering.providers.limits import LimitWindow
    from metering.providers.probes import ProviderStatus

__all__ = [
    "LEVELS",
    "TREND",
    "Reading",
    "Watched",
    "WindowState",
    "exhausted_at",
    "fitting",
    "level_of",
    "since",
    "window_states",
]

Watched = tuple[str, str, str]
"""Credential, provider and window."""

LEVELS = (80, 95)
"""Percent used from which on somebody should know."""
TREND = timedelta(days=1)
"""How far back readings tell a trend."""
SHORTEST = timedelta(minutes=1)
"""What a shorter time tells is no trend."""
FARTHEST = timedelta(days=366)
"""What a trend says of later is no forecast."""

_LAST_PLACE = Decimal(10) ** -12
_FITTING = Context(prec=38, traps=[InvalidOperation])


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One window of a credential at one moment, by our clock. None is what the provider does not say."""

    checked_at: datetime
    limit: Decimal | None = None
    remaining: Decimal | None = None
    percent_used: Decimal | None = None
    reset_at: datetime | None = None

    @classmethod
    def of(cls, checked_at: datetime, window: LimitWindow) -> Reading:
        """A window of a probe; what the provider's clock says of its reset is put into ours.

        Never raises: what no ledger can hold is None.
        """
        return cls(
            checked_at=checked_at,
            limit=fitting(window.limit),
            remaining=fitting(window.remaining),
            percent_used=fitting(window.percent_used),
            reset_at=_later(checked_at, window.reset_in_ms),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowState:
    """Where one window of a credential stands, and where it is going."""

    credential: str
    provider: str
    window: str
    readings: tuple[Reading, ...]
    """Oldest first; the last one is now."""
    exhausted_at: datetime | None
    """As in `exhausted_at`."""
    crossed: tuple[int, ...]
    """Those of LEVELS that are reached now, and were not when a percentage was last said."""

    @property
    def now(self) -> Reading:
        """The last reading."""
        return self.readings[-1]


def window_states(
    statuses: Sequence[ProviderStatus], history: Mapping[Watched, Sequence[Reading]]
) -> list[WindowState]:
    """The windows of some statuses, in their order; `history` has what was read of them before, oldest first."""
    states = []
    for status in statuses:
        for name, window in status.windows.items():
            now = Reading.of(status.checked_at, window)
            known = history.get((status.account_key, status.provider, name), ())
            readings = (*(reading for reading in known if reading.checked_at < now.checked_at), now)
            was = next((level_of(each) for each in readings[-2::-1] if each.percent_used is not None), 0)
            states.append(
                WindowState(
                    credential=status.account_key,
                    provider=status.provider,
                    window=name,
                    readings=readings,
                    exhausted_at=exhausted_at(readings),
                    crossed=tuple(level for level in LEVELS if was < level <= level_of(now)),
                )
            )
    return states


def exhausted_at(readings: Sequence[Reading]) -> datetime | None:
    """When nothing will remain if use goes on as it did; `readings` are of one window, oldest first.

    The trend is the least-squares line through those since the window was last whole. None where that cannot be told:
    less than a minute between the first and the last, nothing used between them, a reset that comes first, or more than
    a year away. A window of which nothing remains is exhausted when that was read.
    """
    if not readings or readings[-1].remaining is None:
        return None
    last = readings[-1]
    assert last.remaining is not None
    if last.remaining <= 0:
        at = last.checked_at
    else:
        used_per_s = _used_per_s(_of_one_window(readings))
        left_s = float(last.remaining) / used_per_s if used_per_s > 0 else float("inf")
        if left_s > FARTHEST.total_seconds():
            return None
        at = last.checked_at + timedelta(seconds=left_s)
    return None if last.reset_at is not None and last.reset_at <= at else at


def level_of(reading: Reading) -> int:
    """The highest of LEVELS that is reached, 0 for none."""
    percent = reading.percent_used
    return max((level for level in LEVELS if percent is not None and percent >= level), default=0)


def since(
    start: datetime, states: Sequence[WindowState], history: Mapping[Watched, Sequence[Reading]]
) -> dict[Watched, list[Reading]]:
    """A history from `start` on, with the readings of some states, which have what was known before."""
    now = {(each.credential, each.provider, each.window): each.readings for each in states}
    kept = {
        watched: [each for each in readings if each.checked_at >= start]
        for watched, readings in {**history, **now}.items()
    }
    return {watched: readings for watched, readings in kept.items() if readings}


def fitting(value: float | Decimal | None) -> Decimal | None:
    """A number as the ledger keeps it, to 12 decimals; None where more than 26 digits stand before them, or none."""
    try:
        exact = None if value is None else Decimal(str(value)).quantize(_LAST_PLACE, context=_FITTING)
    except (ArithmeticError, ValueError):
        return None
    return exact if exact is not None and exact.is_finite() else None


def _later(moment: datetime, wait_ms: int | None) -> datetime | None:
    try:
        return None if wait_ms is None else moment + timedelta(milliseconds=wait_ms)
    except OverflowError:
        return None


def _of_one_window(readings: Sequence[Reading]) -> list[Reading]:
    """The last readings between which the window was not reset, and what remains did not rise; oldest first."""
    found = [readings[-1]]
    for reading in reversed(readings[:-1]):
        later = found[-1]
        if reading.remaining is None or later.remaining is None or reading.remaining < later.remaining:
            break
        if reading.limit != later.limit or (reading.reset_at is not None and reading.reset_at <= later.checked_at):
            break
        found.append(reading)
    return found[::-1]


def _used_per_s(readings: Sequence[Reading]) -> float:
    """How fast what remains gets less, by least squares; 0 where that takes more time between them."""
    origin = readings[-1].checked_at
    if origin - readings[0].checked_at < SHORTEST:
        return 0
    times = [(reading.checked_at - origin).total_seconds() for reading in readings]
    return -linear_regression(times, [float(reading.remaining or 0) for reading in readings]).slope
