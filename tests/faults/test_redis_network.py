"""What the Redis store promises where network, server or memory fail: no call counts twice, none hangs, none is lost.

A call is answered, or it fails closed with `StoreUnavailable`. Then nothing is billed for it, unless its caller tries
the same idempotency key again: that is answered with what was booked, or decided anew.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from urllib.parse import quote

import pytest

from metering.errors import (
    IdempotencyInProgress,
    InvalidSetting,
    LimitExceeded,
    Replayed,
    RevokedKey,
    StoreUnavailable,
)
from metering.meter import Meter
from metering.plans import Limit
from tests.faults.redis_place import DEADLINE_S, PATIENT_S, Place, in_threads, patiently, per, tokens
from tests.proxy import CHUNK, Proxy
from tests.servers import HOST, RedisServer, flavours, wait_until

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.conftest import Clock

ROUNDS = int(os.environ.get("TALLYSTICK_FAULT_ROUNDS", "2"))
CALLS = 400 * ROUNDS
TIMEOUT_S = 0.25
HANG_S = 5.0
"""No call with a timeout of TIMEOUT_S may take as long, however busy the machine is."""

spawn = multiprocessing.get_context("spawn")


@dataclass(frozen=True, slots=True)
class Callers:
    """How an app calls: `count` threads on a Meter, or as many tasks on one event loop with an AsyncMeter."""

    count: int
    is_async: bool

    def open(self, place: Place, timeout_s: float = PATIENT_S, **options: Any) -> Any:
        """A meter for them. Both kinds are called in the same words."""
        return (place.open_async_meter if self.is_async else place.open_meter)(timeout_s, **options)


@pytest.fixture(params=[Callers(8, is_async=False), Callers(64, is_async=True)], ids=["threads", "tasks"])
def callers(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=flavours())
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    """A server of each flavour that there is."""
    with RedisServer(request.param) as started:
        yield started


@pytest.fixture
def place_at(tmp_path: Path, empty_ledger: Path) -> Callable[..., Place]:
    """`with place_at(url) as place:` is the test's place, on the Redis at a URL."""
    return partial(Place, tmp_path, empty_ledger)


# A bad network.


@dataclass(slots=True)
class AppCall:
    """One call of an app, and what it was told in the end."""

    number: int
    secret: str
    is_keyed: bool = False
    is_held: bool = False
    told: str | None = None
    """`billed` or `refused`; None while it has no answer."""
    attempts: int = 0
    said: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        key = f"key-{self.number}" if self.is_keyed else None
        self.said = {"line": "a", "request_id": f"call-{self.number}", "idempotency_key": key}

    @property
    def tokens(self) -> int:
        return self.number + 1

    def make(self, meter: Any) -> bool:
        """Make it, as `consume` or as `reserve` and `settle`. Whether it was answered."""
        self.attempts += 1
        try:
            if self.is_held:
                hold = meter.reserve(self.secret, estimate=tokens(self.tokens + 5), **self.said)
                hold.settle(tokens(self.tokens))  # no outage is ever its caller's problem
                self.told = "billed"
            else:
                decision = meter.consume(self.secret, usage=tokens(self.tokens), **self.said)
                self.told = "billed" if decision.allowed else "refused"
        except Replayed:
            self.told = "billed"
        except LimitExceeded:
            self.told = "refused"
        except (StoreUnavailable, IdempotencyInProgress):
            pass
        return self.told is not None


class Weather:
    """A network that loses 1 % of the replies and cuts or delays others. Three times it fails for good.

    It then stays so until some calls went without an answer.
    """

    LONG = 12

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._troubles = {
            CALLS * 1 // 4: proxy.pause,
            CALLS * 2 // 4: proxy.refuse,
            CALLS * 3 // 4: partial(setattr, proxy, "drop_next", 10**6),
        }
        self._left = 0
        self.unanswered = 0
        proxy.drop_replies, proxy.cut_replies, proxy.delay_replies = 0.01, 0.01, 0.03

    def before(self, call: AppCall) -> None:
        """Be as it is when this call is made."""
        trouble = self._troubles.pop(call.number, None)
        if trouble is not None:
            self._left = self.LONG
            trouble()

    def after(self, call: AppCall) -> None:
        """Note whether it was answered."""
        if call.told is None:
            self.unanswered += 1
            self._left -= 1
            if not self._left:
                self._clear()

    def end(self) -> None:
        """Be fine from now on."""
        self._proxy.drop_replies = self._proxy.cut_replies = self._proxy.delay_replies = 0
        self._clear()

    def _clear(self) -> None:
        self._proxy.drop_next = 0
        self._proxy.resume()


def test_behind_a_bad_network_no_call_counts_twice(place_at: Callable[..., Place], callers: Callers) -> None:
    chance, most = random.Random(2), CALLS * 3 // 5
    with RedisServer() as server, Proxy(server.port, seed=1) as proxy, place_at(proxy.url) as place:
        secret = place.open_account(
            per("month", most),
            per("month", 10**12, "input_tokens"),
            per("day", CALLS * 2),
            per("minute", CALLS * 2, scope="key"),
            Limit(metric="requests", rate="1000000/minute"),
        )
        calls = [
            AppCall(number, secret, is_keyed=chance.random() < 0.5, is_held=chance.random() < 0.4)
            for number in range(CALLS)
        ]
        meter, weather, to_make = callers.open(place, TIMEOUT_S), Weather(proxy), iter(calls)

        def work(_: int) -> None:
            for call in to_make:
                weather.before(call)
                # Some of the apps that have a key try again at once.
                for _ in range(3 if call.is_keyed and call.number % 2 else 1):
                    if call.make(meter):
                        break
                weather.after(call)

        with place.draining(server.url):
            in_threads(work, callers.count, deadline_s=DEADLINE_S + CALLS / 20)
        weather.end()
        assert weather.unanswered >= 3 * weather.LONG
        assert proxy.counts["dropped"] > 0
        # Tasks share replies, so there are few of them: of the rarer troubles there may be none.
        assert proxy.counts["cut"] + proxy.counts["delayed"] > 0
        at_once = [call for call in calls if call.told == "billed" and call.attempts == 1]

        # Once the network is back others try again: before what they know nothing of is undone, and after.
        again = [call for call in calls if call.told is None and call.is_keyed]
        for call in again[::2]:
            call.make(place.meter)
        place.deliver()
        assert all(call.make(place.meter) for call in again if call.told is None)

        # What was undone is room for others, to the last unit.
        for number in itertools.count(CALLS):
            calls.append(AppCall(number, secret))
            assert calls[-1].make(place.meter)
            if calls[-1].told == "refused":
                break
        place.deliver()
        assert place.billed() == most
        assert place.used()[:2] == [most, sum(call.tokens for call in calls if call.told == "billed")]

        bill = place.bill()
        billed = {name: tuple(sums[:2]) for name, sums in bill.items() if any(sums[:2])}
        assert billed == {call.said["request_id"]: (1, call.tokens) for call in calls if call.told == "billed"}
        assert {bill[call.said["request_id"]].rows for call in at_once} == {1}
        place.assert_sound()


# Redis frozen, gone, or not to be reached.


class Outage(NamedTuple):
    """A way to be away, and the URL of a Redis that can be."""

    url: str
    begin: Callable[[], None]
    end: Callable[[], None]


@pytest.fixture(params=["frozen", "killed", "refused", "a black hole"])
def outage(request: pytest.FixtureRequest) -> Iterator[Outage]:
    """Redis stopped in its tracks; killed, and started again; its port closed; its port open and nothing behind it."""
    with RedisServer(appendonly=True) as server, Proxy(server.port) as proxy:
        yield {
            "frozen": Outage(server.url, server.freeze, server.thaw),
            "killed": Outage(server.url, server.kill, server.start),
            "refused": Outage(proxy.url, proxy.refuse, proxy.resume),
            "a black hole": Outage(proxy.url, proxy.pause, proxy.resume),
        }[request.param]


def fails_closed(ask: Callable[[], object]) -> None:
    began = time.monotonic()
    with pytest.raises(StoreUnavailable):
        ask()
    assert time.monotonic() - began < HANG_S


def test_while_redis_is_away_calls_fail_closed_and_afterwards_the_same_meter_works(
    outage: Outage, place_at: Callable[..., Place], callers: Callers
) -> None:
    with place_at(outage.url) as place:
        secret = place.open_account(per("month", 1_000))
        meter = callers.open(place, TIMEOUT_S)

        asks: list[Callable[[], Any]] = [
            lambda: meter.consume(secret, line="a"),
            lambda: meter.consume(secret, line="a", idempotency_key="once"),
            lambda: meter.reserve(secret, line="a"),
            lambda: meter.quota("acme"),
        ]
        assert patiently(lambda: meter.consume(secret, line="a", request_id="before")).allowed
        outage.begin()
        in_threads(lambda number: fails_closed(asks[number % len(asks)]), callers.count)
        outage.end()
        assert patiently(lambda: meter.consume(secret, line="a", request_id="after")).allowed
        place.deliver()
        # Nothing that was sent into the outage is done afterwards: it had a deadline, or it is undone.
        assert {name for name, sums in place.bill().items() if sums.requests} == {"before", "after"}
        assert (place.billed(), place.used()) == (2, [2])
        place.assert_sound()


@pytest.mark.parametrize("outage", ["frozen", "killed"], indirect=True)
def test_a_settle_while_redis_is_away_is_billed_later(
    outage: Outage, place_at: Callable[..., Place], callers: Callers
) -> None:
    with place_at(outage.url) as place:
        secret = place.open_account(per("month", 100), per("month", 1_000, "input_tokens"))
        meter = callers.open(place, TIMEOUT_S)

        def reserve(number: int) -> Any:
            return meter.reserve(secret, line="a", estimate=tokens(9), request_id=f"call-{number}")

        def settle(number: int) -> None:
            began = time.monotonic()
            assert holds[number].settle(tokens(number)).pending
            assert time.monotonic() - began < HANG_S
            if number % 4 == 0:
                assert holds[number].settle(tokens(number)).pending, "said twice, it is still one"

        holds = [patiently(partial(reserve, number)) for number in range(callers.count)]
        outage.begin()
        in_threads(settle, callers.count)
        assert place.waiting() >= callers.count, "on disk, should this process die now"
        outage.end()
        place.deliver()
        billed = {name: sums for name, sums in place.bill().items() if sums.requests}
        assert billed == {f"call-{number}": (1, number, 1) for number in range(callers.count)}
        assert place.used() == [callers.count, sum(range(callers.count))]
        assert patiently(lambda: holds[3].settle(tokens(3))).event_id == holds[3].settled.event_id
        place.assert_sound()
        assert place.billed() == callers.count


def settle_and_die(settings: dict[str, Any], secret: str, talk: Any) -> None:
    hold = Meter(**settings).reserve(secret, line="a", estimate=tokens(9), request_id="call")
    talk.send("reserved")
    talk.recv()
    talk.send(hold.settle(tokens(7)).pending)
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_dead_process_could_not_tell_is_told_by_the_next_one(place_at: Callable[..., Place]) -> None:
    ours, theirs = spawn.Pipe()
    with RedisServer(appendonly=True) as server, place_at(server.url) as place:
        secret = place.open_account(per("month", 100), per("month", 1_000, "input_tokens"))
        settings = {"ledger_url": place.ledger_url, **place.settings(3.0)}
        process = spawn.Process(target=settle_and_die, args=(settings, secret, theirs), daemon=True)
        process.start()
        assert ours.poll(DEADLINE_S)
        assert ours.recv() == "reserved"
        server.kill()
        ours.send("Redis is gone")
        assert ours.poll(DEADLINE_S)
        assert ours.recv() is True, "pending"
        process.join(DEADLINE_S)
        assert process.exitcode == -signal.SIGKILL
        server.start()
        assert place.drain().inserted == 0
        place.deliver()
        assert place.bill() == {"call": (1, 7, 1)}
        assert place.used() == [1, 7]
        place.assert_sound()


def test_a_settle_finds_its_way_when_hold_and_window_are_over_by_then(
    place_at: Callable[..., Place], clock: Clock, tmp_path: Path, callers: Callers
) -> None:
    with RedisServer() as server, Proxy(server.port) as proxy, place_at(server.url, clock=clock) as place:
        secret = place.open_account(per("day", 10), per("month", 1_000, "input_tokens"))
        elsewhere = callers.open(place, TIMEOUT_S, quota_url=proxy.url, spool=tmp_path / "spool of another machine")
        hold = patiently(lambda: elsewhere.reserve(secret, line="a", estimate=tokens(9)))
        assert place.used() == [1, 9]
        proxy.refuse()
        assert hold.settle(tokens(7)).pending
        clock.advance(days=1)
        assert place.meter.expire_holds() == 1
        assert place.used() == [0, 0], "what it held was given back"
        proxy.resume()
        wait_until(lambda: elsewhere.flush() or place.drain().inserted == 1, "the settle")
        query = "SELECT substr(occurred_at, 1, 10), requests, input_tokens, late, billable FROM events"
        assert place.rows(query) == [("2026-03-12", 1, 7, 1, 1)]
        assert place.used() == [0, 7], "in the windows of the hold, of which the day is over"
        place.assert_sound()


# A server that is there and cannot serve.


def test_a_server_that_may_evict_is_refused_unless_that_is_allowed(
    place_at: Callable[..., Place], callers: Callers
) -> None:
    with (
        RedisServer(maxmemory_policy="allkeys-lru") as server,
        place_at(server.url, allow_eviction=True) as place,
    ):
        secret = place.open_account(per("month", 10))
        meter = callers.open(place, allow_eviction=False)
        for _ in range(3):
            with pytest.raises(InvalidSetting, match=r"^maxmemory-policy: got 'allkeys-lru', expected noeviction"):
                meter.consume(secret, line="a")
        assert callers.open(place).consume(secret, line="a").remaining == 9


def test_a_settle_that_meets_such_a_server_is_kept_until_it_is_mended(
    place_at: Callable[..., Place], callers: Callers
) -> None:
    with (
        RedisServer() as server,
        Proxy(server.port) as proxy,
        place_at(proxy.url) as place,
        server.client() as client,
    ):
        secret = place.open_account(per("month", 10))
        meter = callers.open(place)
        hold = meter.reserve(secret, line="a", request_id="call")
        client.config_set("maxmemory-policy", "allkeys-lru")
        proxy.refuse()
        proxy.resume()
        assert hold.settle().pending
        with pytest.raises(InvalidSetting):
            meter.consume(secret, line="a")
        client.config_set("maxmemory-policy", "noeviction")
        wait_until(lambda: not place.waiting(), "the meter's own thread to carry it")
        assert place.drain().inserted == 1
        assert place.bill() == {"call": (1, 0, 1)}
        place.assert_sound()


@pytest.mark.parametrize("given", ["wrong sésame", None])
def test_a_wrong_password_is_said_and_not_shown(
    given: str | None, place_at: Callable[..., Place], callers: Callers, caplog: pytest.LogCaptureFixture
) -> None:
    right = "open/sésame@#1"
    with RedisServer(password=right) as server, place_at(server.url) as place:
        secret = place.open_account(per("month", 10))
        login = "" if given is None else f":{quote(given)}@"
        meter = callers.open(place, quota_url=f"redis://{login}{HOST}:{server.port}")
        with pytest.raises(StoreUnavailable, match=f"^Redis at {HOST}:{server.port} refuses this login: ") as raised:
            meter.consume(secret, line="a")
        said, error = [caplog.text, repr(meter)], cast("BaseException | None", raised.value)
        while error is not None:
            said.append(f"{error!r} {error}")
            error = error.__cause__ or error.__context__
        for password in filter(None, (right, given)):
            assert not [text for text in said if password in text or quote(password) in text]
        assert callers.open(place).consume(secret, line="a").allowed, "the right one works, whatever is in it"


def test_a_lost_script_cache_changes_nothing(
    server: RedisServer, place_at: Callable[..., Place], callers: Callers
) -> None:
    with place_at(server.url) as place, server.client() as client:
        secret = place.open_account(per("month", 250))
        meter, told, to_make = callers.open(place), Counter[bool](), iter(range(400))

        def work(_: int) -> None:
            for number in to_make:
                if number % 8 == 0:
                    client.script_flush()
                told[meter.consume(secret, line="a", request_id=f"call-{number}").allowed] += 1

        in_threads(work, callers.count)
        assert told == {True: 250, False: 150}
        place.deliver()
        assert place.billed() == 250
        assert set(place.bill().values()) == {(1, 0, 1)}
        place.assert_sound()


def test_a_server_without_memory_admits_nothing_and_leaves_nothing_half_written(
    server: RedisServer, place_at: Callable[..., Place], callers: Callers
) -> None:
    with place_at(server.url) as place, server.client() as client:
        secret = place.open_account(per("month", 10), per("month", 100, "input_tokens"))
        # A short timeout: every refusal takes all of it.
        meter, said = callers.open(place, 0.1), {"line": "a", "usage": tokens(1)}

        def consume(name: str) -> Any:
            return meter.consume(secret, **said, request_id=name, idempotency_key=name)

        def everything() -> dict[bytes, Any]:
            return {key: client.dump(key) for key in client.scan_iter()}

        patiently(lambda: consume("before"))
        hold = patiently(lambda: meter.reserve(secret, line="a", estimate=tokens(9), request_id="held"))
        place.deliver()
        before = everything()
        client.config_set("maxmemory", 1)
        fails_closed(lambda: meter.consume(secret, **said))
        fails_closed(lambda: consume("after"))
        fails_closed(lambda: meter.reserve(secret, line="a", estimate=tokens(1)))
        assert hold.settle(tokens(7)).pending
        assert everything() == before
        client.config_set("maxmemory", 0)
        assert patiently(lambda: consume("before")).replayed
        assert patiently(lambda: consume("after")).allowed
        place.deliver()
        assert {name: sums[:2] for name, sums in place.bill().items() if sums.requests} == {
            "before": (1, 1),
            "held": (1, 7),
            "after": (1, 1),
        }
        assert (place.billed(), place.used()) == (3, [3, 9])
        place.assert_sound()


# A network that is fine.


class CountingProxy(Proxy):
    """Counts what clients send, too. Of one who waits for each answer that is the round trips."""

    async def _requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(CHUNK):
            self.counts["sent"] += 1
            await self._pass_on(data, writer)
        raise ConnectionResetError


def test_once_an_account_is_known_every_verb_is_one_round_trip(
    place_at: Callable[..., Place], callers: Callers, clock: Clock
) -> None:
    with RedisServer() as server, CountingProxy(server.port) as proxy, place_at(proxy.url, clock=clock) as place:
        secret = place.open_account(
            per("month", 60),
            per("day", 60, scope="key"),
            per("minute", 60, line="a"),
            Limit(metric="requests", rate="1000/second"),
        )
        meter = callers.open(place)

        def round_trips(ask: Callable[[int], Any]) -> int:
            before = proxy.counts["sent"]
            assert all(ask(number) for number in range(10))
            return proxy.counts["sent"] - before

        def consume(number: int, **said: Any) -> Any:
            return meter.consume(secret, line="a", **said)

        def consume_keyed(number: int) -> Any:
            return consume(number, idempotency_key=f"key-{number}", response={"n": number})

        # The first call learns whose key it is, and a server keeps each script once it was sent.
        consume(0)
        meter.reserve(secret, line="a").settle()
        meter.reserve(secret, line="a").release()
        assert round_trips(lambda number: consume(number).allowed) == 10
        assert round_trips(lambda number: not consume_keyed(number).replayed) == 10
        assert round_trips(lambda number: consume_keyed(number).response == {"n": number}) == 10
        holds: list[Any] = []
        assert round_trips(lambda _: holds.append(meter.reserve(secret, line="a")) is None) == 10
        assert round_trips(lambda _: holds.append(meter.reserve(secret, line="a")) is None) == 10
        assert round_trips(lambda number: not holds[number].settle().late) == 10
        assert round_trips(lambda number: holds[number + 10].release()) == 10
        while consume(0).allowed:
            pass
        assert round_trips(lambda number: not consume(number).allowed) == 10
        assert place.used()[0] == 60


def test_a_key_revoked_in_one_process_is_refused_in_another_at_its_next_call(
    place_at: Callable[..., Place], callers: Callers
) -> None:
    with RedisServer() as server, Proxy(server.port) as proxy, place_at(proxy.url) as place:
        secrets = [place.open_account(per("month", 10)), *(place.meter.keys.create("acme").secret for _ in range(2))]
        others = [callers.open(place) for _ in range(2)]
        for meter in others:
            assert all(meter.consume(secret, line="a", idempotency_key="once").allowed for secret in secrets)

        first, second, _ = (place.meter.authenticate(secret).key_id for secret in secrets)
        place.meter.keys.revoke(first)
        for meter in others:
            for key in (None, "once"):
                with pytest.raises(RevokedKey):
                    meter.consume(secrets[0], line="a", idempotency_key=key)
            with pytest.raises(RevokedKey):
                meter.reserve(secrets[0], line="a")
            assert meter.consume(secrets[1], line="a").allowed

        # A revoke that Redis could not be told says so, and stands: whoever drains next tells Redis.
        hasty = place.open_meter(TIMEOUT_S)
        proxy.refuse()
        with pytest.raises(StoreUnavailable, match="the ledger has this change, but Redis could not be told"):
            hasty.keys.revoke(second)
        proxy.resume()
        place.drain()
        for meter in others:
            with pytest.raises(RevokedKey):
                meter.consume(secrets[1], line="a")
            assert meter.consume(secrets[2], line="a", idempotency_key="once").replayed
        assert place.used() == [3]
        place.assert_sound()


def test_a_plan_changed_in_one_process_applies_in_another_at_its_next_call(
    place_at: Callable[..., Place], callers: Callers
) -> None:
    with RedisServer() as server, place_at(server.url) as place:
        secret = place.open_account(per("month", 100))
        other = callers.open(place)

        def use(count: int, line: str) -> None:
            for _ in range(count):
                assert other.consume(secret, line=line, usage=tokens(7)).allowed

        def is_refused_at(used: int, line: str) -> bool:
            decision = other.consume(secret, line="b" if line == "*" else line, usage=tokens(1))
            return (decision.allowed, decision.refused_by.limit.line, decision.refused_by.used) == (False, line, used)

        use(4, "a")
        use(2, "b")
        place.drain()
        use(3, "a")
        hold = other.reserve(secret, line="a", estimate=tokens(5))
        # Nothing has counted tokens so far: 42 are in the ledger, 21 in the stream, 5 in a hold.
        place.set_plan(
            "acme",
            per("month", 100),
            per("month", 42 + 21 + 5 + 14, "input_tokens"),
            per("month", 28 + 21 + 5 + 7, "input_tokens", line="a"),
        )
        use(1, "a")
        assert is_refused_at(28 + 21 + 5 + 7, "a")
        use(1, "b")
        assert is_refused_at(42 + 21 + 5 + 14, "*")
        hold.settle(tokens(4))
        assert other.consume(secret, line="b", usage=tokens(1)).allowed
        assert place.used() == [13, 82, 60]
        place.assert_sound()

        place.meter.accounts.change_plan("acme", "free")
        assert other.consume(secret, line="a", usage=tokens(7)).plan == "free"
        place.assert_sound()
