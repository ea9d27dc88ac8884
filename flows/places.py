"""Where a flow finds its ledger and warehouse, and what time it is."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from metering import checks
from metering.errors import InvalidEvent, InvalidSetting
from metering.ledger import Ledger
from metering.settings import Settings
from metering.windows import period_of_month

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["MAX_REASON", "Places", "billed_month", "stated"]

MAX_REASON = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """The settings a flow needs, checked: the ledger is there, and of this schema."""

    ledger_url: str
    warehouse: Path
    out: Path
    archives: Path

    @classmethod
    def from_env(cls) -> Places:
        """Read METERING_* settings. Raises what opening the ledger raises."""
        settings = Settings.from_env()
        Ledger(settings.ledger_url, timeout_s=settings.timeout_s).close()
        return cls(
            ledger_url=settings.ledger_url,
            warehouse=settings.warehouse,
            out=settings.out,
            archives=settings.archives,
        )


def billed_month(period: str | None, now: datetime) -> str:
    """The month to bill: `period`, checked to be `YYYY-MM`, else the one before `now`. Raises `InvalidSetting`."""
    if period is None:
        return _previous_month(now)
    try:
        period_of_month(period, time_zone="UTC", anchor_day=1)
    except InvalidSetting as exc:
        raise InvalidSetting("period", period, exc.expected) from None
    return period


def stated(field: str, value: str, max_length: int) -> str:
    """What somebody says of an act, checked to be a text. Raises `InvalidSetting`."""
    try:
        return checks.text(field, value, max_length)
    except InvalidEvent as exc:
        raise InvalidSetting(field, value, exc.expected) from None


def _previous_month(now: datetime) -> str:
    """The month before `now`, as `YYYY-MM`."""
    return (now.replace(day=1) - timedelta(days=1)).strftime("%Y-%m")
