"""What lies in the spool is shipped: all of it, whole, in order, and by one process at a time, whoever is killed."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import resource
import signal
import threading
import time
import zlib
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pytest

from metering.errors import InvalidEvent, StoreUnavailable
from metering.spool import MAX_BATCH_BYTES, MAX_PAYLOAD_BYTES, Line, Shipped, Spool, SpoolState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import Clock

DEADLINE_S = 30

spawn = multiprocessing.get_context("spawn")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "home" / "spool"


@pytest.fixture
def spool(folder: Path) -> Iterator[Spool]:
    with_a_file = Spool(folder)
    yield with_a_file
    with_a_file.close()


def fill(spool: Spool, *texts: str, durable: bool = False) -> None:
    for text in texts:
        spool.append("settle", uuid4(), text.encode(), durable=durable)


def ship(spool: Spool) -> list[str]:
    """What was delivered."""
    texts: list[str] = []
    shipped = spool.ship(lambda lines: texts.extend(line.payload.decode() for line in lines))
    assert shipped.lines == len(texts)
    return texts


def names(folder: Path) -> list[str]:
    return sorted(path.suffix for path in folder.iterdir())


def wait_until(condition: Callable[[], bool]) -> None:
    end, pause = time.monotonic() + DEADLINE_S, threading.Event()
    while not condition():
        assert time.monotonic() < end
        pause.wait(0.002)


def in_child(work: Callable[[], Any]) -> int:
    """The id of a forked child that does the work and ends."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


def kill_myself(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def how_it_ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


PAYLOADS = [b"", b"\n", b"\n\n \n", bytes(range(256)), b"{}" * 1000, b"\x00" * 100, b"x" * MAX_PAYLOAD_BYTES]


def test_what_was_appended_is_delivered(folder: Path, clock: Clock) -> None:
    spool = Spool(folder, clock=clock)
    assert not folder.exists()
    appended = []
    for kind in ("settle", "cancel", "body", "fail_open"):
        for payload in PAYLOADS:
            event_id = uuid4()
            spool.append(kind, event_id, payload, durable=kind == "settle")
            appended.append((kind, event_id, payload, clock.advance(microseconds=1_000_001) - timedelta(seconds=1)))
    delivered: list[Line] = []
    assert spool.ship(delivered.extend) == Shipped(lines=len(appended))
    assert [(line.kind, line.event_id, line.payload) for line in delivered] == [said[:3] for said in appended]
    assert [line.at + timedelta(microseconds=1) for line in delivered] == [said[3] for said in appended]
    assert names(folder) == []
    assert spool.ship(delivered.extend) == Shipped()


def test_a_batch_has_a_limit_in_lines_and_in_bytes(spool: Spool) -> None:
    fill(spool, *map(str, range(10)))
    sizes: list[int] = []
    spool.ship(lambda lines: sizes.append(len(lines)), most=4)
    assert sizes == [4, 4, 2]
    for _ in range(10):
        spool.append("body", uuid4(), b"x" * MAX_PAYLOAD_BYTES, durable=False)
    spool.ship(lambda lines: sizes.append(len(lines)))
    assert sizes[3:] == [MAX_BATCH_BYTES // MAX_PAYLOAD_BYTES, 2]


@pytest.mark.parametrize("kind", ["", "Settle", "a b", "a\n", "ü", "x" * 33])
def test_a_kind_is_a_short_word(spool: Spool, folder: Path, kind: str) -> None:
    with pytest.raises(InvalidEvent, match="kind"):
        spool.append(kind, uuid4(), b"")
    assert not folder.exists()


def test_a_line_has_a_limit(spool: Spool, folder: Path) -> None:
    with pytest.raises(InvalidEvent, match="payload: got '1048577 bytes', expected at most 1048576"):
        spool.append("body", uuid4(), b"x" * (MAX_PAYLOAD_BYTES + 1))
    assert not folder.exists()


def test_only_the_owner_can_read_what_customers_said(spool: Spool, folder: Path) -> None:
    fill(spool, "a")
    assert [path.stat().st_mode & 0o777 for path in folder.iterdir()] == [0o600]


def test_lines_of_one_process_are_shipped_in_order_across_its_files(folder: Path, clock: Clock) -> None:
    spool = Spool(folder, clock=clock)
    for number in range(12):
        fill(spool, f"{number}a", f"{number}b")
        spool.seal()
        spool.seal()
        clock.advance(seconds=1 if number % 3 else -30)  # a wall clock may go back
    assert len(names(folder)) == 12
    assert ship(spool) == [f"{number}{letter}" for number in range(12) for letter in "ab"]


def test_threads_share_a_file(spool: Spool, folder: Path) -> None:
    go = threading.Barrier(8)

    def append_some(name: str) -> None:
        go.wait(DEADLINE_S)
        for number in range(40):
            fill(spool, f"{name} {number}", durable=number % 10 == 0)

    threads = [threading.Thread(target=append_some, args=(name,)) for name in "abcdefgh"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert names(folder) == [".open"]
    texts = ship(spool)
    assert len(texts) == 8 * 40
    for name in "abcdefgh":
        assert [text for text in texts if text.startswith(name)] == [f"{name} {number}" for number in range(40)]


def test_shipping_while_others_append_loses_and_repeats_nothing(spool: Spool) -> None:
    def append_some() -> None:
        for number in range(400):
            fill(spool, str(number))

    thread = threading.Thread(target=append_some)
    thread.start()
    texts = []
    while thread.is_alive():
        texts += ship(spool)
    texts += ship(spool)
    assert texts == [str(number) for number in range(400)]


# Damage


def three_lines(folder: Path) -> tuple[Path, bytes]:
    """A file of the lines a, b and c, each as long as the others."""
    spool = Spool(folder)
    fill(spool, "a", "b", "c")
    spool.close()
    [path] = folder.iterdir()
    data = path.read_bytes()
    assert len(data) % 3 == 0
    return path, data


def test_a_torn_last_line_is_skipped_and_set_aside(spool: Spool, folder: Path) -> None:
    path, data = three_lines(folder)
    third = len(data) // 3
    for length in range(2 * third, 3 * third):
        path.write_bytes(data[:length])
        texts: list[bytes] = []
        shipped = spool.ship(lambda lines, texts=texts: texts.extend(line.payload for line in lines))
        assert texts == [b"a", b"b"]
        torn = data[2 * third + 1 : length]
        assert shipped == Shipped(lines=2, damaged=bool(torn))
        if torn:
            aside = path.with_suffix(".damaged")
            assert aside.read_bytes() == b"\n" + torn
            aside.unlink()
        assert names(folder) == []


@pytest.mark.parametrize("change", [lambda byte: byte ^ 1, lambda byte: byte ^ 32, lambda byte: 10, lambda byte: 0])
def test_a_changed_byte_costs_its_own_line_only(spool: Spool, folder: Path, change: Callable[[int], int]) -> None:
    path, data = three_lines(folder)
    for position, byte in enumerate(data):
        if change(byte) == byte:
            continue
        path.write_bytes(data[:position] + bytes([change(byte)]) + data[position + 1 :])
        others = ["a", "b", "c"]
        del others[position * 3 // len(data)]
        assert ship(spool) == others, position
        assert names(folder) == [".damaged"]
    assert spool.pending() == SpoolState(files=0, lines=0, bytes=0, oldest=None, damaged_files=1)


def test_rubbish_of_any_length_is_set_aside_whole(spool: Spool, folder: Path) -> None:
    path, data = three_lines(folder)
    rubbish = os.urandom(3 * MAX_PAYLOAD_BYTES).replace(b"\n", b"")
    path.write_bytes(data + rubbish + data)
    assert ship(spool) == ["a", "b", "c", "a", "b", "c"]
    assert path.with_suffix(".damaged").read_bytes().replace(b"\n", b"") == rubbish


def test_a_line_that_says_something_else_is_set_aside(spool: Spool, folder: Path) -> None:
    path, _ = three_lines(folder)
    path.write_bytes(b"\n%08x %s" % (zlib.crc32(b"of another version\n"), b"of another version\n"))
    assert spool.ship(lambda lines: None) == Shipped(damaged=1)
    assert names(folder) == [".damaged"]


def test_other_files_of_the_folder_are_left_alone(spool: Spool, folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in ("notes.txt", "copy.sealed", "0-1.open"):
        (folder / name).write_text("mine")
    fill(spool, "a")
    assert ship(spool) == ["a"]
    assert len(names(folder)) == 3


# What cannot be delivered


def test_what_deliver_raises_loses_nothing(spool: Spool, folder: Path) -> None:
    def fail(lines: list[Line]) -> None:
        raise ConnectionResetError("gone")

    for number in range(20):
        fill(spool, str(number))
        with pytest.raises(ConnectionResetError, match="gone"):
            spool.ship(fail)
    assert names(folder) == [".open", ".sealed"]  # an attempt adds no file while an older one waits
    assert ship(spool) == [str(number) for number in range(20)]


def test_a_failure_in_the_middle_of_a_file_repeats_its_lines(spool: Spool) -> None:
    fill(spool, *"abcde")
    batches: list[list[str]] = []

    def fail_at_c(lines: list[Line]) -> None:
        batches.append([line.payload.decode() for line in lines])
        if "c" in batches[-1]:
            raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        spool.ship(fail_at_c, most=2)
    assert batches == [["a", "b"], ["c", "d"]]
    assert ship(spool) == ["a", "b", "c", "d", "e"]


def test_lines_that_deliver_hands_back_stay(spool: Spool, folder: Path) -> None:
    fill(spool, *"abcdefg")
    spool.seal()
    fill(spool, *"hij")

    def keep(lines: list[Line], wanted: str) -> list[Line]:
        return [line for line in lines if line.payload.decode() in wanted]

    first: list[Line] = []
    assert spool.ship(lambda lines: first.extend(lines) or keep(lines, "bdgi"), most=3) == Shipped(lines=6, kept=4)
    assert len(first) == 10
    before = {path.name: path.stat().st_ino for path in folder.iterdir()}
    assert spool.pending().lines == 4
    assert spool.ship(lambda lines: lines) == Shipped(kept=4)
    assert {path.name: path.stat().st_ino for path in folder.iterdir()} == before
    assert spool.ship(lambda lines: keep(lines, "g")) == Shipped(lines=3, kept=1)
    last: list[Line] = []
    assert spool.ship(last.extend) == Shipped(lines=1)
    assert [(line.event_id, line.payload, line.at) for line in last] == [
        (line.event_id, line.payload, line.at) for line in first if line.payload == b"g"
    ]
    assert names(folder) == []


def test_lines_are_kept_and_set_aside_from_one_file(spool: Spool, folder: Path) -> None:
    path, data = three_lines(folder)
    path.write_bytes(data.replace(b"\n", b"\r", 1))
    assert spool.ship(lambda lines: lines) == Shipped(kept=2, damaged=1)
    assert names(folder) == [".damaged", ".sealed"]
    assert spool.ship(lambda lines: lines) == Shipped(kept=2)
    assert ship(spool) == ["b", "c"]


# More than one process


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


# What cannot be written


@pytest.fixture
def longest_file() -> Iterator[Callable[[int], None]]:
    """After a call, no file of this process grows beyond so many bytes: what a full disk looks like."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN  # Python's own, so that writing fails instead
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_takes_whole_lines_only(spool: Spool, folder: Path, longest_file: Callable[[int], None]) -> None:
    large = "x" * 30_000
    fill(spool, "1" + large, durable=True)
    longest_file(64_000)
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match=rf"spool {folder}: File too large"):
            fill(spool, "2" + large)
        fill(spool, "small")
    longest_file(resource.RLIM_INFINITY)
    fill(spool, "3" + large)
    texts: list[bytes] = []
    assert spool.ship(lambda lines: texts.extend(line.payload[:5] for line in lines)) == Shipped(lines=4)
    assert texts == [b"1xxxx", b"small", b"small", b"3xxxx"]


def test_a_full_disk_keeps_what_deliver_hands_back(
    spool: Spool, folder: Path, longest_file: Callable[[int], None]
) -> None:
    fill(spool, "a", "b" * 90_000)
    longest_file(64_000)
    with pytest.raises(StoreUnavailable, match="File too large"):
        spool.ship(lambda lines: lines[1:])
    longest_file(resource.RLIM_INFINITY)
    assert ship(spool) == ["a", "b" * 90_000]
    assert names(folder) == []


def fail(*_: Any) -> None:
    raise OSError(5, "Input/output error")


def test_a_line_that_cannot_be_made_durable_is_taken_back(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(spool, "a", durable=True)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StoreUnavailable, match="Input/output error"):
        fill(spool, "b", durable=True)
    fill(spool, "c")
    assert ship(spool) == ["a", "c"]


def test_a_line_that_cannot_be_taken_back_is_not_continued(
    spool: Spool, folder: Path, longest_file: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "ftruncate", fail)
    fill(spool, "a")
    longest_file(64_000)
    with pytest.raises(StoreUnavailable, match="File too large"):
        fill(spool, "b" * 90_000)
    fill(spool, "c")
    assert names(folder) == [".open", ".open"]
    longest_file(resource.RLIM_INFINITY)
    texts: list[Line] = []
    assert spool.ship(texts.extend) == Shipped(lines=2, damaged=1)
    assert [line.payload for line in texts] == [b"a", b"c"]


def test_a_folder_that_cannot_be_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "spool").write_text("a file")
    spool = Spool(tmp_path / "spool")
    for use in (lambda: fill(spool, "a"), lambda: ship(spool), spool.pending):
        with pytest.raises(StoreUnavailable, match=rf"spool {tmp_path}/spool"):
            use()


def test_a_signal_handler_in_the_middle_of_an_append_is_refused_not_left_waiting(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = []

    def interrupted(descriptor: int) -> None:
        for use in (spool.close, spool.seal, lambda: fill(spool, "b")):
            with pytest.raises(StoreUnavailable, match="in the middle of a write"):
                use()
            refused.append(use)

    fill(spool, "a")
    monkeypatch.setattr(os, "fsync", interrupted)
    fill(spool, "c", durable=True)
    assert len(refused) == 3
    assert ship(spool) == ["a", "c"]


# The state, and the end


def test_what_waits_is_counted(spool: Spool, folder: Path, clock: Clock) -> None:
    nothing = SpoolState(files=0, lines=0, bytes=0, oldest=None, damaged_files=0)
    assert spool.pending() == nothing
    first, second = Spool(folder, clock=clock), Spool(folder, clock=lambda: clock() + timedelta(hours=1))
    fill(second, "a")
    fill(first, "b", "c")
    first.seal()
    clock.advance(days=1)
    fill(first, "d\n")
    state = spool.pending()
    assert state == SpoolState(
        files=3,
        lines=4,
        bytes=sum(path.stat().st_size for path in folder.iterdir()),
        oldest=datetime(2026, 3, 12, 12, tzinfo=UTC),
        damaged_files=0,
    )
    assert ship(first) == ["b", "c", "d\n"]
    assert spool.pending().oldest == datetime(2026, 3, 12, 13, tzinfo=UTC)
    assert ship(second) == ["a"]
    assert spool.pending() == nothing


def test_closing_seals_and_ships_nothing(spool: Spool, folder: Path) -> None:
    spool.close()
    fill(spool, "a")
    spool.close()
    spool.close()
    assert names(folder) == [".sealed"]
    fill(spool, "b")
    assert ship(spool) == ["a", "b"]


def test_a_file_without_a_line_is_deleted(spool: Spool, folder: Path, longest_file: Callable[[int], None]) -> None:
    longest_file(10)
    with pytest.raises(StoreUnavailable):
        fill(spool, "a")
    longest_file(resource.RLIM_INFINITY)
    assert ship(spool) == []
    assert names(folder) == [".open"]
    assert spool.pending().files == 0
    spool.close()
    assert names(folder) == []


def test_the_folder_stays_the_same_when_the_process_changes_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = Spool(Path("spool"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    fill(spool, "a")
    assert names(tmp_path / "spool") == [".open"]
    assert ship(spool) == ["a"]
