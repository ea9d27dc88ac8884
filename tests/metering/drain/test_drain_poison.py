"""What cannot be read is kept and blocks nothing; what is missing is counted, and what cannot be is fenced."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any
from uuid import UUID

import msgspec
import pytest

from metering.admission.redis.stream import Header, decode_event, encode
from tests.metering.drain.place import (
    PLAIN,
    SHARD,
    Cut,
    PlainLink,
    Stream,
    counts,
    cut,
    ids,
    quantity,
    rows,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from metering.drain import Drain
    from metering.ledger import Ledger
    from metering.meter import Meter


def damaged_header(stream: Stream) -> tuple[bytes, bytes]:
    stream.number()
    return b"\xc1 no msgpack", encode(PLAIN)


def damaged_event(stream: Stream) -> tuple[bytes, bytes]:
    return header_of(stream), b"\x93\x01"


def header_of(stream: Stream, **changes: Any) -> bytes:
    header = Header("event", 1, stream.number(), 0, "b" * 32, billable=True, late=False)
    return msgspec.json.encode(msgspec.structs.replace(header, **changes))


def saying(**changes: Any) -> Callable[[Stream], tuple[bytes, bytes]]:
    return lambda stream: (header_of(stream), encode(msgspec.structs.replace(PLAIN, **changes)))


def headed(**changes: Any) -> Callable[[Stream], tuple[bytes, bytes]]:
    return lambda stream: (header_of(stream, **changes), encode(PLAIN))


POISON: dict[str, tuple[Callable[[Stream], tuple[bytes, bytes]], str]] = {
    "header": (damaged_header, "DecodeError"),
    "event": (damaged_event, "ValidationError: Expected `array` of at least length 21, got 3"),
    "cut event": (lambda stream: (header_of(stream), encode(PLAIN)[:-1]), "DecodeError: Input data was truncated"),
    "kind": (headed(kind="refund"), "ValidationError: Invalid enum value 'refund'"),
    "epoch": (headed(epoch=2**60), "ValidationError"),
    "event_id": (headed(event_id="x"), "ValidationError"),
    "time": (headed(occurred_us=-1), "ValidationError"),
    "account": (saying(account="nobody"), "UnknownAccount: account 'nobody' is not known"),
    "plan version": (saying(plan_version=99), "InvalidEvent: plan_version: got 99, expected a version of a plan"),
    "huge plan version": (saying(plan_version=2**63), "OverflowError"),
    "period": (saying(period="2026-13"), "ValidationError"),
    "tokens": (saying(tokens=(1, 2, 0, 0, 0, 0, 0, 0)), "InvalidUsage: cache_read_tokens: got 2"),
    "too many tokens": (saying(tokens=(2**60, 0, 0, 0, 0, 0, 0, 0)), "InvalidUsage: input_tokens"),
    "quantity": (saying(quantity="much"), "InvalidOperation"),
    "negative": (saying(quantity="-1"), "InvalidEvent: quantity"),
    "line": (saying(line=""), "InvalidEvent: line: got '', expected 1 to 64 characters"),
    "attributes": (saying(attributes="{"), "DecodeError"),
    "refused by the database": (saying(line="forbidden"), "IntegrityError: not this line"),
}


def forbid_a_line(ledger: Ledger) -> None:
    with ledger.write() as connection:
        connection.exec_driver_sql(
            "CREATE TRIGGER forbid BEFORE INSERT ON events WHEN new.line = 'forbidden' "
            "BEGIN SELECT RAISE(ABORT, 'not this line'); END"
            if ledger.dialect == "sqlite"
            else "ALTER TABLE events ADD CONSTRAINT forbid CHECK (line <> 'forbidden')"
        )


@pytest.mark.parametrize("name", POISON)
def test_poison_goes_to_dead_letters_with_its_bytes_and_blocks_nothing(
    ledger: Ledger, new_drain: Callable[..., Drain], stream: Stream, name: str
) -> None:
    forbid_a_line(ledger)
    make, error = POISON[name]
    before = stream.add()
    header, body = make(stream)
    stream.put(header, body)
    after = stream.add()
    unlucky = new_drain(Cut)
    with cut(unlucky):
        unlucky.run()
    assert counts(new_drain().run()) == {"redelivered": 3}
    assert ids(ledger) == [before, after]
    [letter] = rows(ledger, "dead_letters")
    assert letter["error"].startswith(error)
    assert (letter["header"], letter["body"], letter["shard"]) == (header, body, SHARD)
    assert (letter["noticed_at"], letter["resolved_at"]) == ("2026-03-12T12:00:00.000000Z", None)
    if name in ("account", "refused by the database"):
        event = decode_event(body)
        assert (letter["account"], letter["period"]) == (event.account, "2026-03")
    assert [UUID(row["event_id"]) for row in rows(ledger, "event_ids", "position")] == [before, after]
    assert stream.entries() == []
    assert stream.generation() == 0, "its quota stays used"
    assert stream.fenced() is None
    has_number = name not in ("header", "kind", "epoch", "event_id", "time")
    assert [row["lost"] for row in rows(ledger, "shards")] == [0 if has_number else 1]


def test_an_entry_with_other_fields_is_kept_whole(ledger: Ledger, drain: Drain, stream: Stream) -> None:
    stream.client.xadd(stream.key, {b"h": header_of(stream), b"other": b"\x00\xff"})
    stream.client.xadd(stream.key, {b"other": b"1"})
    assert counts(drain.run()) == {"dead": 2}
    first, second = rows(ledger, "dead_letters")
    assert msgspec.msgpack.decode(first["body"]) == [b"h", first["header"], b"other", b"\x00\xff"]
    assert (second["header"], msgspec.msgpack.decode(second["body"])) == (b"", [b"other", b"1"])
    assert [row["error"] for row in (first, second)] == ["KeyError: b'e'", "KeyError: b'h'"]


def test_a_cancel_resolves_the_dead_letter_of_its_call(ledger: Ledger, drain: Drain, stream: Stream) -> None:
    undone = stream.add(quantity="much")
    other = stream.add(quantity="much")
    assert counts(drain.run()) == {"dead": 2}
    stream.cancel(undone)
    assert counts(drain.run()) == {"cancelled": 1}
    resolved = {row["header"].count(undone.hex.encode()): row["resolved_at"] for row in rows(ledger, "dead_letters")}
    assert resolved == {1: "2026-03-12T12:00:00.000000Z", 0: None}
    assert other not in ids(ledger)


def test_entries_without_content_are_acknowledged_and_counted(
    ledger: Ledger, new_drain: Callable[..., Drain], stream: Stream
) -> None:
    class Trimmed(PlainLink):
        """Answers nil, as Redis 6.2 does for entries that are gone."""

        def call(self, shard: int, *command: Any, timeout_s: float) -> Any:
            reply = super().call(shard, *command, timeout_s=timeout_s)
            return [*reply, [b"5-0", None], [b"5-1", []], None] if command[0] == "XRANGE" and reply else reply

    event_id = stream.add()
    assert counts(new_drain(Trimmed, batch=10).run()) == {"inserted": 1, "empty": 3}
    assert ids(ledger) == [event_id]
    assert stream.entries() == []


def test_numbers_that_no_entry_has_are_counted_as_lost(
    ledger: Ledger, new_drain: Callable[..., Drain], stream: Stream, caplog: pytest.LogCaptureFixture
) -> None:
    def shard() -> tuple[int, int, int]:
        [row] = rows(ledger, "shards")
        return row["epoch"], row["seq"], row["lost"]

    stream.add()
    stream.number()
    stream.number()
    stream.add()
    unlucky = new_drain(Cut)
    with caplog.at_level(logging.ERROR, "metering"), cut(unlucky):
        unlucky.run()
    assert caplog.messages == [f"shard {SHARD} of Redis: 2 events lost, 0 dead letters"]
    assert shard() == (1, 4, 2)
    drained = new_drain().run()
    assert counts(drained) == {"redelivered": 2}
    assert shard() == (1, 4, 2)

    stream.number()
    stream.add()
    stream.begin(2)
    stream.add()
    stream.begin(5)
    for _ in range(3):
        stream.number()
    stream.add()
    drained = new_drain(batch=2).run()
    assert counts(drained) == {"inserted": 3, "lost": 4}
    assert counts(drained.by_shard[SHARD]) == {"inserted": 3, "lost": 4}
    assert shard() == (5, 4, 6)
    stream.add()
    new_drain().run()
    assert (shard(), stream.fenced()) == ((5, 5, 6), None)


def test_a_number_given_twice_fences_the_shard_and_is_billed(
    meter: Meter, ledger: Ledger, drain: Drain, stream: Stream
) -> None:
    for _ in range(3):
        stream.add()
    assert counts(drain.run()) == {"inserted": 3}
    stream.client.hset(stream.state, "seq", 2)
    stream.add()
    stream.client.hset(stream.state, "seq", 9)
    stream_id = stream.entries()[0][0].decode()
    assert counts(drain.run()) == {"inserted": 1}
    assert stream.fenced() == f"entry {SHARD}/1/{stream_id} is number 3, but 3 were drained before"
    assert quantity(meter) == 4


def test_a_server_with_less_than_was_drained_is_fenced(
    meter: Meter, ledger: Ledger, new_drain: Callable[..., Drain], stream: Stream, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        stream.add()
    left = stream.entries()[2]
    new_drain().run()
    stream.client.delete(stream.key)
    stream.client.hset(stream.state, "seq", 2)
    stream.put(left[1][b"h"], left[1][b"e"], left[0])
    with caplog.at_level(logging.ERROR, "metering"):
        for _ in range(2):
            assert counts(new_drain().run()) in ({"redelivered": 1}, {})
    assert stream.fenced() == "it is at epoch 1, number 2, and was drained to 1, 3"
    assert len(caplog.records) == 1
    assert quantity(meter) == 3
