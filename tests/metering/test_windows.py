from __future__ import annotations

import time
from datetime import UTC, date, datetime, timedelta, timezone
from importlib.resources import files
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metering.errors import InvalidEvent, InvalidSetting
from metering.windows import (
    Per,
    Window,
    calendar_window,
    checked_anchor_day,
    checked_time_zone,
    local_dates,
    period_label,
    period_of_month,
    period_window,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

ZONES = sorted(files("tzdata").joinpath("zones").read_text().split())
CHANGING_AT_MIDNIGHT = ["Africa/Cairo", "America/Havana", "America/Sao_Paulo", "America/St_Johns", "Asia/Beirut"]
TICK = timedelta(microseconds=1)

instants = st.datetimes(datetime(2000, 1, 1), datetime(2037, 12, 31), timezones=st.just(UTC))  # noqa: DTZ001
zones = st.sampled_from(CHANGING_AT_MIDNIGHT) | st.sampled_from(ZONES)
anchors = st.integers(1, 31)
months = st.builds("{}-{:02}".format, st.integers(2000, 2037), st.integers(1, 12))


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def window(start: str, end: str) -> Window:
    return Window(start=utc(start), end=utc(end))


# Calendar windows


@pytest.mark.parametrize(
    ("per", "at", "expected"),
    [
        ("minute", "2026-10-31T23:59:59.999999", window("2026-10-31T23:59", "2026-11-01T00:00")),
        ("hour", "2026-12-31T23:59:59", window("2026-12-31T23:00", "2027-01-01T00:00")),
        ("day", "2024-02-29T12:00", window("2024-02-29", "2024-03-01")),
        ("month", "2024-02-29T12:00", window("2024-02-01", "2024-03-01")),
        ("month", "2026-12-01", window("2026-12-01", "2027-01-01")),
        ("week", "2026-11-21T09:00", window("2026-11-16", "2026-11-23")),
        ("week", "2026-11-22T23:59:59", window("2026-11-16", "2026-11-23")),
        ("week", "2026-11-23", window("2026-11-23", "2026-11-30")),
        ("week", "2027-01-01", window("2026-12-28", "2027-01-04")),
    ],
)
def test_calendar_windows_by_example(per: Per, at: str, expected: Window) -> None:
    assert calendar_window(per, utc(at)) == expected


@given(st.sampled_from(["minute", "hour", "day", "week", "month"]), instants)
def test_a_calendar_window_holds_its_instant_and_meets_its_neighbours(per: Per, at: datetime) -> None:
    found = calendar_window(per, at)
    assert found.start <= at < found.end
    assert found.start.tzinfo is UTC
    assert found.end.tzinfo is UTC
    assert calendar_window(per, found.start) == found
    assert calendar_window(per, found.end - TICK) == found
    assert calendar_window(per, found.end).start == found.end
    assert calendar_window(per, found.start - TICK).end == found.start


@given(instants)
def test_weeks_are_those_of_iso_8601(at: datetime) -> None:
    year, week, _ = at.isocalendar()
    assert calendar_window("week", at).start.date() == date.fromisocalendar(year, week, 1)


def test_a_calendar_window_is_utc_wherever_the_instant_was_written() -> None:
    written_in_kolkata = datetime(2026, 11, 1, 5, 29, tzinfo=timezone(timedelta(hours=5, minutes=30)))
    assert calendar_window("day", written_in_kolkata) == window("2026-10-31", "2026-11-01")


def test_calendar_windows_refuse_what_they_cannot_place() -> None:
    with pytest.raises(InvalidSetting, match=r"per: got 'year', expected one of minute, hour, day, week, month"):
        calendar_window("year", utc("2026-10-01"))  # type: ignore[arg-type]
    with pytest.raises(InvalidEvent, match="no time zone"):
        calendar_window("day", datetime(2026, 10, 1))  # noqa: DTZ001
    with pytest.raises(InvalidEvent, match="years 2 to 9998"):
        calendar_window("month", utc("9999-12-31"))


# Billing periods


@pytest.mark.parametrize(
    ("time_zone", "anchor_day", "month", "expected"),
    [
        ("UTC", 1, "2026-10", window("2026-10-01", "2026-11-01")),
        ("Asia/Kolkata", 1, "2026-10", window("2026-09-30T18:30", "2026-10-31T18:30")),
        ("Asia/Kathmandu", 1, "2026-10", window("2026-09-30T18:15", "2026-10-31T18:15")),
        # Clocks change inside the period: an hour less, an hour more.
        ("Australia/Adelaide", 1, "2026-10", window("2026-09-30T14:30", "2026-10-31T13:30")),
        ("America/St_Johns", 1, "2026-11", window("2026-11-01T02:30", "2026-12-01T03:30")),
        ("Europe/Berlin", 15, "2026-10", window("2026-10-14T22:00", "2026-11-14T23:00")),
        # Clocks go from 00:00 to 01:00 on the anchor day.
        ("America/Sao_Paulo", 4, "2018-11", window("2018-11-04T03:00", "2018-12-04T02:00")),
        ("Asia/Beirut", 29, "2026-03", window("2026-03-28T22:00", "2026-04-28T21:00")),
        ("Africa/Cairo", 24, "2026-04", window("2026-04-23T22:00", "2026-05-23T21:00")),
        # Clocks went from 23:30 to 00:30, so half an hour of the anchor day is missing.
        ("America/Toronto", 31, "1919-03", window("1919-03-31T04:30", "1919-04-30T04:00")),
        # 30 December 2011 did not happen in Samoa.
        ("Pacific/Apia", 30, "2011-12", window("2011-12-30T10:00", "2012-01-29T10:00")),
        # Clocks go from 01:00 back to 00:00: midnight happens twice.
        ("America/Havana", 1, "2026-11", window("2026-11-01T04:00", "2026-12-01T05:00")),
        # An anchor day that the month lacks.
        ("UTC", 31, "2027-02", window("2027-02-28", "2027-03-31")),
        ("UTC", 31, "2028-02", window("2028-02-29", "2028-03-31")),
        ("UTC", 30, "2027-01", window("2027-01-30", "2027-02-28")),
        ("UTC", 31, "2026-04", window("2026-04-30", "2026-05-31")),
    ],
)
def test_periods_by_example(time_zone: str, anchor_day: int, month: str, expected: Window) -> None:
    assert period_of_month(month, time_zone=time_zone, anchor_day=anchor_day) == expected
    for at in (expected.start, expected.end - TICK):
        assert period_window(at, time_zone=time_zone, anchor_day=anchor_day) == expected


@pytest.mark.parametrize(
    ("at", "anchor_day", "expected"),
    [
        # At 00:01 clocks in St John's went back to 23:01 of the day before.
        ("2010-11-07T02:45", 7, window("2010-11-07T02:30", "2010-12-07T03:30")),
        ("2009-11-01T02:45", 1, window("2009-11-01T02:30", "2009-12-01T03:30")),
    ],
)
def test_an_evening_that_happens_twice_stays_in_the_period_its_midnight_began(
    at: str, anchor_day: int, expected: Window
) -> None:
    again_the_day_before = utc(at)
    local_date = again_the_day_before.astimezone(ZoneInfo("America/St_Johns")).date()
    assert local_date == again_the_day_before.date() - timedelta(days=1)
    assert period_window(again_the_day_before, time_zone="America/St_Johns", anchor_day=anchor_day) == expected


@given(instants, zones, anchors)
def test_a_period_holds_its_instant_and_meets_its_neighbours(at: datetime, time_zone: str, anchor_day: int) -> None:
    found = period_window(at, time_zone=time_zone, anchor_day=anchor_day)
    assert found.start <= at < found.end
    assert found.start.tzinfo is UTC
    assert found.end.tzinfo is UTC
    assert period_window(found.start, time_zone=time_zone, anchor_day=anchor_day) == found
    assert period_window(found.end - TICK, time_zone=time_zone, anchor_day=anchor_day) == found
    assert period_window(found.end, time_zone=time_zone, anchor_day=anchor_day).start == found.end
    assert period_window(found.start - TICK, time_zone=time_zone, anchor_day=anchor_day).end == found.start


@given(months, zones, anchors)
def test_a_period_starts_at_the_first_instant_of_its_anchor_day(month: str, time_zone: str, anchor_day: int) -> None:
    start = period_of_month(month, time_zone=time_zone, anchor_day=anchor_day).start
    first = datetime.fromisoformat(f"{month}-01")
    next_first = (first + timedelta(days=31)).replace(day=1)
    midnight = min(first + timedelta(days=anchor_day - 1), next_first - timedelta(days=1))
    zone = ZoneInfo(time_zone)
    assert start.astimezone(zone).replace(tzinfo=None) >= midnight
    assert (start - TICK).astimezone(zone).replace(tzinfo=None) < midnight


@given(months, zones, anchors)
def test_month_and_label_are_inverse(month: str, time_zone: str, anchor_day: int) -> None:
    period = period_of_month(month, time_zone=time_zone, anchor_day=anchor_day)
    assert period_label(period, time_zone) == month
    assert period_window(period.start, time_zone=time_zone, anchor_day=anchor_day) == period


@given(zones, anchors)
def test_a_year_of_periods_has_no_gap_and_never_drifts(time_zone: str, anchor_day: int) -> None:
    periods = [period_of_month(f"2027-{m:02}", time_zone=time_zone, anchor_day=anchor_day) for m in range(1, 13)]
    assert [p.end for p in periods[:-1]] == [p.start for p in periods[1:]]
    lengths = [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]
    days = [local_dates(p, time_zone)[0].day for p in periods]
    assert days == [min(anchor_day, length) for length in lengths]


@pytest.mark.parametrize(
    ("time_zone", "month", "anchor_day", "expected"),
    [
        ("Asia/Kolkata", "2026-10", 1, (date(2026, 10, 1), date(2026, 11, 1))),
        ("Pacific/Auckland", "2026-10", 1, (date(2026, 10, 1), date(2026, 11, 1))),
        ("America/St_Johns", "2027-02", 31, (date(2027, 2, 28), date(2027, 3, 31))),
        ("Asia/Beirut", "2026-03", 29, (date(2026, 3, 29), date(2026, 4, 29))),
    ],
)
def test_local_dates(time_zone: str, month: str, anchor_day: int, expected: tuple[date, date]) -> None:
    assert local_dates(period_of_month(month, time_zone=time_zone, anchor_day=anchor_day), time_zone) == expected


@pytest.mark.parametrize("month", ["", "2026-13", "2026-00", "2026-1", "26-01", "2026-10-01", "0001-01", "٢٠٢٦-10"])
def test_a_month_is_four_digits_and_two(month: str) -> None:
    with pytest.raises(InvalidSetting, match=r"month: got .* expected a month such as 2026-10"):
        period_of_month(month, time_zone="UTC", anchor_day=1)


@pytest.mark.parametrize(
    "name", ["", "Mars/Olympus", "America", "europe/berlin", "localtime", "../etc/passwd", "/etc/localtime", "\0", None]
)
def test_an_unknown_time_zone_is_refused(name: object) -> None:
    with pytest.raises(InvalidSetting, match=r"zone: got .* expected an IANA time zone") as caught:
        checked_time_zone("zone", name)
    assert caught.value.field == "zone"
    assert caught.value.value == name


@given(zones)
def test_every_zone_of_the_package_is_accepted(name: str) -> None:
    assert checked_time_zone("time_zone", name) == name
    assert period_window(utc("2026-10-15"), time_zone=name, anchor_day=1).start < utc("2026-10-15")


@pytest.mark.parametrize("day", [0, 32, -1, True, 1.0, "1", None])
def test_an_anchor_day_is_a_day_of_the_month(day: object) -> None:
    with pytest.raises(InvalidSetting, match=r"anchor: got .* expected a day of the month, 1 to 31"):
        checked_anchor_day("anchor", day)


def test_periods_refuse_what_they_cannot_place() -> None:
    at = utc("2026-10-01")
    with pytest.raises(InvalidSetting, match="time_zone: got 'Mars/Olympus'"):
        period_window(at, time_zone="Mars/Olympus", anchor_day=1)
    with pytest.raises(InvalidSetting, match="time_zone: got 'Mars/Olympus'"):
        period_of_month("2026-10", time_zone="Mars/Olympus", anchor_day=1)
    with pytest.raises(InvalidSetting, match="anchor_day: got 32"):
        period_window(at, time_zone="UTC", anchor_day=32)
    with pytest.raises(InvalidSetting, match="anchor_day: got 0"):
        period_of_month("2026-10", time_zone="UTC", anchor_day=0)
    with pytest.raises(InvalidEvent, match="no time zone"):
        period_window(at.replace(tzinfo=None), time_zone="UTC", anchor_day=1)


@pytest.fixture
def machine_in_auckland(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patched:
        patched.setenv("TZ", "Pacific/Auckland")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("machine_in_auckland")
def test_the_machine_time_zone_does_not_matter() -> None:
    assert time.localtime(utc("2026-10-31T12:00").timestamp()).tm_mon == 11, "the fixture has no effect"
    at = utc("2026-10-31T12:00")
    assert calendar_window("month", at) == window("2026-10-01", "2026-11-01")
    assert calendar_window("week", at) == window("2026-10-26", "2026-11-02")
    period = period_window(at, time_zone="Asia/Beirut", anchor_day=29)
    assert period == window("2026-10-28T22:00", "2026-11-28T22:00")
    assert period_label(period, "Asia/Beirut") == "2026-10"
    assert local_dates(period, "Asia/Beirut") == (date(2026, 10, 29), date(2026, 11, 29))
