"""What Redis or the ledger is told later: kept in the spool of this machine, and carried there as soon as it can be.

Settles and cancels that Redis could not be told, and the bodies of the request log, which never travel through Redis.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from typing import TYPE_CHECKING, Any
from uuid import UUID

import msgspec

from metering.admission.redis.drive import drive
from metering.admission.redis.keys import shard_of
from metering.admission.redis.verbs import Verbs
from metering.admission.rows import log_row
from metering.admission.statements import statements
from metering.clock import utc_now
from metering.errors import InvalidSetting, SettleConflict, StoreUnavailable
from metering.spool import Spool

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import datetime
    from pathlib import Path

    from metering.admission.protocol import Bodies
    from metering.admission.redis.link import Link
    from metering.events import Call
    from metering.ledger import Ledger
    from metering.ledger.transactions import Cursor
    from metering.spool import Line, Shipped

__all__ = ["Courier"]

logger = logging.getLogger("metering")

_SQL = statements()
EVERY_S = 1.0
MOST_CLOSE_S = 30.0

_couriers: weakref.WeakSet[Courier] = weakref.WeakSet()


class Courier:
    """Keeps facts, and ships them from one thread that lives as long as there are any."""

    def __init__(
        self,
        ledger: Ledger,
        link: Link,
        spool: Path,
        *,
        timeout_s: float,
        clock: Callable[[], datetime] | None = None,
    ) -> None:
        self._ledger = ledger
        self._link = link
        self._clock = clock or utc_now
        self._spool = Spool(spool)
        self._verbs = Verbs(ledger, link, timeout_s=timeout_s, clock=clock)
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_empty = True
        self._closing = False
        _couriers.add(self)

    def keep_settle(self, order: Mapping[str, Any]) -> None:
        """Keep a settle, as `Verbs.order_of` says it. It survives a power cut."""
        self._keep("settle", UUID(order["said"]["hold"]), msgspec.msgpack.encode(order), durable=True)

    def keep_cancel(self, undo: Mapping[str, Any]) -> None:
        """Keep that a call is to be undone, as `Undecided.undo` says it."""
        self._keep("cancel", UUID(undo["said"]["event_id"]), msgspec.msgpack.encode(undo), durable=True)

    def keep_log(
        self,
        account: str,
        key_id: str,
        call: Call,
        bodies: Bodies,
        *,
        event_id: UUID | None,
        hold_id: UUID | None = None,
    ) -> None:
        """Keep a row of the request log, where there is something to log. Lost in a power cut, not in a kill.

        Never raises for a spool that cannot be written: the call is decided already, and needs no log to be billed.
        """
        if bodies.request is None and bodies.response is None and call.error is None:
            return
        known = {"event_id": None if event_id is None else event_id.hex, "account": account, "key_id": key_id}
        row = log_row(known, call, bodies, self._clock(), hold_id)
        named = event_id or hold_id
        assert named is not None
        try:
            self._keep("log", named, msgspec.msgpack.encode(row), durable=False)
        except StoreUnavailable:
            logger.exception("the request log of call %s is dropped", named)

    def ship(self) -> Shipped:
        """Carry what waits, also of processes that are gone. Raises `StoreUnavailable` where the ledger is away."""
        return self._spool.ship(self._deliver)

    def close(self) -> None:
        """Stop, after a last attempt to ship; what is left is for the next process, or for the drain."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(MOST_CLOSE_S)
            self._ship_quietly()
        self._spool.close()

    def _keep(self, kind: str, named: UUID, payload: bytes, *, durable: bool) -> None:
        self._spool.append(kind, named, payload, durable=durable)
        with self._wake:
            self._is_empty = False
            if self._thread is None and not self._closing:
                self._thread = threading.Thread(target=self._run, name="metering-spool", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            with self._wake:
                if self._is_empty or self._closing:
                    self._thread = None
                    return
                self._wake.wait(EVERY_S)
                self._is_empty = True
            if not self._ship_quietly():
                self._is_empty = False

    def _ship_quietly(self) -> bool:
        """Whether all that waited was carried."""
        try:
            return not self.ship().kept
        except StoreUnavailable as exc:
            logger.warning("what waits in the spool cannot be carried now: %s", exc)
        except Exception:
            logger.exception("what waits in the spool cannot be carried")
        return False

    def _deliver(self, lines: list[Line]) -> list[Line]:
        """Carry lines; those that Redis cannot be told now stay."""
        rows = [msgspec.msgpack.decode(line.payload) for line in lines if line.kind == "log"]
        if rows:
            self._ledger.writer.run(lambda cursor: _log(cursor, rows))
        left: list[Line] = []
        away: set[int] = set()
        for line in lines:
            if line.kind not in ("settle", "cancel"):
                if line.kind != "log":
                    left.append(line)  # of a newer version; it is not ours to drop
                continue
            order = msgspec.msgpack.decode(line.payload)
            shard = shard_of(order["account"])
            if shard in away:
                left.append(line)
                continue
            try:
                drive(self._verbs.carry_out(order) if line.kind == "settle" else self._verbs.cancel(order), self._link)
            except (InvalidSetting, StoreUnavailable):
                away.add(shard)
                left.append(line)
            except SettleConflict:
                logger.exception("a settle of hold %s came too late", line.event_id)
        return left

    def _start_anew(self) -> None:
        self._wake = threading.Condition()
        self._thread = None
        self._is_empty = True


def _log(cursor: Cursor, rows: list[dict[str, Any]]) -> None:
    cursor.executemany(_SQL["insert_log_once"], rows)


def _start_anew_after_fork() -> None:
    for courier in _couriers:
        courier._start_anew()


os.register_at_fork(after_in_child=_start_anew_after_fork)
