"""Apps, drains and Redis itself killed at any moment: what was acknowledged is once in the ledger, and nothing else is.

Redis keeps what it acknowledged here (append-only, `appendfsync always`).
"""

from __future__ import annotations

import asyncio
import inspect
import multiprocessing
import os
import random
import signal
import threading
import traceback
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from metering.admission.redis.keys import account_key, shard_key, shard_of
from metering.admission.redis.link import Link
from metering.aio import AsyncMeter
from metering.clock import utc_now
from metering.drain import Drain
from metering.errors import IdempotencyInProgress, LimitExceeded, Replayed, StoreUnavailable
from metering.events import derive_event_id
from metering.ledger import Ledger
from metering.meter import Meter
from tests.faults.redis_place import Billed, Place, per, tokens
from tests.servers import RedisServer, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from multiprocessing.context import ForkProcess
    from pathlib import Path

ROUNDS = int(os.environ.get("TALLYSTICK_FAULT_ROUNDS", "5"))
VICTIMS = ("app", "drain", "redis", "all")
THREADS, TASKS = 3, 12
TIMEOUT_S = 0.25
DEADLINE_S = 60.0
EVERGREEN = "evergreen"
"""An account that lives through all rounds, with a limit of each minute."""
MOST_A_MINUTE = 4_000
NOTHING = Billed(0, 0, 0)

fork = multiprocessing.get_context("fork")
chance = random.Random(20261121)


@dataclass(kw_only=True)
class Call:
    """All that an app wrote down of a call."""

    call: str
    account: str = ""
    line: str = ""
    key: str | None = None
    tokens: int = 0
    said: str | None = None
    """What the app was answered; None: it was killed before."""
    response: Any = None
    used: int | None = None
    """What it began to settle its hold with."""
    settled: bool = False
    """Whether that was acknowledged."""
    released: bool = False
    """Whether it began to release its hold."""


@dataclass(kw_only=True)
class App:
    """Makes calls at random until the file `stop` is there. Each step is written down before the next one."""

    name: str
    meter: Any
    secrets: dict[str, str]
    keys: Sequence[str]
    journal: int
    stop: Path
    made: int = 0
    chance: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.chance = random.Random(self.name)

    def note(self, **said: Any) -> None:
        os.write(self.journal, msgspec.json.encode(said) + b"\n")

    def note_refusal(self, call: str, error: Exception) -> None:
        said = "unavailable" if isinstance(error, StoreUnavailable) else type(error).__name__
        self.note(call=call, said=said, response=getattr(error, "response", None))

    async def work(self) -> None:
        while not self.stop.exists():
            await self.chance.choice([self.consume, self.consume, self.reserve])()

    def begin(self, line: str) -> tuple[str, int, dict[str, Any]]:
        """The name of a new call, its size, and what the meter is told."""
        self.made += 1
        call, size = f"{self.name}-{self.made}-{threading.get_ident()}", self.chance.randint(1, 20)
        account, key = self.chance.choice(list(self.secrets)), self.chance.choice([None, *self.keys])
        key = key if self.chance.random() < 0.5 else None
        self.note(call=call, account=account, line=line, key=key, tokens=size)
        told = {"api_key": self.secrets[account], "line": line, "request_id": call, "idempotency_key": key}
        return call, size, told

    async def consume(self) -> None:
        call, size, told = self.begin("consume")
        try:
            decision = await awaited(self.meter.consume(**told, usage=tokens(size), response=call))
            decision.raise_unless_admitted()
        except (StoreUnavailable, LimitExceeded, Replayed) as exc:
            self.note_refusal(call, exc)
        else:
            self.note(call=call, said="admitted")

    async def reserve(self) -> None:
        call, size, told = self.begin("reserve")
        try:
            hold = await awaited(self.meter.reserve(**told, estimate=tokens(size)))
        except (StoreUnavailable, LimitExceeded, Replayed, IdempotencyInProgress) as exc:
            self.note_refusal(call, exc)
            return
        self.note(call=call, said="held")
        if self.chance.random() < 0.2:
            self.note(call=call, released=True)
            with suppress(StoreUnavailable):
                await awaited(hold.release())
            return
        used = self.chance.randint(0, size)
        self.note(call=call, used=used)
        await awaited(hold.settle(tokens(used), response=call))
        self.note(call=call, settled=True)


async def awaited(answer: Any) -> Any:
    """What a meter answers, blocking or not."""
    return await answer if inspect.isawaitable(answer) else answer


def run_app(place: Place, kind: type, app: dict[str, Any], journal: Path) -> None:
    """The main function of an app: some threads with a `Meter`, or tasks with an `AsyncMeter`."""
    file = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        call_at_random(place, kind, app, file)
    except Exception:
        os.write(file, msgspec.json.encode({"call": "", "said": traceback.format_exc()}) + b"\n")
        raise


def call_at_random(place: Place, kind: type, app: dict[str, Any], file: int) -> None:
    meter = kind(place.ledger_url, **place.settings(TIMEOUT_S))
    running = App(meter=meter, journal=file, **app)

    def work() -> None:
        asyncio.run(note_errors(running.work))

    async def work_in_tasks() -> None:
        async with meter:
            await asyncio.gather(*(note_errors(running.work) for _ in range(TASKS)))

    async def note_errors(work: Callable[[], Any]) -> None:
        try:
            await work()
        except Exception as exc:
            running.note(call="", said=repr(exc))
            raise

    if kind is AsyncMeter:
        asyncio.run(work_in_tasks())
        return
    with meter:
        threads = [threading.Thread(target=work) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def run_drain(place: Place) -> None:
    ledger = Ledger(place.ledger_url, timeout_s=DEADLINE_S)
    Drain(ledger, Link(place.redis_url, timeout_s=TIMEOUT_S), batch=20).follow(threading.Event(), every_s=0.01)


def start(work: Callable[..., None], *arguments: Any) -> ForkProcess:
    process = fork.Process(target=work, args=arguments, daemon=True)
    process.start()
    return process


def kill(process: ForkProcess) -> None:
    assert process.exitcode in (None, 0), "it ended by itself"
    process.kill()
    process.join(DEADLINE_S)


def calls_of(journals: Sequence[Path]) -> dict[str, Call]:
    """What apps have written down, but for a line that a kill has cut short."""
    calls: dict[str, Call] = {}
    for journal in journals:
        for line in journal.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                noted = msgspec.json.decode(line)
                call = calls.setdefault(noted["call"], Call(call=noted["call"]))
                for name, value in noted.items():
                    setattr(call, name, value)
    return calls


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer(appendonly=True) as running:
        yield running


@pytest.fixture
def place(tmp_path: Path, empty_ledger: Path, server: RedisServer) -> Iterator[Place]:
    opened = Place(tmp_path, empty_ledger, server.url)
    yield opened
    opened.close()


class Round:
    """Two apps and a drain at work on a new account and on one that was there before."""

    def __init__(self, number: int, place: Place, secrets: dict[str, str]) -> None:
        self.number = number
        self.place = place
        self.account = f"account-{number}"
        self.most = (chance.randint(50, 600), chance.randint(500, 6_000))
        """Requests and tokens."""
        requests, most_tokens = self.most
        secret = place.open_account(per("month", requests), per("month", most_tokens, "tokens"), account=self.account)
        self.secrets = {**secrets, self.account: secret}
        self.stop = place.folder / f"stop-{number}"
        self.journals: list[Path] = []
        self.apps = {kind: self.start_app(kind) for kind in (Meter, AsyncMeter)}
        self.drain = start(run_drain, place)

    def start_app(self, kind: type) -> ForkProcess:
        name = f"{self.number}-{len(self.journals)}"
        app = {"name": name, "secrets": self.secrets, "stop": self.stop}
        app["keys"] = [f"{self.number}-{key}" for key in range(15)]
        self.journals.append(self.place.folder / f"journal-{name}")
        return start(run_app, self.place, kind, app, self.journals[-1])

    def go_on(self, most_s: float = 0.3) -> None:
        """Let all work for a while: from the first call of each app to a moment at random."""
        wait_until(lambda: all(journal.exists() and journal.stat().st_size for journal in self.journals), "calls")
        self.drain.join(chance.uniform(0, most_s))

    def strike(self, victim: str, server: RedisServer) -> None:
        """Kill, and start again. An app that comes back uses the keys of the one that is gone."""
        if victim in ("app", "all"):
            for kind, app in self.apps.items():
                kill(app)
                self.apps[kind] = self.start_app(kind)
        if victim in ("drain", "all"):
            kill(self.drain)
            self.drain = start(run_drain, self.place)
        if victim in ("redis", "all"):
            server.kill()
            self.drain.join(chance.choice([0, 0.5]))
            server.start()

    def errors(self) -> list[Any]:
        """What apps have written down that they did not expect."""
        lines = [line for journal in self.journals for line in journal.read_bytes().splitlines()]
        return [line for line in lines if b'"call":""' in line]

    def end(self, *, killed: bool) -> dict[str, Call]:
        """Stop the apps, or kill them, and kill the drain; what the apps have written down."""
        self.stop.touch()
        for app in self.apps.values():
            if killed:
                kill(app)
            else:
                app.join(DEADLINE_S)
                assert app.exitcode == 0, self.errors()
        kill(self.drain)
        return calls_of(self.journals)


def test_what_was_acknowledged_survives_every_kill(place: Place, server: RedisServer) -> None:
    evergreen = {EVERGREEN: place.open_account(per("minute", MOST_A_MINUTE), account=EVERGREEN)}
    known: set[str] = set()
    said: Counter[str | None] = Counter()
    for number in range(ROUNDS):
        round_ = Round(number, place, evergreen)
        for _ in range(chance.randint(1, 3)):
            round_.go_on()
            round_.strike(VICTIMS[number % len(VICTIMS)], server)
        round_.go_on()
        calls = round_.end(killed=number // len(VICTIMS) % 2 == 1)
        said.update(call.said for call in calls.values())
        place.assert_sound()
        assert set(place.states().values()) == {"open"}, f"round {number}"
        bill = {name: billed for name, billed in place.bill().items() if name not in known}
        check_calls(calls, bill, f"round {number}")
        check_limits(place, round_)
        known |= calls.keys()
    assert min(said[kind] for kind in ("admitted", "held", "Replayed")) > 0
    assert place.rows("SELECT count(*) FROM event_ids") == place.rows("SELECT count(*) FROM events")


def check_calls(calls: dict[str, Call], bill: dict[str, Billed], where: str) -> None:
    """Each call against what it comes to in the ledger, and the calls of each key together."""
    assert "" not in calls, f"{where}: {calls['']}"
    assert bill.keys() <= calls.keys(), f"{where}: never asked"
    for name, call in calls.items():
        billed, context = bill.get(name, NOTHING), f"{where}: {call}"
        net = (billed.requests, billed.tokens)
        if call.said == "admitted" or call.settled:
            assert billed == (1, call.tokens if call.used is None else call.used, 1), context
        elif call.said is None or call.used is not None:  # killed while it waited for the answer
            assert net in {(0, 0), (1, call.tokens if call.used is None else call.used)}, context
            assert call.line == "consume" or call.used is not None or billed == NOTHING, context
        elif call.said == "unavailable":
            by_others = call.key is not None  # who was answered with it: see below
            assert net == (0, 0) or (by_others and net == (1, call.tokens)), context
        else:
            assert billed == NOTHING, context
    by_key: defaultdict[tuple[str, ...], list[Call]] = defaultdict(list)
    for call in calls.values():
        if call.key is not None:
            by_key[call.account, call.line, call.key].append(call)
    for same in by_key.values():
        billed_as = [call.call for call in same if bill.get(call.call, NOTHING).requests]
        replays = {call.response for call in same if call.said == "Replayed"}
        assert len(billed_as) <= 1, f"{where}: {same}"
        assert replays <= {*billed_as}, f"{where}: {same}"
        unknown = [call for call in same if call.said == "unavailable" and call.call in billed_as]
        # Of a replay whose own answer was lost, too, nobody can tell: the next call of the key is answered with it.
        unanswered = [call for call in same if call.said in ("unavailable", None) and call not in unknown]
        assert bool(replays) or bool(unanswered) or not unknown, f"{where}: {same}"


def check_limits(place: Place, round_: Round) -> None:
    """No limit was overshot; what the apps left open is given back, and counters are then what is billed."""
    place.meter._redis.expire(utc_now() + timedelta(hours=1))  # type: ignore[union-attr]
    [(requests, total)] = place.rows(
        f"SELECT coalesce(sum(requests), 0), coalesce(sum(input_tokens), 0) FROM events "
        f"WHERE account = '{round_.account}'"
    )
    assert place.used(round_.account) == [requests, total]
    assert (requests <= round_.most[0], total <= round_.most[1]) == (True, True)
    of_minutes = place.rows(
        f"SELECT sum(requests) FROM events WHERE account = '{EVERGREEN}' GROUP BY substr(occurred_at, 1, 16)"
    )
    assert max(of_minutes, default=(0,))[0] <= MOST_A_MINUTE


class Deadly(Link):
    """A link that kills its process beside the acknowledgement of a batch: before it is sent, or after it is done."""

    def __init__(self, url: str, *, first: bool) -> None:
        super().__init__(url, timeout_s=DEADLINE_S)
        self._first = first

    def script(self, shard: int, name: str, *arguments: Any, **options: Any) -> list[Any]:
        if name == "drained" and not self._first:
            super().script(shard, name, *arguments, **options)
        if name == "drained":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().script(shard, name, *arguments, **options)


def drain_and_die(place: Place, first: bool) -> None:
    Drain(Ledger(place.ledger_url, timeout_s=DEADLINE_S), Deadly(place.redis_url, first=first)).run(polite=False)


def test_a_kill_between_commit_and_acknowledgement_gives_no_quota_back(place: Place, server: RedisServer) -> None:
    """Not more than is due, and that once: of a key that Redis had forgotten, so that it was counted twice."""
    secret = place.open_account(per("month", 10))
    shard = shard_of("acme")
    for _ in range(2):
        place.meter.consume(secret, line="a", idempotency_key="k", usage=tokens(1))
        with server.client() as client:
            client.delete(shard_key(shard, f"id:{derive_event_id('usage', 'acme', 'a', 'k').hex}"))
    for _ in range(5):
        place.meter.consume(secret, line="a", usage=tokens(1))

    def generation() -> Any:
        with server.client() as client:
            return client.hget(account_key(shard, "account", "acme"), "gen")

    before = generation()
    for _ in range(2):
        died = start(drain_and_die, place, True)
        died.join(DEADLINE_S)
        assert died.exitcode == -signal.SIGKILL
        assert (place.billed(), place.used(), generation()) == (6, [7], before)
    died = start(drain_and_die, place, False)
    died.join(DEADLINE_S)
    assert died.exitcode == -signal.SIGKILL
    assert (place.billed(), place.used()) == (6, [6])
    assert int(generation()) == int(before) + 1
    assert place.drain().inserted == 0
    assert place.used() == [6]
    assert [place.meter.consume(secret, line="a", usage=tokens(1)).allowed for _ in range(5)].count(True) == 4
    place.assert_sound()


def hold_until_killed(place: Place, secret: str, held: int) -> None:
    meter = Meter(place.ledger_url, **place.settings(DEADLINE_S), hold_ttl_s=0.5)
    for number in range(3):
        meter.reserve(secret, line="a", estimate=tokens(3), idempotency_key=f"k{number}")
    os.write(held, b"x")
    signal.pause()


def test_holds_of_a_killed_app_expire_and_give_back(place: Place) -> None:
    secret = place.open_account(per("month", 3), per("month", 9, "tokens"))
    reading, writing = os.pipe()
    app = start(hold_until_killed, place, secret, writing)
    os.read(reading, 1)
    kill(app)
    os.close(reading)
    os.close(writing)
    wait_until(lambda: place.meter.consume(secret, line="a", usage=tokens(9)).allowed, "room")
    assert place.used() == [1, 9]
    place.assert_sound()
    with pytest.raises(LimitExceeded):
        place.meter.reserve(secret, line="a", estimate=tokens(1), idempotency_key="k0")
    assert place.billed() == 1
