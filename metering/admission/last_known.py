"""Who was admitted a short while ago: all that is known of keys while their store is away."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from metering.plans import Plan
    from metering.windows import Window

__all__ = ["KnownTerms", "LastKnown"]

KNOWN_FOR = timedelta(minutes=5)
MOST_REMEMBERED = 10_000


class KnownTerms(NamedTuple):
    """Whose a key is, and on which terms its calls were decided."""

    account: str
    key_id: str
    plan: Plan
    plan_version: int
    period: Window
    period_label: str


class LastKnown:
    """The terms of keys whose plans fail open, for five minutes after each call that their store has decided."""

    def __init__(self, clock: Callable[[], datetime]) -> None:
        self._clock = clock
        self._terms: dict[str, tuple[KnownTerms, datetime]] = {}

    @property
    def knows_any(self) -> bool:
        """Whether there is anything to forget."""
        return bool(self._terms)

    def note(self, digest: str, terms: KnownTerms) -> None:
        """The store has authenticated this key just now."""
        if terms.plan.fail != "open":
            self.forget(digest)
            return
        if len(self._terms) >= MOST_REMEMBERED:
            self._terms.clear()
        self._terms[digest] = terms, self._clock()

    def forget(self, digest: str) -> None:
        """The store has refused this key, or its plan fails closed now."""
        self._terms.pop(digest, None)

    def find(self, digest: str, now: datetime | None = None) -> tuple[KnownTerms, datetime] | None:
        """The terms of a key, and the time now; None where it may not be admitted unchecked."""
        found = self._terms.get(digest)
        if found is None:
            return None
        terms, noted_at = found
        now = now or self._clock()
        is_good = now - noted_at <= KNOWN_FOR and terms.period.start <= now < terms.period.end
        return (terms, now) if is_good else None
