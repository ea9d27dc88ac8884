"""Real processes on one ledger: limits stay exact, one key is one fact, and what was answered is there."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from metering.admission.verify import check_counters
from metering.errors import IdempotencyInProgress
from metering.ledger import Ledger
from metering.ledger.schema import metadata
from metering.meter import Meter
from metering.plans import BUILT_IN

if TYPE_CHECKING:
    from collections.abc import Callable

PROCESSES = 8
DEADLINE_S = 60
TIMEOUT_S = 30.0

spawn = multiprocessing.get_context("spawn")
fork = multiprocessing.get_context("fork")


def open_meter(url: str) -> Meter:
    return Meter(url, timeout_s=TIMEOUT_S)


def run_all(context: Any, work: Callable[..., None], *arguments: Any) -> list[Any]:
    """What each of PROCESSES sent, after all have started and been let go at once."""
    answers, go = context.SimpleQueue(), context.Barrier(PROCESSES)
    running = [
        context.Process(target=work, args=(answers, go, index, *arguments), daemon=True) for index in range(PROCESSES)
    ]
    for process in running:
        process.start()
    for process in running:
        process.join(DEADLINE_S)
    assert [process.exitcode for process in running] == [0] * PROCESSES
    return [answers.get() for _ in running]


def consume_many(answers: Any, go: Any, index: int, url: str, secret: str, times: int) -> None:
    with open_meter(url) as meter:
        go.wait(DEADLINE_S)
        answers.put(Counter(meter.consume(secret, line="a").allowed for _ in range(times)))


def consume_once(meter: Meter, secret: str, index: int) -> tuple[str, Any]:
    try:
        decision = meter.consume(secret, line="a", idempotency_key="k", request="same", response={"by": index})
    except IdempotencyInProgress:
        return "in progress", None
    return ("replayed", decision.response) if decision.replayed else ("admitted", {"by": index})


def race_one_key(answers: Any, go: Any, index: int, url: str, secret: str) -> None:
    with open_meter(url) as meter:
        go.wait(DEADLINE_S)
        answers.put(consume_once(meter, secret, index))


def create_ledger(answers: Any, go: Any, index: int, url: str, plans: str) -> None:
    go.wait(DEADLINE_S)
    with Meter(url, plans=Path(plans), timeout_s=TIMEOUT_S) as meter:
        key = meter.keys.create(f"account-{index}", plan="pro")
        answers.put((meter.ledger.is_new, meter.consume(key.secret, line="a").plan_version))


def consume_until_killed(answers: Any, url: str, secret: str) -> None:
    meter = open_meter(url)
    while True:
        decision = meter.consume(secret, line="a", idempotency_key=os.urandom(8).hex())
        os.write(answers, decision.event_id.bytes)


def assert_sound(meter: Meter) -> None:
    assert [check for check in check_counters(meter.ledger) if not check.agrees] == []
    with meter.ledger.read() as connection:
        assert connection.exec_driver_sql("PRAGMA integrity_check").scalar_one() == "ok"
        assert connection.exec_driver_sql("SELECT count(*) FROM event_ids").scalar_one() == count_events(meter)


def count_events(meter: Meter) -> int:
    with meter.ledger.read() as connection:
        return int(connection.exec_driver_sql("SELECT count(*) FROM events").scalar_one())


@pytest.fixture
def real(ledger_url: str) -> Any:
    """A meter on the wall clock with an account on the free plan: 1,000 requests a month."""
    with open_meter(ledger_url) as meter:
        yield meter, ledger_url, meter.keys.create("acme", plan="free").secret


def test_processes_admit_exactly_the_limit(real: Any) -> None:
    meter, url, secret = real
    answers = sum(run_all(spawn, consume_many, url, secret, 200), Counter())
    assert answers == {True: 1_000, False: 600}
    assert count_events(meter) == 1_000
    assert meter.quota("acme")[0].used == 1_000
    assert_sound(meter)


def assert_one_winner(meter: Meter, answers: list[tuple[str, Any]]) -> None:
    outcomes = Counter(outcome for outcome, _ in answers)
    assert outcomes["admitted"] == 1
    assert outcomes["replayed"] + outcomes["in progress"] == PROCESSES - 1
    [won] = [response for outcome, response in answers if outcome == "admitted"]
    assert all(response == won for outcome, response in answers if outcome == "replayed")
    assert (count_events(meter), meter.quota("acme")[0].used) == (1, 1)
    assert_sound(meter)


def test_processes_that_race_one_key_make_one_event(real: Any) -> None:
    meter, url, secret = real
    assert_one_winner(meter, run_all(fork, race_one_key, url, secret))


def test_threads_that_race_one_key_make_one_event(real: Any) -> None:
    meter, _, secret = real
    answers: list[tuple[str, Any]] = []
    go = threading.Barrier(PROCESSES)

    def work(index: int) -> None:
        go.wait(DEADLINE_S)
        answers.append(consume_once(meter, secret, index))

    in_threads(work)
    assert_one_winner(meter, answers)


def test_threads_admit_exactly_the_limit(real: Any) -> None:
    meter, _, secret = real
    answers: list[bool] = []
    in_threads(lambda _: answers.extend(meter.consume(secret, line="a").allowed for _ in range(150)))
    assert Counter(answers) == {True: 1_000, False: 200}
    assert count_events(meter) == 1_000
    assert_sound(meter)


def in_threads(work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(index,)) for index in range(PROCESSES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert not any(thread.is_alive() for thread in threads)


def test_processes_create_a_ledger_at_once(tmp_path: Path) -> None:
    plans = tmp_path / "plans.toml"
    plans.write_text('[plans.pro]\nretention_days = 1\nlimits = [{ metric = "requests", per = "day", max = 5 }]\n')
    url = f"sqlite:///{tmp_path}/new/ledger.db"

    answers = run_all(spawn, create_ledger, url, str(plans))

    assert [is_new for is_new, _ in answers].count(True) == 1
    assert len({plan_version for _, plan_version in answers}) == 1, "all on the file's plan, never on the built-in one"
    with open_meter(url) as meter:
        assert len(meter.accounts.list()) == PROCESSES
        assert meter.quota("account-3")[0].max == 5 != BUILT_IN["pro"].limits[0].max
        with meter.ledger.read() as connection:
            assert connection.exec_driver_sql("SELECT count(*) FROM plan_versions").scalar_one() == 1
            assert connection.exec_driver_sql("SELECT count(*) FROM ledger_info").scalar_one() == 1
            tables = connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'table'").scalars().all()
        assert set(tables) - {"alembic_version", "sqlite_sequence"} == set(metadata.tables)


def child_of_fork(answers: Any, go: Any, index: int, meter: Meter, secret: str) -> None:
    go.wait(DEADLINE_S)
    answers.put(Counter(meter.consume(secret, line="a").allowed for _ in range(100)))


@pytest.mark.parametrize("busy_threads", [0, 3])
def test_a_forked_meter_counts_on(real: Any, busy_threads: int, caplog: pytest.LogCaptureFixture) -> None:
    """Also where threads of the parent are in the middle of a commit while it forks."""
    meter, _, secret = real
    in_parent: list[bool] = [meter.consume(secret, line="a").allowed]
    done = threading.Event()

    def work() -> None:
        while not done.is_set():
            in_parent.append(meter.consume(secret, line="a").allowed)
            meter.quota("acme")

    threads = [threading.Thread(target=work) for _ in range(busy_threads)]
    for thread in threads:
        thread.start()
    try:
        in_children = sum(run_all(fork, child_of_fork, meter, secret), Counter())
    finally:
        done.set()
        for thread in threads:
            thread.join(DEADLINE_S)
    in_parent += [meter.consume(secret, line="a").allowed for _ in range(250)]
    assert caplog.text == "", "no fork went ahead with a connection in use"
    assert in_children.total() == 100 * PROCESSES
    assert in_children[True] + in_parent.count(True) == 1_000 == count_events(meter)
    assert_sound(meter)


def test_a_child_outlives_the_meter_of_its_parent(real: Any) -> None:
    """SQLite deletes the write-ahead log when the last process it knows of closes: it must know of the child."""
    meter, url, secret = real
    meter.consume(secret, line="a")
    closed, has_closed = os.pipe()
    child = os.fork()
    if not child:
        os.close(has_closed)
        try:
            meter.consume(secret, line="a")
            os.read(closed, 1)
            outcome = sum(meter.consume(secret, line="a").allowed for _ in range(100))
            os._exit(0 if outcome == 100 else 1)
        finally:
            os._exit(2)
    meter.close()
    os.close(has_closed)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with open_meter(url) as anew:
        assert count_events(anew) == 102
        assert_sound(anew)


def test_a_child_leaves_the_holds_of_its_parent_alone(real: Any) -> None:
    meter, _, secret = real
    with meter.reserve(secret, line="a") as hold:
        child = os.fork()
        if not child:
            try:
                with meter.reserve(secret, line="a") as own:
                    own.settle()
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert not hold.settle().late
    assert meter.quota("acme")[0].used == 2


def test_a_child_waits_for_no_lock_of_a_thread_it_does_not_have(real: Any) -> None:
    meter, _, secret = real
    held, leave = threading.Event(), threading.Event()

    def hold_locks() -> None:
        with meter._keeper._wake, meter.ledger.writer._turn:
            held.set()
            leave.wait(DEADLINE_S)

    hold = meter.reserve(secret, line="a").__enter__()
    holder = threading.Thread(target=hold_locks)
    holder.start()
    assert held.wait(DEADLINE_S)
    child = os.fork()
    if not child:
        try:
            signal.alarm(DEADLINE_S)
            with meter.reserve(secret, line="a") as own:
                own.settle()
            hold.settle()
            os._exit(0)
        finally:
            os._exit(1)
    leave.set()
    holder.join(DEADLINE_S)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert hold.settle().repeated
    assert meter.quota("acme")[0].used == 2


def test_what_was_answered_before_a_kill_is_in_the_ledger(ledger_url: str) -> None:
    with open_meter(ledger_url) as meter:
        secret = meter.keys.create("acme", plan="enterprise").secret
        answered: list[bytes] = []
        for victims in range(3):
            reading, writing = os.pipe()
            running = [
                fork.Process(target=consume_until_killed, args=(writing, ledger_url, secret), daemon=True)
                for _ in range(3)
            ]
            for process in running:
                process.start()
            os.close(writing)
            answered += [os.read(reading, 16) for _ in range(40 + 7 * victims)]
            for process in running:
                os.kill(process.pid, signal.SIGKILL)
            for process in running:
                process.join(DEADLINE_S)
            while last := os.read(reading, 16):
                answered.append(last)
            os.close(reading)
        with meter.ledger.read() as connection:
            kept = set(connection.exec_driver_sql("SELECT event_id FROM events").scalars())
        missing = {event_id.hex() for event_id in answered} - kept
        assert missing == set()
        assert len(answered) >= 120
        assert len(kept) <= len(answered) + 9, "at most one unanswered call for each killed process"
        assert_sound(meter)
        assert meter.consume(secret, line="a").allowed


def test_the_ledger_is_usable_after_a_kill_in_a_transaction(real: Any) -> None:
    meter, url, secret = real
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with Ledger(url, timeout_s=TIMEOUT_S).write() as connection:
            connection.exec_driver_sql("DELETE FROM api_keys")
            os.write(writing, b"x")
            signal.pause()
    os.read(reading, 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reading)
    os.close(writing)
    assert meter.consume(secret, line="a").allowed
    assert_sound(meter)
