"""When a limit will be used up, and which levels are reached: the rules alone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metering.providers import LimitWindow
from metering.providers.forecast import FARTHEST, Reading, exhausted_at, since, window_states
from metering.providers.probes import ProviderStatus

START = datetime(2026, 3, 12, 12, tzinfo=UTC)


def at(minutes: float) -> datetime:
    return START + timedelta(minutes=minutes)


def read(
    minutes: float, remaining: int | str | None, *, limit: int | None = 1_000, resets: float | None = None
) -> Reading:
    return Reading(
        checked_at=at(minutes),
        limit=None if limit is None else Decimal(limit),
        remaining=None if remaining is None else Decimal(remaining),
        reset_at=None if resets is None else at(resets),
    )


@pytest.mark.parametrize(
    ("readings", "minutes"),
    [
        ([read(0, 1_000), read(5, 900)], 50),
        ([read(0, 1_000), read(1, 900)], 10),
        ([read(0, 1_000), read(5, 900), read(10, 800)], 50),
        ([read(0, "10.50", limit=20), read(60, "9.00", limit=20)], 420),
        ([read(0, 1_000, resets=600), read(5, 500, resets=600)], 10),
        # What came before the window was whole again tells nothing.
        ([read(0, 100), read(5, 1_000), read(10, 900)], 55),
        ([read(0, 1_000, resets=3), read(5, 900, resets=600), read(10, 850, resets=600)], 95),
        # Where the limit was another one, what remained was of another window.
        ([read(0, 5_000, limit=5_000), read(5, 1_000), read(10, 900)], 55),
        ([read(0, None), read(5, 1_000), read(10, 900)], 55),
        ([read(10, 0)], 10),
        ([read(0, 5), read(10, 0, resets=60)], 10),
    ],
)
def test_the_trend_of_what_remains(readings: list[Reading], minutes: float) -> None:
    assert exhausted_at(readings) == at(minutes)


@pytest.mark.parametrize(
    "readings",
    [
        [],
        [read(0, 900)],
        [read(0, 900), read(0, 800)],
        # Too short to tell.
        [read(0, 900), read(0.99, 800)],
        [read(0, 900), read(5, 900)],
        [read(0, 800), read(5, 900)],
        [read(0, 900), read(5, None)],
        # It is whole again before it would be used up, or when it would.
        [read(0, 1_000, resets=20), read(5, 900, resets=20)],
        [read(0, 1_000, resets=50), read(5, 900, resets=50)],
        [read(0, 1_000, resets=1), read(5, 0, resets=5)],
        # Each was read in a window of its own.
        [read(0, 1_000, resets=1), read(5, 900, resets=6)],
        # Years away.
        [read(0, 2**53), read(5, 2**53 - 1)],
    ],
)
def test_what_cannot_be_told_is_none(readings: list[Reading]) -> None:
    assert exhausted_at(readings) is None


_readings = st.lists(
    st.builds(
        read,
        st.integers(0, 10**6),
        st.none() | st.integers(0, 2**53),
        limit=st.none() | st.integers(0, 2**53),
        resets=st.none() | st.integers(0, 10**6),
    ),
    max_size=12,
).map(lambda found: sorted(found, key=lambda reading: reading.checked_at))


@given(_readings)
def test_a_forecast_is_never_in_the_past_nor_after_the_reset(readings: list[Reading]) -> None:
    found = exhausted_at(readings)
    if found is not None:
        last = readings[-1]
        assert last.checked_at <= found <= last.checked_at + FARTHEST
        assert last.reset_at is None or found < last.reset_at


def status(minutes: float, *, percent: float | None, wait_ms: int | None = None) -> ProviderStatus:
    window = LimitWindow(limit=100, remaining=7, percent_used=percent, reset_in_ms=wait_ms, reset_at=at(99))
    return ProviderStatus(provider="openai", account_key="prod", checked_at=at(minutes), windows={"tokens": window})


@pytest.mark.parametrize(
    ("before", "now", "crossed"),
    [
        ([], 79.9, ()),
        ([], 80.0, (80,)),
        ([], 99.0, (80, 95)),
        ([79.0], 95.0, (80, 95)),
        ([80.0], 94.0, ()),
        ([80.0], 95.0, (95,)),
        ([96.0], 97.0, ()),
        ([96.0, 3.0], 81.0, (80,)),
        ([None], 81.0, (80,)),
        ([96.0], None, ()),
        # What was last said counts, however long ago it was.
        ([96.0, None, None], 97.0, ()),
        ([81.0, None], 96.0, (95,)),
    ],
)
def test_levels_are_crossed_once(before: list[float | None], now: float | None, crossed: tuple[int, ...]) -> None:
    history = [
        Reading(checked_at=at(minutes), percent_used=None if percent is None else Decimal(str(percent)))
        for minutes, percent in enumerate(before)
    ]
    [state] = window_states([status(10, percent=now)], {("prod", "openai", "tokens"): history})
    assert state.crossed == crossed


def test_a_window_by_our_clock() -> None:
    """The provider's clock may be another one, so a reset is so much later than when it was asked."""
    [state] = window_states([status(0, percent=93.5, wait_ms=90_000)], {})
    assert (state.credential, state.provider, state.window) == ("prod", "openai", "tokens")
    assert state.now == Reading(
        checked_at=at(0),
        limit=Decimal(100),
        remaining=Decimal(7),
        percent_used=Decimal("93.5"),
        reset_at=at(1.5),
    )


def test_a_status_that_is_stored_already_is_not_its_own_past() -> None:
    kept = Reading(checked_at=at(10), percent_used=Decimal(81), limit=Decimal(100), remaining=Decimal(7))
    [state] = window_states([status(10, percent=81.0)], {("prod", "openai", "tokens"): [kept]})
    assert (state.crossed, state.exhausted_at) == ((80,), None)


def test_what_no_ledger_can_hold_is_not_read() -> None:
    window = LimitWindow(limit=10**26, remaining=Decimal("NaN"), percent_used=float("inf"), reset_in_ms=10**20)
    assert Reading.of(at(0), window) == Reading(checked_at=at(0))
    largest = LimitWindow(limit=10**26 - 1, remaining=Decimal("1e-12"), percent_used=10.0**25)
    assert Reading.of(at(0), largest) == Reading(
        checked_at=at(0), limit=Decimal(10**26 - 1), remaining=Decimal("1e-12"), percent_used=Decimal(10**25)
    )


def test_a_history_goes_on_and_ends() -> None:
    old, recent = Reading(checked_at=at(-1)), Reading(checked_at=at(1))
    gone = {("other", "openai", "tokens"): [old], ("third", "openai", "tokens"): [old, recent]}
    states = window_states([status(10, percent=7.0)], {("prod", "openai", "tokens"): [old, recent]})
    assert since(at(0), states, gone) == {
        ("third", "openai", "tokens"): [recent],
        ("prod", "openai", "tokens"): [recent, states[0].now],
    }
