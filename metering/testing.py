"""For the tests of apps: a meter that leaves nothing behind and hides nothing."""

from __future__ import annotations

import tempfile
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from metering.aio import AsyncMeter
from metering.clock import utc_now
from metering.meter import Meter

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from datetime import datetime

__all__ = ["temporary_async_meter", "temporary_meter"]


@contextmanager
def temporary_meter(plans: str | None = None, *, clock: Callable[[], datetime] = utc_now) -> Iterator[Meter]:
    """A meter on a new SQLite file of its own, which is deleted when the block ends. Its `record` raises.

    `plans` is the text of a plans.toml; without it there are the built-in plans. `clock` is the time of every decision,
    so a test may set it. Raises `InvalidPlan`.
    """
    with (
        _place(plans) as (url, path),
        Meter(url, plans=path, clock=clock, strict_signals=True) as meter,
    ):
        yield meter


@asynccontextmanager
async def temporary_async_meter(
    plans: str | None = None, *, clock: Callable[[], datetime] = utc_now
) -> AsyncIterator[AsyncMeter]:
    """As `temporary_meter`, for `async with temporary_async_meter() as meter:`."""
    with _place(plans) as (url, path):
        async with AsyncMeter(url, plans=path, clock=clock, strict_signals=True) as meter:
            yield meter


@contextmanager
def _place(plans: str | None) -> Iterator[tuple[str, Path]]:
    with tempfile.TemporaryDirectory(prefix="tallystick-") as folder:
        path = Path(folder, "plans.toml")
        if plans is not None:
            path.write_text(plans, encoding="utf-8")
        yield f"sqlite:///{folder}/ledger.db", path
