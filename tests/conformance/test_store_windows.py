"""Limits per billing period cut time where the account lives, not where the server stands."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from metering.plans import Limit
from metering.windows import period_window

A_TICK = timedelta(microseconds=1)

# (zone, anchor day, the instant in UTC at which a period begins there)
EDGES = [
    ("Asia/Kolkata", 1, datetime(2026, 2, 28, 18, 30, tzinfo=UTC)),
    ("Asia/Kathmandu", 1, datetime(2026, 2, 28, 18, 15, tzinfo=UTC)),
    ("Australia/Adelaide", 1, datetime(2026, 2, 28, 13, 30, tzinfo=UTC)),
    ("Australia/Adelaide", 31, datetime(2026, 4, 29, 14, 30, tzinfo=UTC)),
    # Clocks go forward at midnight: the day begins at 01:00.
    ("Asia/Beirut", 29, datetime(2026, 3, 28, 22, 0, tzinfo=UTC)),
    ("America/Sao_Paulo", 4, datetime(2018, 11, 4, 3, 0, tzinfo=UTC)),
    # Clocks go back at midnight: the last hour of the evening happens twice, and the day begins after it.
    ("Asia/Beirut", 25, datetime(2026, 10, 24, 22, 0, tzinfo=UTC)),
    ("America/Sao_Paulo", 1, datetime(2026, 3, 1, 3, 0, tzinfo=UTC)),
    ("Pacific/Auckland", 1, datetime(2026, 2, 28, 11, 0, tzinfo=UTC)),
]


@pytest.mark.parametrize(("zone", "anchor_day", "edge"), EDGES)
def test_a_period_begins_at_local_midnight(shop: Any, clock: Any, zone: str, anchor_day: int, edge: datetime) -> None:
    clock.now = edge - A_TICK
    secret = shop.open_account(Limit(metric="requests", per="period", max=1), time_zone=zone, anchor_day=anchor_day)
    last = shop.consume(secret)
    assert (last.allowed, last.reset_at) == (True, edge)
    refused = shop.consume(secret)
    assert (refused.allowed, refused.refused_by.retry_after_s) == (False, A_TICK.total_seconds())
    clock.now = edge
    first = shop.consume(secret)
    assert first.allowed
    assert not shop.consume(secret).allowed
    assert first.reset_at == period_window(edge, time_zone=zone, anchor_day=anchor_day).end
    assert len({event["period"] for event in shop.events()}) == 2


def test_a_31st_is_counted_from_the_31st(shop: Any, clock: Any) -> None:
    clock.now = datetime(2026, 1, 31, tzinfo=UTC)
    secret = shop.open_account(Limit(metric="requests", per="period", max=9), anchor_day=31)
    resets = []
    for _ in range(4):
        resets.append(shop.consume(secret).reset_at)
        clock.now = resets[-1]
    assert [reset.date().isoformat() for reset in resets] == ["2026-02-28", "2026-03-31", "2026-04-30", "2026-05-31"]


def test_calendar_windows_are_utc_for_everyone(shop: Any, clock: Any) -> None:
    secret = shop.open_account(
        Limit(metric="requests", per="day", max=5),
        Limit(metric="requests", per="week", max=5),
        Limit(metric="requests", per="month", max=5),
        time_zone="Australia/Adelaide",
    )
    resets = [status.reset_at for status in shop.consume(secret).limits]
    assert [reset.isoformat() for reset in resets] == [
        "2026-03-13T00:00:00+00:00",
        "2026-03-16T00:00:00+00:00",
        "2026-04-01T00:00:00+00:00",
    ]


def test_a_hold_is_of_the_period_it_was_made_in(shop: Any, clock: Any) -> None:
    edge = datetime(2026, 2, 28, 18, 30, tzinfo=UTC)
    clock.now = edge - timedelta(minutes=5)
    secret = shop.open_account(Limit(metric="requests", per="period", max=1), time_zone="Asia/Kolkata")
    hold = shop.reserve(secret)
    clock.now = edge + timedelta(minutes=5)
    shop.consume(secret)
    hold.settle()
    assert [(event["period"], event["occurred_at"]) for event in shop.events()] == [
        ("2026-02", "2026-02-28T18:25:00.000000Z"),
        ("2026-03", "2026-02-28T18:35:00.000000Z"),
    ]
    assert shop.used() == [1]
