"""Drains beside each other, cut short, killed or told to go on: each event is in the ledger once."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest
import redis as redis_py
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metering.admission.redis.keys import shard_key, shard_of
from metering.admission.redis.wire import NotDone, OutcomeUnknown
from metering.booking import foreseen
from metering.drain import Drain, Drained
from metering.errors import CorrectionConflict, StoreUnavailable, UnknownEvent
from metering.events import new_event_id
from metering.ledger import Ledger, outbox
from tests.metering.drain.place import (
    ACCOUNT,
    AT,
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
from tests.servers import RedisServer, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from metering.meter import Meter


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
from tests.metering.drain.place import PlainLink, SHARD

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
