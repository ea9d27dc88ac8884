"""The drain: every event of a stream once in the ledger, whatever is delivered twice or undone."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

import msgspec
import pytest

from metering.admission.redis.keys import account_key
from metering.admission.verify import check_counters
from metering.booking import UNDONE
from metering.drain import Drain, Drained
from metering.errors import CorrectionConflict
from metering.events import derive_event_id, new_event_id
from tests.metering.drain.place import (
    ACCOUNT,
    AT,
    PLAIN,
    SHARD,
    Cut,
    Stream,
    counts,
    cut,
    ids,
    quantity,
    rows,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from metering.ledger import Ledger
    from metering.meter import Meter


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
