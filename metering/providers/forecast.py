"""When a provider's limit will be used up, and how full it is, from what was read of it over time (pure)."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from statistics import StatisticsError, linear_regression
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from metering.providers.limits import LimitWindow
    from metering.providers.probes import ProviderStatus

__all__ = ["LEVELS", "TREND", "Reading", "Watched", "WindowState", "exhausted_at", "level_of", "window_states"]

Watched = tuple[str, str, str]
"""Credential, provider and window."""

LEVELS = (80, 95)
"""Percent used from which on somebody should know."""
TREND = timedelta(days=1)
"""How far back readings tell a trend."""
FARTHEST = timedelta(days=366)
"""What a trend says of later is no forecast."""


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
        """A window of a probe; what the provider's clock says of its reset is put into ours."""
        wait = window.reset_in_ms
        return cls(
            checked_at=checked_at,
            limit=_decimal(window.limit),
            remaining=_decimal(window.remaining),
            percent_used=_decimal(window.percent_used),
            reset_at=None if wait is None else checked_at + timedelta(milliseconds=wait),
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
    """Those of LEVELS that are reached now, and were not at the reading before."""

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
            was = level_of(readings[-2]) if len(readings) > 1 else 0
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
    fewer than two moments, nothing used between them, a reset that comes first, or more than a year away. A window of
    which nothing remains is exhausted when that was read.
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
    """How fast what remains gets less, by least squares; 0 where that takes a second moment."""
    origin = readings[-1].checked_at
    times = [(reading.checked_at - origin).total_seconds() for reading in readings]
    try:
        return -linear_regression(times, [float(reading.remaining or 0) for reading in readings]).slope
    except StatisticsError:
        return 0


def _decimal(value: float | Decimal | None) -> Decimal | None:
    """Exact to the 12 decimals that the ledger keeps."""
    if value is None:
        return None
    exact = Decimal(str(value))
    places = Decimal(10) ** -12
    return exact if exact == exact.to_integral_value() else exact.quantize(places).normalize()
