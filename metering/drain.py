"""From Redis into the ledger: an entry leaves its stream only after the ledger has committed it.

A drain that dies leaves entries that the ledger has already: they are known again by where they stand, and deleted. So
are those that two drains read at once. A lease keeps drains apart to save work; nothing depends on it.
"""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import sqlalchemy as sa

from metering.admission.redis import epochs
from metering.admission.redis.copies import to_us
from metering.admission.redis.keys import SHARDS, account_key, shard_key
from metering.admission.redis.scripts import arguments
from metering.admission.redis.stream import events_key
from metering.admission.redis.wire import NotDone, OutcomeUnknown
from metering.booking import Counts, book
from metering.clock import utc_now
from metering.errors import StoreUnavailable
from metering.ledger import outbox
from metering.ledger.schema import dead_letters, shards

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from datetime import datetime

    from metering.ledger import Ledger

__all__ = ["Drain", "Drained", "Link", "ShardLag", "Stop"]

logger = logging.getLogger("metering")

BATCH = 500
"""Entries that share a commit."""
LEASE_MS = 10_000
TIMEOUT_S = 5.0
"""How long one command may take. Nobody waits for a drain."""
HURRIED_S = 0.25
"""The same for what comes after a shard that did not answer, which most likely has the same server."""


class Link(Protocol):
    """How Redis is asked. Replies are as they came: bytes, integers, lists."""

    def call(self, shard: int, *command: Any, timeout_s: float) -> Any:
        """The reply to a command, of the server that has the shard."""

    def script(self, shard: int, name: str, keys: Sequence[str], args: Sequence[Any], timeout_s: float) -> Any:
        """What a script answers."""


class Stop(Protocol):
    """What ends a drain, such as a `threading.Event`."""

    def is_set(self) -> bool:
        """Whether it is to end."""

    def wait(self, timeout: float, /) -> object:
        """Let so many seconds pass, or fewer where it is to end."""


@dataclass(slots=True, kw_only=True)
class Drained(Counts):
    """What a run did."""

    by_shard: dict[int, Counts] = field(default_factory=dict)
    """The same, of each shard that had any entries."""
    left: list[int] = field(default_factory=list)
    """Shards that another drain was at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardLag:
    """How far the ledger is behind a shard."""

    shard: int
    entries: int
    """Events in its stream."""
    oldest_s: float | None
    """Age of the first of them; None where there is none."""
    epoch: int | None
    """None where Redis has no such shard."""
    seq: int
    """The last number the shard gave."""
    drained_epoch: int
    drained_seq: int
    """The last number the ledger has of that epoch."""
    lost: int
    """Numbers the ledger will never have."""
    dead_letters: int
    """Open ones."""


class Drain:
    """Moves the events of `shards` into the ledger, `batch` in a commit.

    `announce` sends what the ledger's outbox has for Redis, at the start of each run. `clock` is the time of recording,
    and Redis's; None: each has its own.
    """

    def __init__(
        self,
        ledger: Ledger,
        link: Link,
        *,
        clock: Callable[[], datetime] | None = None,
        announce: Callable[[], object] = outbox.no_one,
        shards: Iterable[int] = range(SHARDS),
        batch: int = BATCH,
    ) -> None:
        self._ledger = ledger
        self._link = link
        self._clock = clock
        self._announce = announce
        self._shards = list(shards)
        self._batch = batch
        self._name = secrets.token_hex(8)
        self._timeout_s = TIMEOUT_S

    def run(self, *, polite: bool = False) -> Drained:
        """Drain what stands in each shard when its turn comes; `polite` leaves out those that another drain is at.

        A shard that cannot be drained keeps none of the others from it: `StoreUnavailable` is raised after them.
        """
        total = Drained()
        failure = self._run(total, polite=polite, stop=None)
        if failure is not None:
            raise failure
        return total

    def follow(
        self, stop: Stop, *, every_s: float = 1.0, report: Callable[[Drained], object] = lambda _drained: None
    ) -> None:
        """Drain until `stop` is set, and the batch at hand is done. `report` is told what each run did.

        What is away is asked for again, and warned of once.
        """
        was_away = False
        while not stop.is_set():
            total = Drained()
            failure = self._run(total, polite=True, stop=stop)
            report(total)
            if failure is not None and not was_away:
                logger.warning("the drain goes on in %g s: %s", every_s, failure)
            was_away = failure is not None
            stop.wait(every_s)

    def lag(self) -> list[ShardLag]:
        """How far behind each shard is. Raises `StoreUnavailable`."""
        with self._ledger.read() as connection:
            drained = {row.shard: row for row in connection.execute(sa.select(shards))}
            query = sa.select(dead_letters.c.shard, sa.func.count()).where(dead_letters.c.resolved_at.is_(None))
            dead = {row[0]: row[1] for row in connection.execute(query.group_by(dead_letters.c.shard))}
        found = []
        for shard in self._shards:
            key = events_key(shard)
            oldest = self._call(shard, "XRANGE", key, "-", "+", "COUNT", 1)
            epoch, seq = self._call(shard, "HMGET", shard_key(shard, "shard"), "epoch", "seq")
            row = drained.get(shard)
            found.append(
                ShardLag(
                    shard=shard,
                    entries=self._call(shard, "XLEN", key),
                    oldest_s=self._age_s(oldest[0][0]) if oldest else None,
                    epoch=None if epoch is None else int(epoch),
                    seq=int(seq or 0),
                    drained_epoch=row.epoch if row else 0,
                    drained_seq=row.seq if row else 0,
                    lost=row.lost if row else 0,
                    dead_letters=dead.get(shard, 0),
                )
            )
        return found

    def _run(self, total: Drained, *, polite: bool, stop: Stop | None) -> StoreUnavailable | None:
        """Drain each shard; what kept the first that could not be from it."""
        failure: StoreUnavailable | None = None
        self._timeout_s = TIMEOUT_S
        try:
            self._announce()
        except StoreUnavailable as exc:
            failure = exc
        for shard in self._shards:
            if stop is not None and stop.is_set():
                break
            try:
                self._drain(shard, total, polite=polite, stop=stop)
            except StoreUnavailable as exc:
                failure = failure or exc
                self._timeout_s = HURRIED_S
        return failure

    def _drain(self, shard: int, total: Drained, *, polite: bool, stop: Stop | None) -> None:
        last = b"+"
        entries = self._entries(shard, last)
        if not entries:
            return
        if polite and not self._lease(shard):
            total.left.append(shard)
            return
        self._compare(shard)
        while entries:
            counts = self._book(shard, entries)
            total.add(counts)
            total.by_shard.setdefault(shard, Counts()).add(counts)
            if len(entries) < self._batch or (stop is not None and stop.is_set()):
                break
            if last == b"+":  # what comes in from now on is for the next turn
                newest = self._call(shard, "XREVRANGE", events_key(shard), "+", "-", "COUNT", 1)
                if not newest:
                    break
                last = newest[0][0]
            entries = self._entries(shard, last)
        if polite:
            self._release(shard)

    def _entries(self, shard: int, last: bytes) -> list[Any]:
        return self._call(shard, "XRANGE", events_key(shard), "-", last, "COUNT", self._batch)  # type: ignore[no-any-return]

    def _book(self, shard: int, entries: list[Any]) -> Counts:
        now = self._now()
        booked = self._ledger.writer.run(lambda cursor: book(cursor, shard, entries, now))
        if booked.behind is not None:
            self._fence(shard, booked.behind)
        if booked.counts.lost or booked.counts.dead:
            logger.error(
                "shard %d of Redis: %d events lost, %d dead letters", shard, booked.counts.lost, booked.counts.dead
            )
        names = sorted({account for _, account in booked.moot})
        said: dict[str, Any] = {
            "billed": booked.billed,
            "moot": [(stream_id, names.index(account) + 1) for stream_id, account in booked.moot],
        }
        keys = [shard_key(shard, "shard"), events_key(shard), *(account_key(shard, "account", name) for name in names)]
        self._script(shard, "drained", keys, said, None if self._clock is None else to_us(now))
        return booked.counts

    def _compare(self, shard: int) -> None:
        """Fence a shard that has given fewer numbers than the ledger has drained of it."""
        known = epochs.known_of(self._ledger, shard)  # first: the shard's numbers only grow
        epoch, seq, fenced = self._call(shard, "HMGET", shard_key(shard, "shard"), "epoch", "seq", "fenced")
        if known is not None and epoch is not None and fenced is None and (int(epoch), int(seq)) < known:
            self._fence(
                shard, f"it is at epoch {int(epoch)}, number {int(seq)}, and was drained to {known[0]}, {known[1]}"
            )

    def _fence(self, shard: int, reason: str) -> None:
        """Nothing is admitted there until it is rebuilt."""
        logger.error(
            "shard %d of Redis has gone back in time, and admits nothing until it is rebuilt: %s", shard, reason
        )
        self._script(shard, "fence", [shard_key(shard, "shard")], {"reason": reason})

    def _lease(self, shard: int) -> bool:
        """Whether no other drainer is at a shard. A server that is too full to note a lease is drained without one."""
        key = shard_key(shard, "drainer")
        try:
            lease = ("SET", key, self._name, "NX", "PX", LEASE_MS)
            if self._link.call(shard, *lease, timeout_s=self._timeout_s) is not None:
                return True
        except NotDone:
            return True
        except OutcomeUnknown as exc:
            raise StoreUnavailable(str(exc)) from exc
        return bool(self._call(shard, "GET", key) == self._name.encode())  # of a run that failed

    def _release(self, shard: int) -> None:
        key = shard_key(shard, "drainer")
        if self._call(shard, "GET", key) == self._name.encode():
            self._call(shard, "DEL", key)

    def _call(self, shard: int, *command: Any) -> Any:
        try:
            return self._link.call(shard, *command, timeout_s=self._timeout_s)
        except (NotDone, OutcomeUnknown) as exc:
            raise StoreUnavailable(str(exc)) from exc

    def _script(self, shard: int, name: str, keys: list[str], said: dict[str, Any], now_us: int | None = None) -> None:
        try:
            self._link.script(shard, name, keys, arguments(said, now_us=now_us), self._timeout_s)
        except (NotDone, OutcomeUnknown) as exc:
            raise StoreUnavailable(str(exc)) from exc

    def _now(self) -> datetime:
        return (self._clock or utc_now)()

    def _age_s(self, stream_id: bytes) -> float:
        milliseconds = int(stream_id.partition(b"-")[0])
        return max(0.0, self._now().timestamp() - milliseconds / 1000)
