"""Where time is cut: calendar windows in UTC for quotas, billing periods in the account's own time zone.

A window is half-open, so neighbours meet in one instant that belongs to the later one. Every function is pure: the
machine's own clock and time zone are never asked.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import cache, lru_cache
from importlib.resources import files
from typing import Literal, get_args
from zoneinfo import ZoneInfo

from metering import checks
from metering.errors import InvalidEvent, InvalidSetting

__all__ = [
    "Per",
    "Window",
    "calendar_window",
    "checked_anchor_day",
    "checked_time_zone",
    "local_dates",
    "period_label",
    "period_of_month",
    "period_window",
]

Per = Literal["minute", "hour", "day", "week", "month"]

_MONTH = re.compile(r"(\d{4})-(\d{2})", re.ASCII)
_FIRST_YEAR, _LAST_YEAR = 2, 9998
"""Datetimes know the years 1 to 9999, and a window may start or end in the month beside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A stretch of time: from `start` up to and without `end`, both aware and in UTC."""

    start: datetime
    end: datetime


def calendar_window(per: Per, at: datetime) -> Window:
    """The UTC minute, hour, day, week or month that holds `at`. A week starts on Monday (ISO 8601).

    Raises `InvalidEvent` for a time without zone or outside the years 2 to 9998, `InvalidSetting` for another `per`.
    """
    at = _checked(at)
    match per:
        case "month":
            return _month(at.year, at.month)
        case "day":
            return _day(at.toordinal())
        case "minute":
            return _minute(at.toordinal(), at.hour, at.minute)
        case "hour":
            return _hour(at.toordinal(), at.hour)
        case "week":
            return _week(at.toordinal() - at.weekday())
        case _:
            raise InvalidSetting("per", per, f"one of {', '.join(get_args(Per))}")


# Most calls ask for the window that the call before them was in, and a lookup costs less than building one.


@lru_cache(maxsize=256)
def _minute(ordinal: int, hour: int, minute: int) -> Window:
    return _from_start(_midnight(ordinal).replace(hour=hour, minute=minute), timedelta(minutes=1))


@lru_cache(maxsize=256)
def _hour(ordinal: int, hour: int) -> Window:
    return _from_start(_midnight(ordinal).replace(hour=hour), timedelta(hours=1))


@lru_cache(maxsize=256)
def _day(ordinal: int) -> Window:
    return _from_start(_midnight(ordinal), timedelta(days=1))


@lru_cache(maxsize=256)
def _week(monday: int) -> Window:
    return _from_start(_midnight(monday), timedelta(weeks=1))


@lru_cache(maxsize=256)
def _month(year: int, month: int) -> Window:
    next_year, next_month = _next_month(year, month)
    return Window(start=datetime(year, month, 1, tzinfo=UTC), end=datetime(next_year, next_month, 1, tzinfo=UTC))


def _midnight(ordinal: int) -> datetime:
    return datetime.fromordinal(ordinal).replace(tzinfo=UTC)


def _from_start(start: datetime, length: timedelta) -> Window:
    return Window(start=start, end=start + length)


def period_window(at: datetime, *, time_zone: str, anchor_day: int) -> Window:
    """The billing period that holds `at`, from local midnight of one anchor day to that of the next, in UTC.

    Each anchor day is counted from `anchor_day` itself: 31 is the 28th or 29th of February and the 31st of March.
    A midnight that a clock change skips is the first instant after it; one that happens twice is the first of the two.

    Raises `InvalidEvent` for a time without zone or outside the years 2 to 9998, `InvalidSetting` for an unknown zone
    or an anchor day outside 1 to 31.
    """
    at = _checked(at)
    local = at.astimezone(_zone(time_zone))
    checked_anchor_day("anchor_day", anchor_day)
    # Compared as instants: when clocks go back over midnight, the evening before happens again in the new period.
    month = local.year, local.month
    if at < _period_start(*month, time_zone, anchor_day):
        month = _previous_month(*month)
    elif at >= _period_start(*_next_month(*month), time_zone, anchor_day):
        month = _next_month(*month)
    return _period_from(*month, time_zone, anchor_day)


def period_of_month(month: str, *, time_zone: str, anchor_day: int) -> Window:
    """The billing period that starts in the local month `month`, written as `2026-10`.

    Raises `InvalidSetting` for what is not such a month, an unknown zone, or an anchor day outside 1 to 31.
    """
    parts = _MONTH.fullmatch(month)
    if not parts or not 1 <= int(parts[2]) <= 12 or not _FIRST_YEAR <= int(parts[1]) <= _LAST_YEAR:
        raise InvalidSetting("month", month, "a month such as 2026-10")
    checked_time_zone("time_zone", time_zone)
    checked_anchor_day("anchor_day", anchor_day)
    return _period_from(int(parts[1]), int(parts[2]), time_zone, anchor_day)


def period_label(window: Window, time_zone: str) -> str:
    """The local month in which a billing period starts, such as `2026-10`: what `period_of_month` takes."""
    start = window.start.astimezone(_zone(time_zone))
    return f"{start.year:04}-{start.month:02}"


def local_dates(window: Window, time_zone: str) -> tuple[date, date]:
    """The first local day of a billing period, and the first local day after it."""
    zone = _zone(time_zone)
    return window.start.astimezone(zone).date(), window.end.astimezone(zone).date()


def checked_time_zone(field: str, name: object) -> str:
    """`name` if it is an IANA time zone. Raises `InvalidSetting` naming `field` if it is not.

    The list is that of the tzdata package, so that every machine knows the same zones: a system's own may hold a
    `localtime`, and match names without regard to case.
    """
    if not isinstance(name, str) or name not in _known_zones():
        raise InvalidSetting(field, name, "an IANA time zone such as Europe/Berlin")
    return name


def checked_anchor_day(field: str, day: object) -> int:
    """`day` if it is a whole number from 1 to 31. Raises `InvalidSetting` naming `field` if it is not."""
    if type(day) is not int or not 1 <= day <= 31:
        raise InvalidSetting(field, day, "a day of the month, 1 to 31")
    return day


def _checked(at: datetime) -> datetime:
    if at.tzinfo is not UTC:
        at = checks.instant("at", at)
    if not _FIRST_YEAR <= at.year <= _LAST_YEAR:
        raise InvalidEvent("at", at.isoformat(), f"a time in the years {_FIRST_YEAR} to {_LAST_YEAR}")
    return at


@cache
def _known_zones() -> frozenset[str]:
    return frozenset(files("tzdata").joinpath("zones").read_text(encoding="utf-8").split())


@lru_cache(maxsize=1024)
def _zone(name: str) -> ZoneInfo:
    return ZoneInfo(checked_time_zone("time_zone", name))


def _next_month(year: int, month: int) -> tuple[int, int]:
    return (year, month + 1) if month < 12 else (year + 1, 1)


def _previous_month(year: int, month: int) -> tuple[int, int]:
    return (year, month - 1) if month > 1 else (year - 1, 12)


def _period_from(year: int, month: int, time_zone: str, anchor_day: int) -> Window:
    return Window(
        start=_period_start(year, month, time_zone, anchor_day),
        end=_period_start(*_next_month(year, month), time_zone, anchor_day),
    )


@lru_cache(maxsize=4096)
def _period_start(year: int, month: int, time_zone: str, anchor_day: int) -> datetime:
    first_of_next = date(*_next_month(year, month), 1)
    last_day = (first_of_next - timedelta(days=1)).day
    return _first_instant(date(year, month, min(anchor_day, last_day)), _zone(time_zone))


def _first_instant(day: date, zone: ZoneInfo) -> datetime:
    """Midnight of `day` in UTC; the end of the gap where a clock change skips it."""
    midnight = datetime(day.year, day.month, day.day, tzinfo=zone)
    instant = midnight.astimezone(UTC)
    if instant.astimezone(zone).replace(tzinfo=None) == midnight.replace(tzinfo=None):
        return instant
    # PEP 495: inside a gap fold=1 resolves to before the change and fold=0 to after it, so the change lies between.
    before, after = midnight.replace(fold=1).astimezone(UTC), instant
    while after - before > timedelta(seconds=1):
        middle = (before + (after - before) / 2).replace(microsecond=0)
        if middle.astimezone(zone).utcoffset() == after.astimezone(zone).utcoffset():
            after = middle
        else:
            before = middle
    return after
