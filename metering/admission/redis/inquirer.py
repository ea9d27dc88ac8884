"""Asking a shard: the very same is sent again while there is time, to a server that has not lost what it had."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from metering.admission.redis import epochs
from metering.admission.redis.copies import from_us, to_us
from metering.admission.redis.keys import shard_key
from metering.admission.redis.scripts import arguments
from metering.admission.redis.steps import Ask, Call, Pause, Read
from metering.admission.redis.wire import Greeted, NotDone, OutcomeUnknown
from metering.clock import utc_now
from metering.errors import StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime

    from metering.admission.redis.steps import Steps
    from metering.ledger import Ledger

__all__ = ["PAUSE_S", "Doubt", "Inquirer", "Wire"]

PAUSE_S = 0.01
SHORTEST_ASK_S = 0.02


class Wire(Protocol):
    """What the verbs look at of a link."""

    era: int
    """Goes up whenever a server turns out to be another one than before."""
    ahead_us: int | None
    """How far the server's clock is ahead of `time.monotonic`, at least."""

    def heard(self, server_us: int) -> None:
        """Take in what the server's clock showed a moment ago."""


@dataclass(slots=True)
class _Floor:
    """What a shard is known to have reached: its epoch, the events of it in the ledger, and how far it had come."""

    era: int
    reached: tuple[int, int, int] = (0, 0, 0)

    def raise_to(self, epoch: int, come: int) -> None:
        """Take in what the shard answered. In one step, because threads share it."""
        known, seq, before = self.reached
        if epoch > known:
            self.reached = (epoch, 0, come)
        elif epoch == known and come > before:
            self.reached = (epoch, seq, come)


@dataclass(slots=True)
class Doubt:
    """Whether something was sent at least once without an answer: it may have been done, whatever came later."""

    unanswered: bool = False


class Inquirer:
    """Asks scripts until there is an answer or no time, and knows how far each shard had come."""

    def __init__(
        self, ledger: Ledger, wire: Wire, *, timeout_s: float, clock: Callable[[], datetime] | None = None
    ) -> None:
        self._ledger = ledger
        self._wire = wire
        self._timeout_s = timeout_s
        self._clock = clock
        self._floors: dict[int, _Floor] = {}

    def _told_now(self) -> datetime | None:
        return None if self._clock is None else self._clock()

    def _server_now(self) -> datetime:
        return from_us(time.monotonic_ns() // 1000 + (self._wire.ahead_us or 0)) if self._wire.ahead_us else utc_now()

    def _ask_twice_over(
        self,
        shard: int,
        script: str,
        keys: Sequence[str],
        said: Any,
        *blobs: bytes,
        now: datetime | None = None,
        deadline: float = 0,
        opened: bool = True,
    ) -> Steps[list[Any]]:
        """As `_ask`, for scripts that may be run twice: that the outcome is unknown is no more than unavailable."""
        try:
            return (yield from self._ask(shard, script, keys, said, *blobs, now=now, deadline=deadline, opened=opened))
        except OutcomeUnknown as exc:
            raise StoreUnavailable(str(exc)) from exc

    def _ask(
        self,
        shard: int,
        script: str,
        keys: Sequence[str],
        said: Any,
        *blobs: bytes,
        now: datetime | None = None,
        deadline: float = 0,
        opened: bool = True,
        doubt: Doubt | None = None,
    ) -> Steps[list[Any]]:
        """Run a script, sending the very same again while there is time and no answer.

        Raises `StoreUnavailable` where nothing was done, `OutcomeUnknown` where that cannot be told. A script that asks
        nothing of the shard itself need not have it `opened`.
        """
        now = now or self._told_now()
        now_us = None if now is None else to_us(now)
        deadline = deadline or time.monotonic() + self._timeout_s
        trouble: Exception | None = None
        sent = doubt or Doubt()
        while (left_s := deadline - time.monotonic()) > 0:
            try:
                floor = (yield from self._floor(shard)) if opened else _Floor(self._wire.era)
                ahead_us = self._wire.ahead_us
                deadline_us = None if ahead_us is None else int(deadline * 1e6) + ahead_us
                reply: list[Any] = yield Ask(
                    shard,
                    script,
                    keys,
                    arguments(said, *blobs, now_us=now_us, deadline_us=deadline_us, floor=floor.reached),
                    min(left_s, max(left_s / 2, SHORTEST_ASK_S)),
                    floor.era,
                )
            except Greeted as exc:
                if doubt is not None:
                    raise  # the account is to be read again
                trouble = trouble or exc
                continue
            except NotDone as exc:
                trouble = exc
                yield Pause(min(PAUSE_S, left_s))
                continue
            except OutcomeUnknown as exc:
                trouble, sent.unanswered = exc, True
                continue
            status, decided_us, epoch, come, *rest = reply
            if status == b"late":
                self._wire.heard(decided_us)
                trouble = NotDone(f"shard {shard} was asked after its deadline")
                continue
            if status in (b"lost", b"fenced"):
                how = rest[0].decode() if rest else f"it is gone, and was in epoch {floor.reached[0]}"
                raise StoreUnavailable(
                    f"shard {shard} of Redis has lost data ({how}): it admits nothing until `tallystick quota rebuild`"
                )
            if opened:
                self._floors[shard].raise_to(epoch, come)
            return reply
        if sent.unanswered:
            raise OutcomeUnknown(str(trouble))
        raise self._unavailable(trouble)

    def _call(self, shard: int, *command: Any) -> Steps[Any]:
        """Run a command that changes nothing."""
        deadline = time.monotonic() + self._timeout_s
        trouble: Exception | None = None
        while (left_s := deadline - time.monotonic()) > 0:
            try:
                return (yield Call(shard, command, left_s))
            except (NotDone, OutcomeUnknown) as exc:
                trouble = exc
                yield Pause(min(PAUSE_S, left_s))
        raise self._unavailable(trouble)

    def _unavailable(self, trouble: Exception | None) -> StoreUnavailable:
        if trouble is None:
            return StoreUnavailable(f"no time was left to ask Redis: reading the ledger took {self._timeout_s:g} s")
        return StoreUnavailable(f"Redis did not answer within {self._timeout_s:g} s: {trouble}")

    def _floor(self, shard: int) -> Steps[_Floor]:
        floor = self._floors.get(shard)
        if floor is None or floor.era != self._wire.era:
            era = self._wire.era
            known = yield Read(partial(epochs.known_of, self._ledger, shard))
            if known is None:
                known = yield from self._open(shard)
            before, floor = floor, _Floor(era, (*known, known[1]))
            if before is not None:
                floor.raise_to(before.reached[0], before.reached[2])
            self._floors[shard] = floor
        return floor

    def _open(self, shard: int) -> Steps[tuple[int, int]]:
        """Open a shard that the ledger does not know."""
        yield Read(partial(epochs.announced, self._ledger, shard))
        reply = yield Ask(shard, "open", [shard_key(shard, "shard")], arguments({"epoch": 1}), self._timeout_s)
        _, _, epoch, seq = reply
        yield Read(partial(epochs.begin, self._ledger, shard, epoch))
        # Another process may have opened it first, and Redis have lost it again since.
        known: tuple[int, int] = yield Read(partial(epochs.known_of, self._ledger, shard))
        return max(known, (epoch, seq))
