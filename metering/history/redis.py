"""What Redis has of a fact that the ledger has not: entries that are not drained yet, and holds. Only reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

import msgspec

from metering.admission.redis.copies import from_us, unscaled
from metering.admission.redis.keys import SHARDS, shard_key, shard_of
from metering.admission.redis.shards import TIMEOUT_S
from metering.admission.redis.stream import BODY, HEADER, decode_event, decode_header, events_key, position_of
from metering.admission.redis.wire import NotDone, OutcomeUnknown
from metering.errors import StoreUnavailable
from metering.history.ledger import Held

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from datetime import datetime

    from metering.admission.redis.link import Link

__all__ = ["OnRedis", "holds_of", "in_streams"]

PAGE = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class OnRedis:
    """An entry that the drain has not brought yet."""

    position: str
    """SHARD/EPOCH/STREAM ID."""
    kind: str
    """`event`, or `cancel`, which undoes the one before it."""
    event_id: UUID
    account: str
    line: str
    idempotency_key: str | None
    key_id: str | None
    admitted_at: datetime
    billable: bool


def in_streams(link: Link, key: str, event_id: UUID | None, *, account: str | None, line: str | None) -> list[OnRedis]:
    """Entries with an idempotency key or an event's id, of one account's shard or of all. Raises `StoreUnavailable`.

    What cannot be read is left out: the drain will make a dead letter of it.
    """
    found = []
    for shard in range(SHARDS) if account is None else (shard_of(account),):
        for stream_id, fields in _entries(link, shard):
            entry = _read(shard, stream_id, fields)
            if (
                entry is not None
                and (entry.idempotency_key == key or entry.event_id == event_id)
                and account in (None, entry.account)
                and line in (None, entry.line)
            ):
                found.append(entry)
    return found


def holds_of(link: Link, account: str, event_ids: Iterable[UUID]) -> tuple[Held, ...]:
    """The newest hold of each call, for the seven days that Redis keeps it. Raises `StoreUnavailable`."""
    shard = shard_of(account)
    found = []
    for event_id in event_ids:
        kept = _call(link, shard, "GET", shard_key(shard, f"id:{event_id.hex}"))
        hold_id = None if kept is None else kept.decode().split(" ")[3]
        packed = _call(link, shard, "GET", shard_key(shard, f"hold:{hold_id}")) if hold_id else None
        if packed is not None:
            found.append(_held(UUID(hold_id), event_id, msgspec.msgpack.decode(packed)))
    return tuple(found)


def _held(hold_id: UUID, event_id: UUID, hold: dict[str, Any]) -> Held:
    reserved = {metric: str(unscaled(metric, amount)) for metric, amount in (hold.get("reserved") or {}).items()}
    settled_as = hold.get("settled_as")
    return Held(
        hold_id=hold_id,
        event_id=event_id,
        where="redis",
        state=hold["state"],
        key_id=hold.get("key"),
        admitted_at=from_us(int(hold["admitted"])) if "admitted" in hold else None,
        expires_at=from_us(int(hold["expires"])) if "expires" in hold else None,
        reserved=reserved,
        settled_event_id=None if settled_as is None else UUID(settled_as),
    )


def _entries(link: Link, shard: int) -> Iterator[Any]:
    start = "-"
    while True:
        page = _call(link, shard, "XRANGE", events_key(shard), start, "+", "COUNT", PAGE)
        yield from (entry for entry in page if entry is not None and entry[1])
        if len(page) < PAGE:
            return
        start = f"({page[-1][0].decode()}"


def _read(shard: int, stream_id: bytes, fields: list[bytes]) -> OnRedis | None:
    pairs = dict(zip(fields[::2], fields[1::2], strict=False))
    try:
        header, event = decode_header(pairs[HEADER]), decode_event(pairs[BODY])
    except (KeyError, msgspec.MsgspecError):
        return None
    return OnRedis(
        position=position_of(shard, header.epoch, stream_id.decode()),
        kind=header.kind,
        event_id=UUID(header.event_id),
        account=event.account,
        line=event.line,
        idempotency_key=event.idempotency_key,
        key_id=event.key_id,
        admitted_at=from_us(header.occurred_us),
        billable=header.billable,
    )


def _call(link: Link, shard: int, *command: Any) -> Any:
    try:
        return link.call(shard, *command, timeout_s=TIMEOUT_S)
    except (NotDone, OutcomeUnknown) as exc:
        raise StoreUnavailable(str(exc)) from exc
