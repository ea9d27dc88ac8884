"""Each line is shipped once, whichever processes share the folder, fork or are killed."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pytest

from metering.spool import Line, Shipped, Spool
from tests.metering.spool.place import (
    DEADLINE_S,
    fill,
    how_it_ended,
    in_child,
    kill_myself,
    names,
    ship,
    three_lines,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


spawn = multiprocessing.get_context("spawn")


def test_a_file_in_use_is_not_taken(spool: Spool, folder: Path) -> None:
    fill(spool, "a")
    assert ship(Spool(folder)) == []
    spool.close()
    assert ship(Spool(folder)) == ["a"]


def test_later_files_wait_while_another_ships_an_earlier_one(spool: Spool, folder: Path) -> None:
    fill(spool, "a")
    spool.seal()
    fill(spool, "b")
    other = Spool(folder)
    fill(other, "c")
    earlier = min(folder.iterdir())
    with earlier.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        spool.seal()
        assert ship(other) == ["c"]
        assert ship(spool) == []
    assert ship(other) == ["a", "b"]


def ship_all(folder: Path, go: Any, answers: Any) -> None:
    spool, delivered = Spool(folder), []
    go.wait(DEADLINE_S)
    while spool.pending().files:
        spool.ship(lambda lines: delivered.extend(line.event_id for line in lines), most=3)
    answers.send(delivered)


def test_two_shippers_deliver_each_line_once(spool: Spool, folder: Path) -> None:
    for number in range(60):
        fill(spool, *"abcdefghij")
        spool.seal()
        if not number % 10:
            assert how_it_ended(in_child(lambda: fill(spool, *"abcdefghij"))) == 0
    go, deliveries, processes = spawn.Barrier(2), [], []
    for _ in range(2):
        answer, told = spawn.Pipe(duplex=False)
        process = spawn.Process(target=ship_all, args=(folder, go, told), daemon=True)
        process.start()
        told.close()
        processes.append((process, answer))
    for process, answer in processes:
        assert answer.poll(DEADLINE_S)
        deliveries += answer.recv()
        process.join(DEADLINE_S)
        assert process.exitcode == 0
    assert len(deliveries) == len(set(deliveries)) == 660
    assert names(folder) == []


def test_a_killed_process_loses_no_line_whose_append_returned(spool: Spool, folder: Path) -> None:
    reading, writing = os.pipe()

    def append_for_ever() -> None:
        while True:
            event_id = uuid4()
            spool.append("settle", event_id, event_id.bytes * 20)
            os.write(writing, event_id.bytes)

    child = in_child(append_for_ever)
    os.close(writing)
    with os.fdopen(reading, "rb") as told:
        acknowledged = told.read(16 * 100)
        os.kill(child, signal.SIGKILL)
        acknowledged += told.read()
    assert how_it_ended(child) == -signal.SIGKILL
    lines: list[Line] = []
    spool.ship(lines.extend)
    returned = [UUID(bytes=acknowledged[at : at + 16]) for at in range(0, len(acknowledged), 16)]
    assert [line.event_id for line in lines][: len(returned)] == returned
    assert len(lines) - len(returned) <= 1
    assert all(line.payload == line.event_id.bytes * 20 for line in lines)


@pytest.mark.parametrize("at", ["first batch", "last batch", "before the rest is kept", "before the file is deleted"])
def test_a_killed_shipper_loses_nothing(spool: Spool, folder: Path, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(spool, *"abcdefghij")
    spool.close()
    reading, writing = os.pipe()

    def deliver(lines: list[Line]) -> list[Line]:
        os.write(writing, b"".join(line.event_id.bytes for line in lines if line.payload != b"d"))
        if at == "first batch" or (at == "last batch" and lines[-1].payload == b"j"):
            kill_myself()
        return [line for line in lines if line.payload == b"d" and at != "before the file is deleted"]

    if at.startswith("before"):
        monkeypatch.setattr(Path, "replace" if at == "before the rest is kept" else "unlink", kill_myself)
    child = in_child(lambda: spool.ship(deliver, most=4))
    os.close(writing)
    monkeypatch.undo()
    with os.fdopen(reading, "rb") as told:
        first = told.read()
    assert how_it_ended(child) == -signal.SIGKILL
    assert names(folder) == ([".rest", ".sealed"] if at == "before the rest is kept" else [".sealed"])
    seen = Counter(UUID(bytes=first[at : at + 16]) for at in range(0, len(first), 16))
    assert max(seen.values()) == 1
    second: list[Line] = []
    assert spool.ship(second.extend) == Shipped(lines=10)
    assert [line.payload for line in second] == [letter.encode() for letter in "abcdefghij"]
    assert len({line.event_id for line in second} | seen.keys()) == 10
    assert names(folder) == []


@pytest.fixture
def pipes() -> Iterator[tuple[int, int, int, int]]:
    """Read end and write end of what a child says, then of what lets it go on."""
    ends = (*os.pipe(), *os.pipe())
    yield ends
    for end in ends:
        os.close(end)


def test_a_dead_parents_file_is_shipped_while_its_child_lives(
    spool: Spool, folder: Path, pipes: tuple[int, int, int, int]
) -> None:
    said, say, waiting, go = pipes

    def append_and_fork() -> None:
        os.close(go)
        fill(spool, "before")
        child = os.fork()
        fill(spool, *[f"{'parent' if child else 'child'} {number}" for number in range(100)])
        if child:
            kill_myself()
        os.write(say, b".")
        os.read(waiting, 1)

    assert how_it_ended(in_child(append_and_fork)) == -signal.SIGKILL
    assert os.read(said, 1) == b"."
    assert names(folder) == [".open", ".open"]
    assert ship(spool) == ["before", *[f"parent {number}" for number in range(100)]]
    assert spool.pending().lines == 100
    os.write(go, b".")
    texts: list[str] = []
    wait_until(lambda: texts.extend(ship(spool)) or bool(texts))
    assert texts == [f"child {number}" for number in range(100)]
    assert names(folder) == []


def test_a_file_that_a_dead_parent_was_shipping_is_shipped_while_its_child_lives(
    spool: Spool, folder: Path, pipes: tuple[int, int, int, int]
) -> None:
    said, say, waiting, go = pipes
    fill(spool, "a", "b")
    spool.close()

    def fork_in_the_middle(lines: list[Line]) -> None:
        if os.fork():
            os.read(waiting, 1)
            kill_myself()
        os.write(say, b".")
        os.read(waiting, 1)
        os._exit(0)

    def ship_and_fork() -> None:
        os.close(go)
        spool.ship(fork_in_the_middle)

    parent = in_child(ship_and_fork)
    assert os.read(said, 1) == b"."
    assert ship(spool) == []
    os.kill(parent, signal.SIGKILL)
    assert how_it_ended(parent) == -signal.SIGKILL
    assert ship(spool) == ["a", "b"]
    os.write(go, b".")


@pytest.mark.filterwarnings("ignore:.*is multi-threaded, use of fork:DeprecationWarning")  # that is what is tested
def test_a_fork_while_other_threads_append(spool: Spool, folder: Path) -> None:
    stop = threading.Event()
    appended = []

    def append_some() -> None:
        while not stop.is_set():
            fill(spool, "thread")
            appended.append(1)

    def append_in_a_thread() -> None:
        thread = threading.Thread(target=fill, args=(spool, "child"), daemon=True)
        thread.start()
        thread.join(DEADLINE_S)

    thread = threading.Thread(target=append_some)
    thread.start()
    try:
        children = [in_child(append_in_a_thread) for _ in range(20)]
        assert [how_it_ended(child) for child in children] == [0] * 20
    finally:
        stop.set()
        thread.join(DEADLINE_S)
    assert Counter(ship(spool)) == {"thread": len(appended), "child": 20}


def replaced_at_lock(monkeypatch: pytest.MonkeyPatch, path_of: Callable[[], Path], data: bytes | None) -> None:
    """Somebody puts another file, or none, in the place of one between its opening and its locking."""
    flock = fcntl.flock

    def replace_first(file: Any, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        path = path_of()
        path.unlink()
        if data is not None:
            path.write_bytes(data)
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", replace_first)


def test_a_file_that_was_shipped_before_it_was_locked_is_not_shipped_again(
    spool: Spool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, data = three_lines(folder)
    replaced_at_lock(monkeypatch, lambda: path, data[: len(data) // 3])
    assert ship(spool) == ["a"]  # at its second look, what is there now
    path.write_bytes(data)
    replaced_at_lock(monkeypatch, lambda: path, None)
    assert ship(spool) == []


def test_a_new_file_that_a_shipper_deleted_is_not_appended_to(
    spool: Spool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced_at_lock(monkeypatch, lambda: next(folder.iterdir()), None)
    fill(spool, "a")
    assert ship(spool) == ["a"]


def test_nothing_is_appended_to_a_deleted_file(spool: Spool, folder: Path) -> None:
    fill(spool, "a")
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    fill(spool, "b")
    for path in folder.iterdir():
        path.unlink()
    fill(spool, "c")
    assert ship(spool) == ["c"]
