"""What a shard's stream carries: each entry is a header, written by the script, and an event, written by the caller.

Both are arrays: the header in JSON, which a script writes fastest, and the event in msgpack. An array may grow at its
end, so that an older drainer reads what a newer app wrote.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from metering.admission.redis.keys import shard_key

__all__ = [
    "BODY",
    "HEADER",
    "Header",
    "StreamedEvent",
    "decode_event",
    "decode_header",
    "encode",
    "events_key",
    "position_of",
]

Number = Annotated[int, msgspec.Meta(ge=1, le=2**53)]

HEADER = b"h"
BODY = b"e"
"""The two fields of an entry."""


class Header(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What only the script can know."""

    kind: Literal["event", "cancel"]
    """A cancel undoes `event_id`, an event that came before it."""
    epoch: Number
    """Of the shard, from 1."""
    seq: Number
    """Counts from 1 in each epoch, without gaps."""
    occurred_us: Annotated[int, msgspec.Meta(ge=0, le=2**53)]
    """Microseconds since 1970, by the server's clock: when the call was admitted."""
    event_id: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
    billable: bool
    late: bool
    """Settled after its hold was gone."""


class StreamedEvent(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A fact as its caller knows it. Names are those of `UsageEvent`."""

    account: str
    key_id: str | None
    plan_version: int
    period: Annotated[str, msgspec.Meta(pattern="^[0-9]{4}-(0[1-9]|1[0-2])$")]
    line: str
    operation: str | None
    provider: str | None
    model: str | None
    service_tier: str | None
    run_id: str | None
    request_id: str | None
    session_id: str | None
    attributes: str | None
    """JSON text."""
    platform_paid: bool
    tokens: tuple[int, int, int, int, int, int, int, int]
    """In the order of TOKEN_FIELDS."""
    quantity: str
    """Decimal text."""
    estimated: bool
    error: str | None
    latency_ms: int | None
    idempotency_key: str | None
    fingerprint: str | None


_headers = msgspec.json.Decoder(Header)
_events = msgspec.msgpack.Decoder(StreamedEvent)
_encoder = msgspec.msgpack.Encoder()


def encode(event: StreamedEvent) -> bytes:
    """The event of an entry."""
    return _encoder.encode(event)


def decode_header(packed: bytes) -> Header:
    """Raises `msgspec.MsgspecError`."""
    return _headers.decode(packed)


def decode_event(packed: bytes) -> StreamedEvent:
    """Raises `msgspec.MsgspecError`."""
    return _events.decode(packed)


def events_key(shard: int) -> str:
    """The stream of a shard."""
    return shard_key(shard, "events")


def position_of(shard: int, epoch: int, stream_id: str) -> str:
    """Where an entry stands: nothing else ever stands there."""
    return f"{shard}/{epoch}/{stream_id}"
