"""What several who want to know one thing share: a question under way, and an answer for a while. In one process."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from concurrent.futures import Future
from datetime import timedelta
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Hashable
    from datetime import datetime

__all__ = ["MAX_KEPT", "Shared"]

MAX_KEPT = 1_024

_T = TypeVar("_T")


class Shared(Generic[_T]):
    """Answers by key, kept for a time, the oldest one dropped for a new one. Safe on threads and event loops."""

    def __init__(self, *, ttl_s: Callable[[_T], float], max_kept: int = MAX_KEPT) -> None:
        self._ttl_s = ttl_s
        self._max_kept = max_kept
        self.after_fork()
        self._kept: OrderedDict[Hashable, tuple[datetime, _T]] = OrderedDict()

    def after_fork(self) -> None:
        """Forget who asks, and who holds the lock: in a child they are not there."""
        self._lock = threading.Lock()
        self._flights: dict[Hashable, Future[tuple[datetime, _T] | None]] = {}

    async def get(
        self,
        key: Hashable,
        ask: Callable[[], Awaitable[tuple[_T, float]]],
        clock: Callable[[], datetime],
        *,
        force: bool = False,
    ) -> _T:
        """The answer that is kept; else the one somebody is asking for; else `ask`'s, which has an age in seconds.

        `force` takes none that was found before this call. Whoever asks may be cancelled, or meet an exception: then
        the next one who waits asks.
        """
        began = clock()
        while True:
            with self._lock:
                kept = None if force else self._kept.get(key)
                if kept is not None and 0 <= (clock() - kept[0]).total_seconds() < self._ttl_s(kept[1]):
                    return kept[1]
                under_way = self._flights.get(key)
                if under_way is None:
                    flight = self._flights[key] = Future()
                    flight.set_running_or_notify_cancel()  # so that who waits can be cancelled, and it cannot
                    break
            awaited = await asyncio.wrap_future(under_way)
            if awaited is not None and not (force and awaited[0] < began):
                return awaited[1]
        found: tuple[datetime, _T] | None = None
        try:
            answer, age_s = await ask()
            found = clock() - timedelta(seconds=age_s), answer
            return answer
        finally:
            with self._lock:
                self._flights.pop(key, None)
                if found is not None:
                    self._kept[key] = found
                    self._kept.move_to_end(key)
                    if len(self._kept) > self._max_kept:
                        self._kept.popitem(last=False)
            flight.set_result(found)
