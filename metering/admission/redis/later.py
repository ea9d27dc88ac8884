"""What goes by the spool although Redis is there: the bodies of the request log, and cancels of calls in doubt."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import msgspec

from metering.admission.directory import Directory
from metering.admission.redis.drive import drive
from metering.admission.redis.keys import shard_of
from metering.admission.rows import log_row
from metering.admission.statements import statements
from metering.errors import InvalidSetting, StoreUnavailable
from metering.ledger.types import instant_text, parse_instant

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import datetime
    from uuid import UUID

    from metering.admission.protocol import Bodies
    from metering.admission.redis.link import Link
    from metering.admission.redis.verbs import Verbs
    from metering.courier import Courier
    from metering.events import Call
    from metering.ledger import Ledger
    from metering.ledger.transactions import Cursor
    from metering.spool import Line

__all__ = ["Later"]

logger = logging.getLogger("metering")

_SQL = statements()


class Later:
    """Hands lines to a courier, and tells the ledger and Redis when it brings them."""

    def __init__(
        self, ledger: Ledger, link: Link, verbs: Verbs, courier: Courier, clock: Callable[[], datetime]
    ) -> None:
        self._ledger = ledger
        self._link = link
        self._verbs = verbs
        self._courier = courier
        self._clock = clock
        courier.carries("log", self._deliver_logs)
        courier.carries("cancel", self._deliver_cancels)

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
            self._courier.keep("log", named, msgspec.msgpack.encode(row), durable=False)
        except StoreUnavailable:
            logger.exception("the request log of call %s is dropped", named)

    def cancel(self, undo: Mapping[str, Any]) -> None:
        """Undo a call, as `Undecided.undo` says it. Raises `StoreUnavailable`."""
        drive(self._verbs.cancel(undo), self._link)

    def _deliver_logs(self, lines: list[Line]) -> list[Line]:
        rows = [msgspec.msgpack.decode(line.payload) for line in lines]
        try:
            self._ledger.writer.run(lambda cursor: _log(cursor, rows))
        except StoreUnavailable:
            return lines
        return []

    def _deliver_cancels(self, lines: list[Line]) -> list[Line]:
        left: list[Line] = []
        away: set[int] = set()
        for line in lines:
            shard = -1
            try:
                undo = msgspec.msgpack.decode(line.payload)
                shard = shard_of(undo["account"])
                if shard not in away:
                    self.cancel(undo)
                    continue
            except (InvalidSetting, StoreUnavailable):
                away.add(shard)
            except Exception:
                logger.exception("call %s could not be undone; it stays in the spool", line.event_id)
            left.append(line)
        return left


def _log(cursor: Cursor, rows: list[dict[str, Any]]) -> None:
    """Here, and not where they were kept, is known when they go: an account's plans are in the ledger."""
    directory = Directory()
    for row in rows:
        expires_at = directory.log_expiry(cursor, row["account"], parse_instant(row["logged_at"]))
        cursor.execute(_SQL["insert_log_once"], row | {"expires_at": instant_text(expires_at)})
