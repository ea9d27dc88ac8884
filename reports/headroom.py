"""What remains of the providers' limits, over time: one page for those who run what calls them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from metering.providers.forecast import LEVELS, level_of
from metering.providers.showing import duration_text, problem_of
from reports.pages import page

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from metering.providers.forecast import Reading, WindowState
    from metering.providers.probes import ProviderStatus

__all__ = ["headroom_html"]

WIDTH, HEIGHT = 240, 40
"""Of the picture of one window, in its own units."""


def headroom_html(
    statuses: Sequence[ProviderStatus], states: Sequence[WindowState], *, start: datetime, end: datetime
) -> str:
    """One self-contained page: each credential, what remained of its windows since `start`, and what failed."""
    return page(
        "headroom.html",
        credentials=[
            (
                status,
                problem_of(status),
                [
                    (state, _points(state.readings, start, end), _lowest(state.readings))
                    for state in states
                    if (state.credential, state.provider) == (status.account_key, status.provider)
                ],
            )
            for status in statuses
        ],
        failed=sum(status.failed for status in statuses),
        tight=sum(level_of(state.now) > 0 for state in states),
        level=LEVELS[0],
        start=start,
        end=end,
        width=WIDTH,
        height=HEIGHT,
        duration=duration_text,
    )


def _points(readings: Sequence[Reading], start: datetime, end: datetime) -> str:
    """Headroom as a polyline from the left; empty where no two moments are known."""
    span = end - start
    known = [
        f"{WIDTH * ((reading.checked_at - start) / span):.1f},{HEIGHT * (1 - _headroom(reading) / 100):.1f}"
        for reading in readings
        if reading.percent_used is not None and start <= reading.checked_at <= end
    ]
    return " ".join(known) if len(known) > 1 else ""


def _lowest(readings: Sequence[Reading]) -> float | None:
    return min((_headroom(reading) for reading in readings if reading.percent_used is not None), default=None)


def _headroom(reading: Reading) -> float:
    """Percent; 0 where more than all is used."""
    assert reading.percent_used is not None
    return max(0.0, 100 - float(reading.percent_used))
