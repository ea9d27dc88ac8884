"""When a question that costs nothing is asked again (pure)."""

from __future__ import annotations

from http import HTTPStatus

__all__ = ["ATTEMPTS", "PASSING", "pause_s"]

ATTEMPTS = 3
PASSING = frozenset({HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT})
"""Statuses that a moment later may be others. A 429 is none of them: it is what was asked for."""
FIRST_PAUSE_S = 0.25
"""At most, and doubled each time."""


def pause_s(attempt: int, *, left_s: float, drawn: float, retry_after_s: float | None = None) -> float | None:
    """How long to wait after an attempt, the first being 1; None where there is to be no other one.

    What `Retry-After` says is waited for in full, and where it does not fit into `left_s` there is no other attempt.
    `drawn`, 0 to 1, is drawn for each pause, so that those who failed together do not come back together
    (https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/, "full jitter").
    """
    pause = (retry_after_s or 0) + drawn * FIRST_PAUSE_S * 2 ** (attempt - 1)
    return pause if attempt < ATTEMPTS and pause < left_s else None
