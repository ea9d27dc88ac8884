"""The writer on its own, asked by tasks: one commit for many, and each has its own answer."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from typing import TYPE_CHECKING

import pytest

from metering.errors import StoreUnavailable
from metering.ledger.forks import Gate
from metering.ledger.transactions import SqliteDriver
from metering.ledger.writer import MAX_GROUP, Writer
from tests.metering.loops import DEADLINE_S, on_a_loop, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Writer]:
    path = tmp_path / "x.db"
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE numbers (number UNIQUE)")
    connection.close()
    writer = Writer(SqliteDriver(path), timeout_s=DEADLINE_S, gate=Gate())
    yield writer
    writer.close()


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


class Busy:
    """A work that stays at it until it is let go."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, cursor: sqlite3.Cursor) -> int:
        self.begun.set()
        assert self.go.wait(DEADLINE_S)
        return insert(0)(cursor)


def kept(writer: Writer) -> list[int]:
    return writer.run(lambda cursor: [number for (number,) in cursor.execute("SELECT number FROM numbers ORDER BY 1")])


@on_a_loop
async def test_what_was_begun_stands_though_its_task_is_cancelled(writer: Writer) -> None:
    busy = Busy()
    begun = asyncio.create_task(writer.run_async(busy))
    await until(busy.begun.is_set)
    behind = asyncio.create_task(writer.run_async(insert(1)))
    withdrawn = asyncio.create_task(writer.run_async(insert(2)))
    await asyncio.sleep(0)
    begun.cancel()
    withdrawn.cancel()
    await asyncio.wait([begun, withdrawn])
    assert begun.cancelled()
    assert withdrawn.cancelled()
    busy.go.set()
    assert await behind == 1
    assert await asyncio.to_thread(kept, writer) == [0, 1]


@on_a_loop
async def test_who_waits_behind_a_long_work_is_told_in_time(writer: Writer) -> None:
    writer._timeout_s = 0.05
    busy = Busy()
    long = asyncio.create_task(writer.run_async(busy))
    await until(busy.begun.is_set)
    with pytest.raises(StoreUnavailable, match=r"no turn to write within 0\.05 s"):
        await writer.run_async(insert(1))
    await asyncio.sleep(0.01)
    assert not long.done(), "what was begun has its own outcome, however long it takes"
    busy.go.set()
    assert await long == 0
    writer._timeout_s = DEADLINE_S
    assert await asyncio.to_thread(kept, writer) == [0]


@on_a_loop
async def test_each_of_a_group_has_its_own_answer(writer: Writer) -> None:
    busy = Busy()
    tasks = [asyncio.create_task(writer.run_async(busy))]
    await until(busy.begun.is_set)
    works = [insert(1), failing(2, KeyError("own error")), insert(3), lambda _: 1 // 0]
    tasks += [asyncio.create_task(writer.run_async(work)) for work in works]
    await asyncio.sleep(0)
    busy.go.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [repr(answer) for answer in answers] == [
        "0", "1", "KeyError('own error')", "3", "ZeroDivisionError('integer division or modulo by zero')"
    ]  # fmt: skip
    assert await asyncio.to_thread(kept, writer) == [0, 1, 3]


@on_a_loop
async def test_a_database_error_and_an_exit_are_told_to_all_of_a_group(writer: Writer) -> None:
    for worst, expected in ((insert(1), StoreUnavailable), (failing(2, GeneratorExit()), GeneratorExit)):
        busy = Busy()
        first = asyncio.create_task(writer.run_async(busy))
        await until(busy.begun.is_set)
        tasks = [asyncio.create_task(writer.run_async(work)) for work in (insert(1), worst)]
        await asyncio.sleep(0)
        busy.go.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(answer) for answer in answers] == [expected] * 2
        assert await first == 0
        await asyncio.to_thread(writer.run, lambda cursor: cursor.execute("DELETE FROM numbers"))
    assert await writer.run_async(insert(5)) == 5


@on_a_loop
async def test_a_crowd_larger_than_a_group_is_served_to_the_last(writer: Writer) -> None:
    numbers = range(2 * MAX_GROUP + 5)
    assert await asyncio.gather(*(writer.run_async(insert(number)) for number in numbers)) == list(numbers)


@on_a_loop
async def test_the_worker_ends_when_nobody_asks_and_comes_back(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metering.ledger.writer.IDLE_S", 0.001)
    for number in range(20):
        assert await writer.run_async(insert(number)) == number
        if number % 2:
            await until(lambda: writer._worker is None)
    monkeypatch.setattr("metering.ledger.writer.IDLE_S", DEADLINE_S)
    assert await writer.run_async(insert(20)) == 20
    worker = writer._worker
    assert worker is not None
    writer.close()
    await until(lambda: not worker.is_alive())
    assert await writer.run_async(insert(21)) == 21


def test_threads_and_loops_share_a_writer(writer: Writer) -> None:
    acknowledged: list[int] = []
    stop = threading.Event()

    def by_thread(start: int) -> None:
        number = start
        while not stop.is_set():
            acknowledged.append(writer.run(insert(number)))
            number += 1

    async def by_tasks() -> None:
        async def one(start: int) -> None:
            for number in range(start, start + 50):
                acknowledged.append(await writer.run_async(insert(number)))  # noqa: PERF401

        await asyncio.gather(*(one(number * 1_000) for number in range(1, 9)))

    threads = [threading.Thread(target=by_thread, args=(start * 1_000_000,)) for start in (1, 2)]
    for thread in threads:
        thread.start()
    try:
        asyncio.run(asyncio.wait_for(by_tasks(), DEADLINE_S))
    finally:
        stop.set()
        for thread in threads:
            thread.join(DEADLINE_S)
    assert not any(thread.is_alive() for thread in threads)
    assert sorted(acknowledged) == kept(writer)
