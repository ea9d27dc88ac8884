"""Group commit: everyone is answered, with the truth, whatever happens to the one who commits."""

from __future__ import annotations

import linecache
import re
import signal
import sqlite3
import sys
import threading
import time
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest

from metering.errors import StoreUnavailable
from metering.ledger import forks as forks_module
from metering.ledger import writer as writer_module
from metering.ledger.forks import Gate
from metering.ledger.transactions import SqliteDriver, _SqliteTransaction
from metering.ledger.writer import MAX_GROUP, Writer, _Job

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

DEADLINE_S = 20.0


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < end
        pause.wait(0.001)


def insert(number: int) -> Callable[[sqlite3.Cursor], int]:
    def work(cursor: sqlite3.Cursor) -> int:
        cursor.execute("INSERT INTO numbers VALUES (?)", (number,))
        return number

    return work


def failing(number: int, error: BaseException) -> Callable[[sqlite3.Cursor], int]:
    def work(cursor: sqlite3.Cursor) -> int:
        insert(number)(cursor)
        raise error

    return work


class Crowd:
    """Threads that call one writer: a leader that stays at work until let go, and others behind it."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.answers: dict[str, Any] = {}
        self.at_work, self.go = threading.Event(), threading.Event()
        self.threads: list[threading.Thread] = []

    def call(self, name: str, work: Callable[[sqlite3.Cursor], Any]) -> None:
        def run() -> None:
            try:
                self.answers[name] = self.writer.run(work)
            except BaseException as exc:  # noqa: BLE001  whatever it is, it is the answer
                self.answers[name] = exc

        self.threads.append(threading.Thread(target=run))
        self.threads[-1].start()

    def lead(self, then: Callable[[sqlite3.Cursor], Any] | None = None) -> None:
        def work(cursor: sqlite3.Cursor) -> Any:
            self.at_work.set()
            assert self.go.wait(DEADLINE_S)
            return (then or insert(0))(cursor)

        self.call("leader", work)
        assert self.at_work.wait(DEADLINE_S)

    def queue(self, name: str, work: Callable[[sqlite3.Cursor], Any]) -> None:
        before = len(self.writer._queue)
        self.call(name, work)
        wait_until(lambda: len(self.writer._queue) == before + 1)

    def disperse(self) -> dict[str, Any]:
        self.go.set()
        for thread in self.threads:
            thread.join(DEADLINE_S)
        assert not any(thread.is_alive() for thread in self.threads)
        return self.answers


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "x.db"
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE numbers (number UNIQUE)")
    connection.close()
    return path


@pytest.fixture
def open_writer(path: Path) -> Iterator[Callable[[float], Writer]]:
    opened: list[Writer] = []

    def open_one(timeout_s: float = DEADLINE_S) -> Writer:
        opened.append(Writer(SqliteDriver(path), timeout_s=timeout_s, gate=Gate()))
        return opened[-1]

    yield open_one
    for writer in opened:
        writer.close()


@pytest.fixture
def writer(open_writer: Callable[[], Writer]) -> Writer:
    return open_writer()


def kept(path: Path) -> list[int]:
    connection = sqlite3.connect(path)
    numbers = [number for (number,) in connection.execute("SELECT number FROM numbers ORDER BY number")]
    connection.close()
    return numbers


def test_a_lone_work_is_committed_or_not_at_all(writer: Writer, path: Path) -> None:
    assert writer.run(insert(1)) == 1
    with pytest.raises(KeyError):
        writer.run(failing(2, KeyError("no")))
    with pytest.raises(StoreUnavailable, match="UNIQUE"):
        writer.run(insert(1))
    assert writer.run(insert(3)) == 3
    assert kept(path) == [1, 3]


def test_a_group_shares_a_commit_and_each_has_its_own_answer(writer: Writer, path: Path) -> None:
    crowd = Crowd(writer)
    crowd.lead()
    crowd.queue("first", insert(1))
    crowd.queue("second", failing(2, KeyError("own error")))
    crowd.queue("third", insert(3))
    answers = crowd.disperse()
    assert (answers["leader"], answers["first"], answers["third"]) == (0, 1, 3)
    assert isinstance(answers["second"], KeyError)
    assert kept(path) == [0, 1, 3]


def test_a_database_error_in_a_group_is_told_to_all_of_it(writer: Writer, path: Path) -> None:
    crowd = Crowd(writer)
    crowd.lead()
    crowd.queue("first", insert(1))
    crowd.queue("second", insert(1))
    answers = crowd.disperse()
    assert answers["leader"] == 0
    assert all(isinstance(answers[name], StoreUnavailable) for name in ("first", "second"))
    assert kept(path) == [0]
    assert writer.run(insert(2)) == 2


def test_a_crowd_larger_than_a_group_is_served_to_the_last(writer: Writer, path: Path) -> None:
    crowd = Crowd(writer)
    crowd.lead()
    for number in range(1, MAX_GROUP + 20):
        crowd.queue(str(number), insert(number))
    answers = crowd.disperse()
    assert sorted(answers.values()) == kept(path) == list(range(MAX_GROUP + 20))


def test_who_waits_too_long_for_a_turn_is_told_and_is_not_run_later(
    open_writer: Callable[[float], Writer], path: Path
) -> None:
    crowd = Crowd(open_writer(0.1))
    crowd.lead()
    crowd.call("late", insert(1))
    wait_until(lambda: "late" in crowd.answers)
    answers = crowd.disperse()
    assert str(answers["late"]) == f"ledger {path}: no turn to write within 0.1 s"
    assert isinstance(answers["late"], StoreUnavailable)
    assert kept(path) == [0]


def test_an_interrupt_in_the_leader_stops_no_one_else(writer: Writer, path: Path) -> None:
    crowd = Crowd(writer)
    crowd.lead(failing(0, KeyboardInterrupt()))
    crowd.queue("first", insert(1))
    answers = crowd.disperse()
    assert isinstance(answers["leader"], KeyboardInterrupt)
    assert answers["first"] == 1
    assert kept(path) == [1]


def test_an_interrupt_in_a_group_is_the_leader_s_alone(writer: Writer, path: Path) -> None:
    interrupts = iter([KeyboardInterrupt()])

    def once(cursor: sqlite3.Cursor) -> int:
        for interrupt in interrupts:
            raise interrupt
        return insert(2)(cursor)

    crowd = Crowd(writer)
    crowd.lead()
    crowd.queue("first", insert(1))
    crowd.queue("second", once)
    answers = crowd.disperse()
    assert answers["leader"] == 0
    told = sorted((answers[name] for name in ("first", "second")), key=lambda answer: isinstance(answer, int))
    assert isinstance(told[0], KeyboardInterrupt)
    assert kept(path) == [0, told[1]]
    assert writer.run(insert(3)) == 3


class _InterruptedAfterCommit(_SqliteTransaction):
    """Python delivers a signal that arrived during the commit right after it."""

    def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
        result = super().execute(sql, *arguments)
        if sql == "COMMIT":
            raise KeyboardInterrupt
        return result


def test_an_interrupt_after_the_commit_does_not_deny_it(
    writer: Writer, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crowd = Crowd(writer)
    crowd.lead()
    crowd.queue("first", insert(1))
    crowd.queue("second", insert(2))
    connection = writer._connection
    assert connection is not None
    writer._connection = Interrupting(connection)  # type: ignore[assignment]
    answers = crowd.disperse()
    told = [answers[name] for name in ("first", "second")]
    assert sum(isinstance(answer, KeyboardInterrupt) for answer in told) == 1, "who led"
    assert sum(answer in (1, 2) for answer in told) == 1
    assert kept(path) == [0, 1, 2]


class Interrupting:
    """A connection whose next group is interrupted after its commit."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def cursor(self, factory: type[_SqliteTransaction]) -> _SqliteTransaction:
        assert issubclass(_InterruptedAfterCommit, factory)
        return self._connection.cursor(_InterruptedAfterCommit)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


def test_an_interrupt_while_queued_leaves_the_line_moving(writer: Writer, path: Path) -> None:
    crowd = Crowd(writer)
    crowd.lead()

    def interrupt_main() -> None:
        wait_until(lambda: len(writer._queue) == 1)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    helper = threading.Thread(target=interrupt_main)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        helper.start()
        with pytest.raises(KeyboardInterrupt):
            writer.run(insert(1))
    finally:
        signal.signal(signal.SIGINT, before)
    helper.join(DEADLINE_S)
    assert crowd.disperse() == {"leader": 0}
    assert kept(path) == [0]
    assert writer.run(insert(2)) == 2


def test_a_leader_out_of_time_costs_the_others_nothing(writer: Writer, path: Path) -> None:
    other_process = sqlite3.connect(path, isolation_level=None)
    other_process.execute("BEGIN IMMEDIATE")
    leader: _Job[Any] = _Job(insert(1), time.monotonic() + 0.05)
    behind: _Job[Any] = _Job(insert(2), time.monotonic() + DEADLINE_S)
    writer._queue.extend([leader, behind])

    writer._lead(leader)

    with pytest.raises(StoreUnavailable):
        writer._answer(leader)
    assert list(writer._queue) == [behind]
    other_process.rollback()
    other_process.close()
    writer._lead(behind)
    assert writer._answer(behind) == 2
    assert kept(path) == [2]


def test_a_signal_handler_that_writes_in_the_middle_of_a_commit_is_refused(writer: Writer, path: Path) -> None:
    def work(cursor: sqlite3.Cursor) -> int:
        with pytest.raises(StoreUnavailable, match="a signal handler"):
            writer.run(insert(1))
        return insert(2)(cursor)

    assert writer.run(work) == 2
    assert kept(path) == [2]


_RELEASES = re.compile(r"_turn\.release\(\)|noqa: SIM105|finally:")


def test_interrupts_at_any_line_hang_nobody_and_lie_to_nobody(writer: Writer, path: Path) -> None:
    """A tracer interrupts the main thread at every line of the writer and the gate in turn, while others write."""
    modules = {writer_module.__file__, forks_module.__file__}
    acknowledged: list[int] = []
    numbers = count(1)
    stop = threading.Event()

    def others() -> None:
        while not stop.is_set():
            acknowledged.append(writer.run(insert(next(numbers))))

    threads = [threading.Thread(target=others) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for nth in range(1, 160):
            lines = count(1)

            def trace(frame: Any, event: str, argument: object, *, nth: int = nth, lines: Any = lines) -> Any:
                if frame.f_code.co_filename not in modules:
                    return None
                line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
                # CPython looks for signals when a function begins, a call returns or a loop goes round: not before
                # the first call of a `finally`.
                if event == "line" and not _RELEASES.search(line) and next(lines) == nth:
                    sys.settrace(None)
                    raise KeyboardInterrupt
                return trace

            number = next(numbers)
            sys.settrace(trace)
            try:
                acknowledged.append(writer.run(insert(number)))
            except KeyboardInterrupt:
                pass
            finally:
                sys.settrace(None)
    finally:
        stop.set()
        for thread in threads:
            thread.join(DEADLINE_S)
    assert not any(thread.is_alive() for thread in threads)
    assert writer.run(insert(0)) == 0
    assert set(acknowledged) <= set(kept(path))
    assert len(acknowledged) == len(set(acknowledged))


def test_a_gate_keeps_out_who_comes_and_waits_for_who_is_inside() -> None:
    gate = Gate()
    inside, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with gate:
            inside.set()
            with gate:
                assert leave.wait(DEADLINE_S)

    staying = threading.Thread(target=stay)
    staying.start()
    assert inside.wait(DEADLINE_S)
    assert not gate.shut(0.01)
    entered = threading.Event()

    def enter() -> None:
        with gate:
            entered.set()

    entering = threading.Thread(target=enter)
    entering.start()
    leave.set()
    staying.join(DEADLINE_S)
    assert gate.shut(DEADLINE_S)
    assert not entered.wait(0.05)
    gate.open()
    assert entered.wait(DEADLINE_S)
    entering.join(DEADLINE_S)
