"""Who says whether a probe may make a call that costs, and is told what it cost."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from datetime import date, datetime

__all__ = ["MAX_KEPT", "PaidByProcess", "PaidProbe", "PaidProbes"]

MAX_KEPT = 1_024


@dataclass(frozen=True, slots=True, kw_only=True)
class PaidProbe:
    """Leave to make one call that costs. No other one has the same credential, provider, base URL, day and number."""

    credential: str
    """Its id."""
    provider: str
    base_url: str
    """Where the provider is asked; without a slash, or /v1, at its end."""
    at: datetime
    """When leave was given; aware, in UTC, which makes its day."""
    number: int
    """Which one of its day it is, from 1."""
    model: str

    @property
    def day(self) -> date:
        """The UTC day it counts for."""
        return self.at.date()


class PaidProbes(Protocol):
    """Counts the calls that cost. Both may block and raise: they are called on threads, several at a time."""

    def take(
        self, *, credential: str, provider: str, base_url: str, at: datetime, model: str, most: int
    ) -> PaidProbe | None:
        """Leave for one more call; None where its UTC day has `most` of them, which is 1 or more.

        Counted before the call is made, and for good: whoever ends before `spent` has used it all the same.
        """

    def spent(
        self,
        paid: PaidProbe,
        *,
        input_tokens: int | None,
        output_tokens: int | None,
        latency_ms: int | None,
    ) -> None:
        """What the call took. Tokens are None where it did not say, and all of them where it was not answered."""


class PaidByProcess:
    """`PaidProbes` of this process alone, forgotten at its end. What was spent is in the statuses."""

    def __init__(self, *, max_kept: int = MAX_KEPT) -> None:
        self._max_kept = max_kept
        self._day: date | None = None
        self._counts: dict[tuple[str, str, str], int] = {}
        self.after_fork()

    def after_fork(self) -> None:
        """Forget who holds the lock."""
        self._lock = threading.Lock()

    def take(
        self, *, credential: str, provider: str, base_url: str, at: datetime, model: str, most: int
    ) -> PaidProbe | None:
        """As `PaidProbes` has it. Not for more credentials a day than are kept."""
        key = (credential, provider, base_url)
        with self._lock:
            if self._day is None or at.date() > self._day:
                self._day, self._counts = at.date(), {}
            number = self._counts.get(key, 0) + 1
            if number > most or (key not in self._counts and len(self._counts) >= self._max_kept):
                return None
            self._counts[key] = number
        return PaidProbe(credential=credential, provider=provider, base_url=base_url, at=at, number=number, model=model)

    def spent(
        self,
        paid: PaidProbe,
        *,
        input_tokens: int | None,
        output_tokens: int | None,
        latency_ms: int | None,
    ) -> None:
        """Nothing more to do."""
