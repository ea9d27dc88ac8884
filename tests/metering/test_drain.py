"""The drain: every event of a stream once in the ledger, whatever is delivered twice, unreadable, undone or killed."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import UUID

import msgspec
import pytest
import redis as redis_py
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metering.admission.redis.keys import account_key, shard_key, shard_of
from metering.admission.redis.scripts import script
from metering.admission.redis.stream import Header, StreamedEvent, decode_event, encode, events_key
from metering.admission.redis.wire import NotDone, OutcomeUnknown
from metering.admission.verify import check_counters
from metering.booking import UNDONE, Counts, foreseen
from metering.drain import Drain, Drained
from metering.errors import CorrectionConflict, StoreUnavailable, UnknownEvent
from metering.events import derive_event_id, new_event_id
from metering.ledger import Ledger, outbox
from tests.servers import RedisServer, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from metering.meter import Meter

ACCOUNT = "acme"
SHARD = shard_of(ACCOUNT)
AT = datetime(2026, 3, 12, 11, 59, 30, 123456, tzinfo=UTC)
PLAIN = StreamedEvent(
    account=ACCOUNT,
    key_id=None,
    plan_version=1,
    period="2026-03",
    line="a",
    operation=None,
    provider=None,
    model=None,
    service_tier=None,
    run_id=None,
    request_id=None,
    session_id=None,
    attributes=None,
    platform_paid=True,
    tokens=(0, 0, 0, 0, 0, 0, 0, 0),
    quantity="1",
    estimated=False,
    error=None,
    latency_ms=None,
    idempotency_key=None,
    fingerprint=None,
)


class PlainLink:
    """The least a drain needs of a link, on a client that resends nothing."""

    def __init__(self, client: redis_py.Redis) -> None:
        self.client = client

    def call(self, shard: int, *command: Any, timeout_s: float) -> Any:
        connection = self.client.connection_pool.get_connection()
        try:
            connection.send_command(*command)
            return connection.read_response(disable_decoding=True)
        except redis_py.OutOfMemoryError as exc:
            raise NotDone(str(exc)) from exc
        except redis_py.ConnectionError as exc:
            raise OutcomeUnknown(str(exc)) from exc
        finally:
            self.client.connection_pool.release(connection)

    def script(self, shard: int, name: str, keys: Sequence[str], args: Sequence[Any], timeout_s: float) -> Any:
        return self.call(shard, "EVAL", script(name).text, len(keys), *keys, *args, timeout_s=timeout_s)


class Cut(PlainLink):
    """A link on which a script does not get through, as if the drain had died before it."""

    def script(self, shard: int, name: str, keys: Sequence[str], args: Sequence[Any], timeout_s: float) -> Any:
        if name == "drained":
            raise OutcomeUnknown("cut")
        return super().script(shard, name, keys, args, timeout_s)


class Stream:
    """One account's shard, written to as the scripts write."""

    def __init__(self, client: redis_py.Redis, account: str = ACCOUNT) -> None:
        self.client = client
        self.account = account
        self.shard = shard_of(account)
        self.key = events_key(self.shard)
        self.state = shard_key(self.shard, "shard")
        self.epoch = 1

    def add(
        self,
        event_id: UUID | None = None,
        *,
        kind: Any = "event",
        at: datetime = AT,
        billable: bool = True,
        late: bool = False,
        **said: Any,
    ) -> UUID:
        event_id = event_id or new_event_id()
        said = {"account": self.account, **said}
        seq = self.number()
        occurred_us = (at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
        header = Header(kind, self.epoch, seq, occurred_us, event_id.hex, billable, late)
        self.put(msgspec.json.encode(header), encode(msgspec.structs.replace(PLAIN, **said)))
        return event_id

    def cancel(self, event_id: UUID) -> None:
        self.add(event_id, kind="cancel")

    def number(self) -> int:
        self.client.hset(self.state, "epoch", self.epoch)
        return int(self.client.hincrby(self.state, "seq", 1))

    def put(self, header: bytes, body: bytes, stream_id: bytes | str = "*") -> None:
        self.client.xadd(self.key, {b"h": header, b"e": body}, id=stream_id)

    def begin(self, epoch: int) -> None:
        self.epoch = epoch
        self.client.hset(self.state, mapping={"epoch": epoch, "seq": 0})

    def entries(self) -> list[tuple[bytes, dict[bytes, bytes]]]:
        return self.client.xrange(self.key)

    def generation(self) -> int:
        return int(self.client.hget(account_key(self.shard, "account", self.account), "gen") or 0)

    def fenced(self) -> str | None:
        reason = self.client.hget(self.state, "fenced")
        return None if reason is None else reason.decode()


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as running:
        yield running


@pytest.fixture
def client(server: RedisServer) -> Iterator[redis_py.Redis]:
    with server.client() as opened:
        opened.flushall()
        yield opened


@pytest.fixture
def stream(client: redis_py.Redis) -> Stream:
    return Stream(client)


@pytest.fixture
def ledger(meter: Meter) -> Iterator[Ledger]:
    meter.accounts.create(ACCOUNT, plan="pro")
    yield meter.ledger
    assert all(check.agrees for check in check_counters(meter.ledger))


@pytest.fixture
def new_drain(ledger: Ledger, client: redis_py.Redis, clock: Any) -> Callable[..., Drain]:
    def new(link: Any = PlainLink, **options: Any) -> Drain:
        return Drain(ledger, link(client), clock=clock, **{"shards": [SHARD], **options})

    return new


@pytest.fixture
def drain(new_drain: Callable[..., Drain]) -> Drain:
    return new_drain()


def rows(ledger: Ledger, table: str = "events", order: str = "1") -> list[dict[str, Any]]:
    with ledger.read() as connection:
        return [dict(row) for row in connection.exec_driver_sql(f"SELECT * FROM {table} ORDER BY {order}").mappings()]


def ids(ledger: Ledger) -> list[UUID]:
    return [UUID(row["event_id"]) for row in rows(ledger)]


def counts(drained: Counts) -> dict[str, int]:
    """What is not 0."""
    return {name: getattr(drained, name) for name in Counts.__slots__ if getattr(drained, name)}


def quantity(meter: Meter, account: str = ACCOUNT) -> Decimal:
    [total] = meter.usage(account)
    return total.quantity


@contextmanager
def cut(drain: Drain) -> Iterator[None]:
    """The ledger commits, and Redis is not told."""
    with pytest.raises(StoreUnavailable, match="cut"):
        yield
    with drain._ledger.read() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM shards").scalar_one()


def test_an_event_arrives_as_it_was_admitted(meter: Meter, ledger: Ledger, drain: Drain, stream: Stream) -> None:
    key = meter.keys.create(ACCOUNT)
    event_id = stream.add(
        key_id=key.key_id,
        billable=False,
        late=True,
        operation="POST /x",
        provider="p",
        model="m",
        service_tier="flex",
        run_id="r",
        request_id="q",
        session_id="s",
        attributes='{"a":1,"b":"ä"}',
        platform_paid=False,
        tokens=(9, 4, 3, 2, 1, 8, 7, 6),
        quantity="123456789012345678.000000000001",
        estimated=True,
        error="boom",
        latency_ms=31,
        idempotency_key="k",
        fingerprint="f",
    )
    [entry] = stream.entries()
    assert counts(drain.run()) == {"inserted": 1}
    [row] = rows(ledger)
    assert row == {
        "seq": 1,
        "event_id": event_id.hex,
        "kind": "usage",
        "corrects": None,
        "account": ACCOUNT,
        "key_id": key.key_id,
        "plan_version": 1,
        "line": "a",
        "operation": "POST /x",
        "caller_type": "production_agent",
        "occurred_at": "2026-03-12T11:59:30.123456Z",
        "recorded_at": "2026-03-12T12:00:00.000000Z",
        "period": "2026-03",
        "requests": 1,
        "input_tokens": 9,
        "cache_read_tokens": 4,
        "cache_write_tokens": 3,
        "cache_write_1h_tokens": 2,
        "input_audio_tokens": 1,
        "output_tokens": 8,
        "reasoning_tokens": 7,
        "output_audio_tokens": 6,
        "quantity": "123456789012345678.000000000001",
        "provider": "p",
        "model": "m",
        "service_tier": "flex",
        "run_id": "r",
        "request_id": "q",
        "session_id": "s",
        "attributes": '{"a":1,"b":"ä"}',
        "platform_paid": 0,
        "billable": 0,
        "estimated": 1,
        "counted": 1,
        "late": 1,
        "error": "boom",
        "latency_ms": 31,
        "idempotency_key": "k",
        "fingerprint": "f",
        "source": None,
        "reason": None,
    }
    assert rows(ledger, "event_ids") == [
        {
            "event_id": event_id.hex,
            "period": "2026-03",
            "fingerprint": "f",
            "position": f"{SHARD}/1/{entry[0].decode()}",
        }
    ]
    assert rows(ledger, "shards") == [
        {"shard": SHARD, "epoch": 1, "seq": 1, "lost": 0, "drained_at": "2026-03-12T12:00:00.000000Z"}
    ]
    assert stream.entries() == []
    assert stream.generation() == 0
    assert drain.run() == Drained()


def test_what_a_newer_app_adds_at_the_end_is_left_out(ledger: Ledger, drain: Drain, stream: Stream) -> None:
    header = ["event", 1, stream.number(), 0, "a" * 32, True, False, "new"]
    body = [*msgspec.structs.astuple(PLAIN), "new", 5]
    stream.client.xadd(
        stream.key, {b"h": msgspec.json.encode(header), b"e": msgspec.msgpack.encode(body), b"x": b"new"}
    )
    assert counts(drain.run()) == {"inserted": 1}
    assert ids(ledger) == [UUID("a" * 32)]


def test_last_use_of_a_key_moves_forward_only(meter: Meter, drain: Drain, stream: Stream) -> None:
    key = meter.keys.create(ACCOUNT)
    for minutes in (5, 9, 7):
        stream.add(key_id=key.key_id, at=AT + timedelta(minutes=minutes))
    drain.run()
    assert meter.keys.lookup(key.secret).last_used_at == AT + timedelta(minutes=9)
    stream.add(key_id=key.key_id, at=AT + timedelta(minutes=8))
    drain.run()
    assert meter.keys.lookup(key.secret).last_used_at == AT + timedelta(minutes=9)


def test_counters_of_the_ledger_do_not_go_stale(meter: Meter, drain: Drain, stream: Stream) -> None:
    secret = meter.keys.create(ACCOUNT).secret
    assert meter.consume(secret, line="a").allowed
    event_id = stream.add()
    drain.run()
    assert meter.quota(ACCOUNT)[0].used == 2
    assert meter.consume(secret, line="a").allowed
    stream.cancel(event_id)
    drain.run()
    assert all(check.agrees for check in check_counters(meter.ledger))
    assert meter.quota(ACCOUNT)[0].used == 2


def test_a_kill_between_commit_and_acknowledgement_leaves_redeliveries(
    meter: Meter, ledger: Ledger, new_drain: Callable[..., Drain], stream: Stream
) -> None:
    expected = [stream.add() for _ in range(7)]
    unlucky = new_drain(Cut, batch=5)
    for _ in range(2):
        with cut(unlucky):
            unlucky.run()
    assert ids(ledger) == expected[:5]
    assert len(stream.entries()) == 7
    assert counts(new_drain(batch=5).run()) == {"inserted": 2, "redelivered": 5}
    assert ids(ledger) == expected
    assert quantity(meter) == 7
    assert (stream.entries(), stream.generation(), stream.fenced()) == ([], 0, None)


def test_a_key_used_again_for_the_same_request_is_not_billed(
    meter: Meter, ledger: Ledger, new_drain: Callable[..., Drain], stream: Stream, clock: Any
) -> None:
    event_id = stream.add(fingerprint="f")
    new_drain().run()
    clock.advance(days=8)
    assert stream.add(event_id, fingerprint="f") == event_id
    unlucky = new_drain(Cut)
    for _ in range(2):
        with cut(unlucky):
            unlucky.run()
    assert stream.generation() == 0, "nothing is given back before it is acknowledged"
    [(stream_id, _)] = stream.entries()
    assert counts(new_drain().run()) == {"redelivered": 1}
    assert stream.generation() == 1
    assert rows(ledger, "key_reuses") == [
        {
            "position": f"{SHARD}/1/{stream_id.decode()}",
            "account": ACCOUNT,
            "event_id": event_id.hex,
            "billed_as": None,
            "noticed_at": "2026-03-20T12:00:00.000000Z",
        }
    ]
    assert quantity(meter) == 1
    since = stream.client.hget(account_key(SHARD, "account", ACCOUNT), "since")
    assert since == str(int(clock.now.timestamp() * 1_000_000)).encode()


def test_a_key_used_again_for_another_request_is_billed_as_a_fact_of_its_own(
    meter: Meter, ledger: Ledger, drain: Drain, stream: Stream
) -> None:
    event_id = stream.add(fingerprint="f", quantity="1")
    stream.add(event_id, fingerprint="g", quantity="10")
    stream.add(event_id, fingerprint=None, quantity="100")
    for fingerprint in ("g", "f", None):
        stream.add(event_id, fingerprint=fingerprint, quantity="1000")
    positions = [f"{SHARD}/1/{stream_id.decode()}" for stream_id, _ in stream.entries()]
    assert counts(drain.run()) == {"inserted": 3, "reused": 3}
    own = [derive_event_id("reused", event_id.hex, position) for position in positions[1:3]]
    assert ids(ledger) == [event_id, *own]
    assert [row["billed_as"] for row in rows(ledger, "key_reuses", "noticed_at, position")] == [
        *(fact.hex for fact in own),
        *(None, None, None),
    ]
    assert {row["event_id"]: row["position"] for row in rows(ledger, "event_ids")} == dict(
        zip([fact.hex for fact in (event_id, *own)], positions[:3], strict=True)
    )
    assert quantity(meter) == 111
    assert stream.generation() == 1, "once for the batch"


def test_an_id_of_the_ledger_s_own_is_known_to_the_drain(meter: Meter, drain: Drain, stream: Stream) -> None:
    secret = meter.keys.create(ACCOUNT).secret
    billed = meter.consume(secret, line="a", idempotency_key="k", fingerprint="f", quantity=1)
    stream.add(billed.event_id, fingerprint="f")
    stream.cancel(billed.event_id)
    assert counts(drain.run()) == {"reused": 1, "baseless": 1}
    assert quantity(meter) == 1


def test_a_cancel_reverses_what_it_undoes_once(
    meter: Meter, ledger: Ledger, new_drain: Callable[..., Drain], stream: Stream
) -> None:
    event_id = stream.add(quantity="2.5", tokens=(9, 4, 0, 0, 0, 8, 7, 0), idempotency_key="k", fingerprint="f")
    kept = stream.add()
    stream.cancel(event_id)
    unlucky = new_drain(Cut)
    for _ in range(2):
        with cut(unlucky):
            unlucky.run()
    assert counts(new_drain().run()) == {"redelivered": 3}
    original, _, reversal = rows(ledger)
    assert (reversal["kind"], reversal["corrects"], reversal["reason"]) == ("correction", event_id.hex, UNDONE)
    assert (reversal["requests"], reversal["input_tokens"], reversal["quantity"]) == (-1, -9, "-2.5")
    same = ("account", "line", "occurred_at", "period", "plan_version", "counted", "billable")
    assert [reversal[name] for name in same] == [original[name] for name in same]
    assert (reversal["idempotency_key"], reversal["fingerprint"]) == (None, None)
    assert quantity(meter) == 1
    assert kept in ids(ledger)
    assert stream.generation() == 1
    stream.cancel(event_id)
    assert counts(new_drain().run()) == {"baseless": 1}
    assert quantity(meter) == 1
    with pytest.raises(CorrectionConflict, match="was undone: nothing is billed for it"):
        meter.correct(event_id, quantity=5, reason="r")


def test_a_cancel_of_what_was_never_admitted_undoes_nothing(
    ledger: Ledger, new_drain: Callable[..., Drain], stream: Stream
) -> None:
    stream.cancel(new_event_id())
    stream.add()
    unlucky = new_drain(Cut)
    with cut(unlucky):
        unlucky.run()
    assert counts(new_drain().run()) == {"baseless": 1, "redelivered": 1}
    assert len(rows(ledger)) == 1
    assert stream.fenced() is None, "it left nothing to be known by"


def test_a_cancel_reverses_what_is_billed_now(meter: Meter, ledger: Ledger, drain: Drain, stream: Stream) -> None:
    event_id = stream.add(quantity="3")
    drain.run()
    first = meter.correct(event_id, quantity=2, reason="one")
    assert first.replacement is not None
    second = meter.correct(first.replacement, quantity=4, reason="two")
    assert second.replacement is not None
    stream.cancel(event_id)
    assert counts(drain.run()) == {"cancelled": 1}
    assert quantity(meter) == 0
    last = rows(ledger)[-1]
    assert UUID(last["event_id"]) == derive_event_id("reversal", second.replacement.hex)
    assert (last["corrects"], last["quantity"]) == (event_id.hex, "-4")


def test_a_call_made_again_after_it_was_undone_is_billed(
    meter: Meter, ledger: Ledger, new_drain: Callable[..., Drain], stream: Stream
) -> None:
    event_id = stream.add(fingerprint="f", quantity="1")
    stream.cancel(event_id)
    stream.add(event_id, fingerprint="f", quantity="10")
    unlucky = new_drain(Cut)
    with cut(unlucky):
        unlucky.run()
    assert quantity(meter) == 10
    with cut(unlucky):
        unlucky.run()
    assert quantity(meter) == 10, "delivered again, the cancel undoes nothing that came after it"
    stream.add(event_id, fingerprint="f", quantity="100")
    assert counts(new_drain().run()) == {"redelivered": 3, "reused": 1}
    stream.cancel(event_id)
    assert counts(new_drain().run()) == {"cancelled": 1}
    assert quantity(meter) == 0
    stream.add(event_id, fingerprint="f", quantity="1000")
    stream.cancel(event_id)
    stream.add(event_id, fingerprint="f", quantity="7")
    history = stream.entries()
    assert counts(new_drain().run()) == {"inserted": 2, "cancelled": 1}
    assert quantity(meter) == 7
    for stream_id, fields in history:
        stream.client.delete(stream.key)
        stream.put(fields[b"h"], fields[b"e"], stream_id)
        assert counts(new_drain().run()) == {"redelivered": 1}
    assert quantity(meter) == 7
    assert stream.fenced() is None


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


def test_two_drains_at_once_bill_and_give_back_once(
    meter: Meter, ledger: Ledger, client: redis_py.Redis, stream: Stream, clock: Any
) -> None:
    reused = stream.add(fingerprint="f")
    Drain(ledger, PlainLink(client), clock=clock, shards=[SHARD]).run()
    expected = [stream.add() for _ in range(1_200)]
    stream.add(reused, fingerprint="f")
    together = threading.Barrier(2)

    class Together(PlainLink):
        """Both read the same entries before either has written."""

        def call(self, shard: int, *command: Any, timeout_s: float) -> Any:
            reply = super().call(shard, *command, timeout_s=timeout_s)
            if command[0] == "XRANGE" and not self.met:
                self.met = True
                together.wait(30)
            return reply

        met = False

    answers: list[Drained] = []

    def run() -> None:
        own = Ledger(f"sqlite:///{ledger.path}")
        answers.append(Drain(own, Together(client), clock=clock, shards=[SHARD], batch=300).run())
        own.close()

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sum(drained.inserted for drained in answers) == 1_200
    assert sum(drained.reused for drained in answers) == 1
    assert sum(drained.redelivered for drained in answers) >= 300
    assert ids(ledger) == [reused, *expected]
    assert quantity(meter) == 1_201
    assert (stream.entries(), stream.generation(), stream.fenced()) == ([], 1, None)


def test_a_lease_keeps_polite_drains_apart(new_drain: Callable[..., Drain], stream: Stream) -> None:
    lease = shard_key(SHARD, "drainer")
    stream.add()
    stream.client.set(lease, "somebody", px=60_000)
    drained = new_drain().run(polite=True)
    assert (counts(drained), drained.left) == ({}, [SHARD])
    assert counts(new_drain().run()) == {"inserted": 1}
    assert stream.client.get(lease) == b"somebody"
    stream.client.delete(lease)
    stream.add()
    assert counts(new_drain().run(polite=True)) == {"inserted": 1}
    assert stream.client.get(lease) is None

    stream.add()
    unlucky = new_drain(Cut)
    for _ in range(2):
        with cut(unlucky):
            unlucky.run(polite=True)
    assert stream.client.pttl(lease) > 0, "kept, and its holder is not in its own way"
    assert new_drain().run(polite=True).left == [SHARD]


def test_a_server_whose_memory_is_full_is_drained(
    meter: Meter, drain: Drain, stream: Stream, client: redis_py.Redis
) -> None:
    reused = stream.add()
    drain.run()
    for _ in range(3):
        stream.add()
    stream.add(reused)
    client.config_set("maxmemory", 1)
    try:
        with pytest.raises(redis_py.OutOfMemoryError):
            stream.add()
        assert counts(drain.run()) == {"inserted": 3, "reused": 1}
    finally:
        client.config_set("maxmemory", 0)
    assert (stream.entries(), stream.generation()) == ([], 1)
    assert quantity(meter) == 4


def test_a_ledger_that_cannot_write_makes_no_dead_letters(meter: Meter, drain: Drain, stream: Stream) -> None:
    def set_most_pages(cursor: Any, more: int) -> None:
        pages = cursor.execute("PRAGMA page_count").fetchone()[0]
        cursor.execute(f"PRAGMA max_page_count = {pages + more}")

    expected = [stream.add(error="x" * 2_000) for _ in range(50)]
    meter.ledger.writer.run(lambda cursor: set_most_pages(cursor, 3))
    with pytest.raises(StoreUnavailable, match="the disk is full"):
        drain.run()
    assert len(stream.entries()) == 50
    meter.ledger.writer.run(lambda cursor: set_most_pages(cursor, 1_000))
    assert counts(drain.run()) == {"inserted": 50}
    assert ids(meter.ledger) == expected
    assert rows(meter.ledger, "dead_letters") == []


def test_what_comes_in_meanwhile_is_for_the_next_turn(
    ledger: Ledger, new_drain: Callable[..., Drain], stream: Stream
) -> None:
    class Busy(PlainLink):
        """A shard that gets an event with each look at it."""

        def call(self, shard: int, *command: Any, timeout_s: float) -> Any:
            if command[0] == "XRANGE":
                stream.add()
            return super().call(shard, *command, timeout_s=timeout_s)

    for _ in range(20):
        stream.add()
    drained = new_drain(Busy, batch=5).run()
    assert 20 <= drained.inserted <= 22
    assert stream.entries()


def test_a_shard_that_is_away_keeps_no_other_from_being_drained(
    meter: Meter, ledger: Ledger, client: redis_py.Redis, new_drain: Callable[..., Drain]
) -> None:
    other = next(name for name in map(str, range(99)) if shard_of(name) > SHARD)
    meter.accounts.create(other, plan="pro")
    for account in (ACCOUNT, other):
        Stream(client, account).add()

    class Away(PlainLink):
        def call(self, shard: int, *command: Any, timeout_s: float) -> Any:
            if shard == SHARD:
                raise NotDone("nobody serves it")
            return super().call(shard, *command, timeout_s=timeout_s)

    def announce() -> None:
        raise StoreUnavailable("cannot be told")

    with pytest.raises(StoreUnavailable, match="nobody serves it"):
        new_drain(Away, shards=range(64)).run()
    assert quantity(meter, other) == 1
    with pytest.raises(StoreUnavailable, match="cannot be told"):
        new_drain(shards=range(64), announce=announce).run()
    assert quantity(meter) == 1


def test_a_run_announces_what_the_outbox_has(ledger: Ledger, new_drain: Callable[..., Drain], clock: Any) -> None:
    told: list[int] = []

    def announce() -> None:
        with ledger.write() as connection:
            rows = outbox.unsent(connection, 9)
            outbox.mark_sent(connection, [row.seq for row in rows], clock.now)
        told.append(len(rows))

    drain = new_drain(announce=announce)
    drain.run()
    drain.run()
    assert told == [1, 0]


def test_following_goes_on_until_it_is_stopped(
    meter: Meter, ledger: Ledger, new_drain: Callable[..., Drain], stream: Stream, caplog: pytest.LogCaptureFixture
) -> None:
    away = threading.Event()
    away.set()

    class Flaky(PlainLink):
        def call(self, shard: int, *command: Any, timeout_s: float) -> Any:
            if away.is_set():
                raise OutcomeUnknown("no answer")
            return super().call(shard, *command, timeout_s=timeout_s)

    stop = threading.Event()
    drain = new_drain(Flaky)
    first = stream.add()
    with caplog.at_level(logging.WARNING, "metering"):
        thread = threading.Thread(target=drain.follow, args=(stop,), kwargs={"every_s": 0.01})
        thread.start()
        try:
            wait_until(lambda: "the drain goes on in 0.01 s: no answer" in caplog.messages, "a warning")
            away.clear()
            wait_until(lambda: ids(ledger) == [first], "the first event")
            second = stream.add()
            wait_until(lambda: ids(ledger) == [first, second], "the second event")
        finally:
            stop.set()
            thread.join(30)
    assert not thread.is_alive()


def test_lag_says_how_far_the_ledger_is_behind(
    meter: Meter, new_drain: Callable[..., Drain], stream: Stream, clock: Any
) -> None:
    drain = new_drain(shards=range(64))
    assert {(lag.entries, lag.oldest_s, lag.epoch, lag.drained_seq) for lag in drain.lag()} == {(0, None, None, 0)}
    stream.add()
    stream.number()
    stream.add(quantity="much")
    drain.run()
    clock.now = datetime.now(UTC) + timedelta(minutes=5)
    for _ in range(2):
        stream.add()
    lag = drain.lag()[SHARD]
    assert lag.oldest_s is not None
    assert 295 < lag.oldest_s < 305
    assert (lag.shard, lag.entries, lag.epoch, lag.seq) == (SHARD, 2, 1, 5)
    assert (lag.drained_epoch, lag.drained_seq, lag.lost, lag.dead_letters) == (1, 3, 1, 1)
    with meter.ledger.write() as connection:
        connection.exec_driver_sql("UPDATE dead_letters SET resolved_at = noticed_at")
    assert drain.lag()[SHARD].dead_letters == 0


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("event"), st.integers(0, 1), st.sampled_from(["f", "g", None])),
        st.tuples(st.just("cancel"), st.integers(0, 1)),
        st.tuples(st.sampled_from(["drain", "cut drain", "correct"])),
    ),
    max_size=14,
)


@given(steps=STEPS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_comes_in_whatever_order_is_billed_as_foreseen(
    meter: Meter, ledger: Ledger, new_drain: Callable[..., Drain], stream: Stream, steps: list[tuple[Any, ...]]
) -> None:
    """Against a model: under an id each request is billed once, until it is undone."""
    new_drain().run()
    start = quantity(meter)
    keys = [new_event_id(), new_event_id()]
    facts: dict[UUID, list[list[Any]]] = {key: [] for key in keys}
    amount = 0
    for kind, *which in steps:
        if kind == "event":
            key, fingerprint = keys[which[0]], which[1]
            amount += 1
            stream.add(key, fingerprint=fingerprint, quantity=str(amount))
            if not any(fact[0] == fingerprint and fact[1] for fact in facts[key]):
                facts[key].append([fingerprint, amount])
        elif kind == "cancel":
            stream.cancel(keys[which[0]])
            live = [fact for fact in facts[keys[which[0]]] if fact[1]]
            if live:
                live[-1][1] = 0
        elif kind == "correct":
            for key in keys:
                with suppress(UnknownEvent, CorrectionConflict):
                    meter.correct(key, provider="other", reason="r")
        elif kind == "drain":
            new_drain(batch=3).run()
        elif stream.entries():
            unlucky = new_drain(Cut, batch=4)
            with cut(unlucky):
                unlucky.run()
    expected = start + sum(fact[1] for of_key in facts.values() for fact in of_key)
    entries = PlainLink(stream.client).call(SHARD, "XRANGE", stream.key, "-", "+", timeout_s=1)
    with ledger.read() as connection:
        rows_to_come = foreseen(connection.connection.cursor(), SHARD, entries, AT)  # type: ignore[arg-type]
    assert quantity(meter) + sum(Decimal(row["quantity"]) for row in rows_to_come) == expected
    before = set(ids(ledger))
    new_drain(batch=3).run()
    assert {UUID(row["event_id"]) for row in rows_to_come} == set(ids(ledger)) - before
    assert quantity(meter) == expected
    assert stream.fenced() is None


KILLED = """
import os, signal, sys
from redis import Redis
from metering.drain import Drain
from metering.ledger import Ledger, outbox
from tests.metering.test_drain import PlainLink, SHARD

class Fatal(PlainLink):
    left = int(sys.argv[3])

    def script(self, shard, name, *rest):
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1
        return super().script(shard, name, *rest)

Drain(Ledger(sys.argv[1]), Fatal(Redis.from_url(sys.argv[2])), shards=[SHARD], batch=40).run()
"""


def test_a_drain_killed_before_it_acknowledges_gives_nothing_back_and_bills_nothing_twice(
    meter: Meter, ledger: Ledger, drain: Drain, stream: Stream, server: RedisServer
) -> None:
    reused = stream.add(fingerprint="f")
    drain.run()
    expected = [reused]
    for number in range(120):
        expected.append(stream.add())
        if number % 40 == 20:
            stream.add(reused, fingerprint="f")
    undone = expected.pop(50)
    stream.cancel(undone)
    for round_ in (0, 0, 1, 0, 1):
        arguments = [sys.executable, "-c", KILLED, f"sqlite:///{ledger.path}", server.url, str(round_)]
        before = stream.generation()
        assert subprocess.run(arguments, timeout=60, check=False).returncode == -signal.SIGKILL
        assert stream.generation() - before <= round_
    drain.run()
    assert stream.entries() == []
    assert [fact for fact in ids(ledger) if fact in set(expected)] == expected
    assert quantity(meter) == len(expected)
    assert len(rows(ledger, "key_reuses")) == 3
    assert 1 <= stream.generation() <= 4
    assert rows(ledger, "shards")[0]["lost"] == 0
