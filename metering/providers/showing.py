"""What probes found, as rows for a table (pure)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta
    from decimal import Decimal

    from metering.providers.forecast import WindowState
    from metering.providers.probes import ProviderStatus

__all__ = ["duration_text", "plain_number", "problem_of", "status_rows"]


def status_rows(statuses: Sequence[ProviderStatus], states: Sequence[WindowState]) -> list[dict[str, Any]]:
    """A row for each window of each status, and one for a status without windows. What is not said is None.

    `resets_in` and `exhausted_in` count from when it was asked.
    """
    rows = []
    for status in statuses:
        problem = problem_of(status)
        windows = [each for each in states if (each.credential, each.provider) == (status.account_key, status.provider)]
        for window in windows or (None,):
            row: dict[str, Any] = {
                "credential": status.account_key,
                "provider": status.provider,
                "window": None,
                "limit": None,
                "remaining": None,
                "used": None,
                "resets_in": None,
                "exhausted_in": None,
                "problem": problem,
            }
            if window is not None:
                now = window.now
                row |= {
                    "window": window.window,
                    "limit": plain_number(now.limit),
                    "remaining": plain_number(now.remaining),
                    "used": None if now.percent_used is None else f"{now.percent_used:.1f}%",
                    "resets_in": None if now.reset_at is None else duration_text(now.reset_at - now.checked_at),
                    "exhausted_in": (
                        None if window.exhausted_at is None else duration_text(window.exhausted_at - now.checked_at)
                    ),
                }
            rows.append(row)
    return rows


def problem_of(status: ProviderStatus) -> str | None:
    """What is wrong in one line, or that no limit was said; None where all is well."""
    if status.error is not None:
        wait = "" if status.retry_after_s is None else f"; to be asked again in {status.retry_after_s:g} s"
        return f"{status.error}{wait}"
    if status.warnings:
        return f"{status.warnings[0]}" + (f" (and {len(status.warnings) - 1} more)" if status.warnings[1:] else "")
    return None if status.windows else "says no limits"


def duration_text(duration: timedelta) -> str:
    """`3d 4h`, `2h 5m`, `6m 0s`, `8s`: the two largest units; what is in the past is `0s`."""
    seconds = max(0, round(duration.total_seconds()))
    minutes, hours, days = seconds // 60, seconds // 3_600, seconds // 86_400
    if days:
        return f"{days}d {hours % 24}h"
    if hours:
        return f"{hours}h {minutes % 60}m"
    return f"{minutes}m {seconds % 60}s" if minutes else f"{seconds}s"


def plain_number(value: Decimal | None) -> int | str | None:
    """A whole number as an int, another one as a text, exact."""
    return value if value is None else int(value) if value == int(value) else f"{value:f}".rstrip("0")
