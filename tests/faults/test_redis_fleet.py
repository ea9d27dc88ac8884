"""Many processes, tasks and threads on one Redis: limits stay exact, and the ledger has what was admitted."""

from __future__ import annotations

import asyncio
import multiprocessing
import random
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from redis import crc

from metering.admission.redis import epochs
from metering.admission.redis.keys import shard_key, shard_of
from metering.admission.redis.wire import OutcomeUnknown
from metering.aio import AsyncMeter
from metering.clock import utc_now
from metering.drain import Drained
from metering.errors import IdempotencyInProgress, LimitExceeded, Replayed, StoreUnavailable
from metering.meter import Meter
from metering.windows import period_window
from tests.faults.redis_place import PATIENT_S, Place, in_threads, per, tokens
from tests.servers import SLOTS, RedisCluster, RedisServer, flavours

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from tests.conftest import Clock

PROCESSES, TASKS, THREADS, RACERS = 4, 50, 8, 8
DEADLINE_S = 30

spawn = multiprocessing.get_context("spawn")
fork = multiprocessing.get_context("fork")
go: Any = None
"""In a process of the pool: what all wait at before they begin."""


class Ask(NamedTuple):
    """A call to be made. Without tokens it has no usage."""

    secret: str
    tokens: int | None = None


class There(NamedTuple):
    """What processes share. `at`: a clock that stands still, instead of the server's own."""

    ledger_url: str
    quota_url: str
    at: datetime | None

    def open(self, kind: Callable[..., Any]) -> Any:
        """A meter there."""
        clock = utc_now if self.at is None else partial(_same, self.at)
        return kind(self.ledger_url, quota_url=self.quota_url, quota_timeout_s=PATIENT_S, clock=clock)


def _same(at: datetime) -> datetime:
    return at


def know(barrier: Any) -> None:
    global go  # noqa: PLW0603
    go = barrier


async def ask_in_tasks(there: There, asks: Sequence[Ask]) -> list[bool]:
    """Whether each was admitted; TASKS tasks ask, once all processes are let go."""
    waiting = iter(enumerate(asks))
    answers = [False] * len(asks)

    async def work() -> None:
        for number, ask in waiting:
            usage = None if ask.tokens is None else tokens(ask.tokens)
            answers[number] = (await meter.consume(ask.secret, line="a", usage=usage)).allowed

    async with there.open(AsyncMeter) as meter:
        go.wait(DEADLINE_S)
        await asyncio.gather(*(work() for _ in range(TASKS)))
    return answers


def ask_in_process(there: There, asks: Sequence[Ask]) -> list[bool]:
    return asyncio.run(ask_in_tasks(there, asks))


def race_one_key(answers: Any, start: Any, index: int, there: There, verb: str, secret: str) -> None:
    """Sends what became of a call that all make at once, what it was answered, and by whom."""
    named: dict[str, Any] = {"line": "a", "idempotency_key": "k", "request": "same"}
    with there.open(Meter) as meter:
        meter.quota("acme")
        start.wait(DEADLINE_S)
        try:
            if verb == "consume":
                meter.consume(secret, response=index, **named).raise_unless_admitted()
            else:
                with meter.reserve(secret, estimate=tokens(9), **named) as hold:
                    hold.settle(tokens(5), response=index)
        except IdempotencyInProgress:
            answers.put(("in progress", None))
        except Replayed as replayed:
            answers.put(("replayed", replayed.response))
        else:
            answers.put(("admitted", index))


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(PROCESSES, spawn, know, (spawn.Barrier(PROCESSES),)) as pool:
        yield pool


@pytest.fixture
def open_place(tmp_path: Path, empty_ledger: Path) -> Iterator[Callable[..., Place]]:
    opened: list[Place] = []

    def open_one(redis_url: str, **options: Any) -> Place:
        opened.append(Place(tmp_path, empty_ledger, redis_url, **options))
        return opened[-1]

    yield open_one
    for place in opened:
        place.close()


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer() as running:
        yield running


@pytest.fixture
def place(open_place: Callable[..., Place], server: RedisServer) -> Place:
    return open_place(server.url)


def ask_all(
    processes: ProcessPoolExecutor, place: Place, asks: Sequence[Ask], at: datetime | None = None
) -> list[tuple[Ask, bool]]:
    """Each ask with its answer. PROCESSES processes share them."""
    there = There(place.ledger_url, place.redis_url, at)
    shares = [asks[index::PROCESSES] for index in range(PROCESSES)]
    running = [processes.submit(ask_in_process, there, share) for share in shares]
    answers = [future.result(DEADLINE_S) for future in running]
    return [pair for share, answer in zip(shares, answers, strict=True) for pair in zip(share, answer, strict=True)]


def admitted_of(answers: list[tuple[Ask, bool]]) -> list[Ask]:
    return [ask for ask, is_admitted in answers if is_admitted]


def assert_in_ledger(place: Place, admitted: int) -> None:
    """After a drain the ledger has each admission once, and counters are what was recorded before it and after."""
    place.assert_sound()
    for table in ("events", "event_ids"):
        assert place.rows(f"SELECT count(*) FROM {table}") == [(admitted,)]
    assert place.drain() == Drained()


@pytest.mark.parametrize(
    ("flavour", "most"), [(name, 1_000 if later else 5_000) for later, name in enumerate(flavours())]
)
def test_a_fleet_admits_exactly_the_limit(
    processes: ProcessPoolExecutor, open_place: Callable[..., Place], flavour: str, most: int
) -> None:
    with RedisServer(flavour) as server:
        place = open_place(server.url)
        secret = place.open_account(per("month", most))
        answers = ask_all(processes, place, [Ask(secret)] * (most + 600))
        assert len(admitted_of(answers)) == most
        assert place.used() == [most]
        assert_in_ledger(place, most)


def test_of_three_windows_the_tightest_decides_exactly(
    processes: ProcessPoolExecutor, open_place: Callable[..., Place], server: RedisServer, clock: Clock
) -> None:
    """First the minute is full, in the next minute the day, and on the next day the month."""
    place = open_place(server.url, clock=clock)
    secret = place.open_account(per("minute", 5_000), per("day", 5_300), per("month", 5_450))
    for later, admitted, used in (
        (timedelta(), 5_000, [5_000, 5_000, 5_000]),
        (timedelta(minutes=1), 300, [300, 5_300, 5_300]),
        (timedelta(days=1), 150, [150, 150, 5_450]),
        (timedelta(days=1), 0, [0, 0, 5_450]),
    ):
        clock.now += later
        answers = ask_all(processes, place, [Ask(secret)] * (admitted + 300), clock.now)
        assert len(admitted_of(answers)) == admitted
        assert place.used() == used
    assert_in_ledger(place, 5_450)


def test_limits_per_key_and_per_account_hold_at_once(processes: ProcessPoolExecutor, place: Place) -> None:
    """The keys could have 1,500 together, and the account has 1,200."""
    secrets = [place.open_account(per("month", 1_200), per("month", 500, scope="key"))]
    secrets += [place.meter.keys.create("acme").secret for _ in range(2)]
    asks = [Ask(secret) for secret in secrets for _ in range(550)]
    random.Random(4).shuffle(asks)
    admitted = Counter(ask.secret for ask in admitted_of(ask_all(processes, place, asks)))
    assert admitted.total() == 1_200
    assert max(admitted.values()) <= 500
    assert_in_ledger(place, 1_200)


def test_sizes_at_random_fill_a_limit_of_tokens(processes: ProcessPoolExecutor, place: Place) -> None:
    """What is left is less than the smallest ask that was refused: none was while it would have fitted."""
    secret = place.open_account(per("month", 1_000_000, "tokens"))
    chance = random.Random(5)
    answers = ask_all(processes, place, [Ask(secret, chance.randint(1, 2_000)) for _ in range(1_600)])
    total = sum(ask.tokens or 0 for ask in admitted_of(answers))
    assert place.used() == [total]
    assert 0 <= 1_000_000 - total < min(ask.tokens or 0 for ask, is_admitted in answers if not is_admitted)
    assert_in_ledger(place, len(admitted_of(answers)))
    assert place.meter.usage("acme")[0].input_tokens == total


def test_threads_admit_exactly_the_limit(place: Place) -> None:
    secret = place.open_account(per("month", 1_500))
    answers: list[bool] = []
    in_threads(lambda _: answers.extend(place.meter.consume(secret, line="a").allowed for _ in range(225)), THREADS)
    assert Counter(answers) == {True: 1_500, False: 300}
    assert_in_ledger(place, 1_500)


def test_threads_that_hold_more_than_they_use_fill_the_limit(place: Place) -> None:
    """Refused is only what others still hold, or what is left for good."""
    secret = place.open_account(per("month", 10_000, "tokens"))
    settled: list[int] = []
    refusals: list[LimitExceeded] = []

    def work(index: int) -> None:
        while True:
            try:
                with place.meter.reserve(secret, line="a", estimate=tokens(100)) as hold:
                    hold.settle(tokens(60))
            except LimitExceeded as exc:
                refusals.append(exc)
                if exc.used % 60 == 0:  # nobody holds 100
                    return
            else:
                settled.append(60)

    in_threads(work, THREADS)
    assert all(10_000 - 100 < refusal.used <= 10_000 for refusal in refusals)
    assert place.used() == [sum(settled)]
    assert 10_000 - 100 < sum(settled) <= 10_000
    assert_in_ledger(place, len(settled))


def test_a_cluster_admits_exactly_the_limits(processes: ProcessPoolExecutor, open_place: Callable[..., Place]) -> None:
    """Accounts on all three nodes, one of them with a name that looks like a hash tag."""
    names = ["{m0}", *(f"account-{number}" for number in range(5))]
    nodes = {crc.key_slot(shard_key(shard_of(name), "shard").encode()) * 3 // SLOTS for name in names}
    assert nodes == {0, 1, 2}
    with RedisCluster() as cluster:
        place = open_place(cluster.url)
        asks = [Ask(place.open_account(per("month", 200), account=name)) for name in names] * 300
        admitted = Counter(ask.secret for ask in admitted_of(ask_all(processes, place, asks)))
        assert list(admitted.values()) == [200] * len(names)
        assert_in_ledger(place, 200 * len(names))


@pytest.mark.parametrize("verb", ["consume", "reserve"])
def test_processes_that_race_one_key_make_one_event(place: Place, verb: str) -> None:
    secret = place.open_account(per("month", 100))
    arguments = (There(place.ledger_url, place.redis_url, None), verb, secret)
    answers, start = fork.SimpleQueue(), fork.Barrier(RACERS)
    running = [
        fork.Process(target=race_one_key, args=(answers, start, index, *arguments), daemon=True)
        for index in range(RACERS)
    ]
    for process in running:
        process.start()
    found = [answers.get() for _ in running]
    for process in running:
        process.join(DEADLINE_S)
    assert [process.exitcode for process in running] == [0] * RACERS
    [winner] = [by for outcome, by in found if outcome == "admitted"]
    others = {answer for answer in found if answer != ("admitted", winner)}
    assert others <= {("replayed", winner)} | ({("in progress", None)} if verb == "reserve" else set())
    assert place.used() == [1]
    assert_in_ledger(place, 1)


# What meets at the worst moment: made to happen, because it seldom does by itself.


def at(monkeypatch: pytest.MonkeyPatch, meter: Meter, script: str, do: Callable[[], object]) -> None:
    """Do something right before `meter` next sends a script."""
    link, left = meter._redis.link, [do]  # type: ignore[union-attr]
    send = link.script

    def sending(shard: int, name: str, *arguments: Any, **options: Any) -> Any:
        if name == script and left:
            left.pop()()
        return send(shard, name, *arguments, **options)

    monkeypatch.setattr(link, "script", sending)


def test_two_processes_may_open_a_shard_at_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = place.open_account(per("month", 10))
    first, second = place.open_meter(), place.open_meter()
    known_of = epochs.known_of

    def known_before(*arguments: Any) -> Any:
        known = known_of(*arguments)
        monkeypatch.setattr(epochs, "known_of", known_of)
        assert second.consume(secret, line="a").allowed
        return known

    monkeypatch.setattr(epochs, "known_of", known_before)
    assert first.consume(secret, line="a").allowed
    assert_in_ledger(place, 2)


def test_a_thread_may_learn_of_newer_counters_while_another_names_them(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = place.open_account(per("month", 1))
    assert place.meter.consume(secret, line="a").allowed
    late = place.open_meter()
    copies_of: dict[str, Any] = late._redis._verbs._copies  # type: ignore[union-attr]
    ours: Any = place.meter._redis._verbs._copies["acme"]  # type: ignore[union-attr]

    def agreeing_meanwhile(*arguments: Any, **options: Any) -> Any:
        copies_of["acme"].agree(ours.epoch, ours.gen)
        return period_window(*arguments, **options)

    monkeypatch.setattr("metering.admission.redis.copies.period_window", agreeing_meanwhile)
    assert not late.consume(secret, line="a").allowed
    assert_in_ledger(place, 1)


def test_a_busy_key_does_not_keep_a_new_one_from_being_counted(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = place.open_account(per("month", 100), per("month", 10, scope="key"))
    place.meter.consume(secret, line="a")
    new, late = place.meter.keys.create("acme").secret, place.open_meter()
    link = late._redis.link  # type: ignore[union-attr]
    send, counts = link.script, []

    def sending(shard: int, name: str, *arguments: Any, **options: Any) -> Any:
        if name == "count":
            counts.append(place.meter.consume(secret, line="a").allowed)
        return send(shard, name, *arguments, **options)

    monkeypatch.setattr(link, "script", sending)
    assert late.consume(new, line="a").allowed
    assert counts == [True]
    assert_in_ledger(place, 3)


def test_a_hold_that_ends_while_it_is_counted_is_counted_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = place.open_account(per("month", 10, "tokens"), per("month", 10))
    holds = [place.meter.reserve(secret, line="a", estimate=tokens(3)) for _ in range(3)]
    place.set_plan("acme", per("month", 12, "tokens"), per("month", 10))
    late = place.open_meter()
    at(monkeypatch, late, "count", lambda: (holds[0].settle(tokens(1)), holds[1].release()))
    assert not late.consume(secret, line="a", usage=tokens(9)).allowed
    assert late.consume(secret, line="a", usage=tokens(8)).allowed
    holds[2].settle(tokens(2))
    assert place.used() == [11, 3]
    assert_in_ledger(place, 3)


def test_a_call_without_an_answer_is_undone_although_its_shard_is_being_rebuilt(
    place: Place, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = place.open_account(per("month", 10))
    place.meter.consume(secret, line="a")
    late = place.open_meter()
    late.quota("acme")
    link = late._redis.link  # type: ignore[union-attr]
    send = link.script

    def losing_the_answer(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(link, "script", send)
        send(*arguments, **options)
        with server.client() as client:  # as a rebuild begins
            client.hset(shard_key(shard_of("acme"), "shard"), "fenced", "rebuild")
        raise OutcomeUnknown("lost")

    monkeypatch.setattr(link, "script", losing_the_answer)
    with pytest.raises(StoreUnavailable):
        late.consume(secret, line="a")
    assert place.rebuild() == [shard_of("acme")]
    place.deliver()
    assert (place.billed(), place.used()) == (1, [1])
    place.assert_sound()
