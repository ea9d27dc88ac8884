"""What lies in the spool is shipped: all of it, whole, in order, and by one process at a time, whoever is killed."""

from __future__ import annotations

import os
import resource
import threading
import zlib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from metering.errors import InvalidEvent, StoreUnavailable
from metering.spool import MAX_BATCH_BYTES, MAX_PAYLOAD_BYTES, Line, Shipped, Spool, SpoolState
from tests.metering.spool.place import (
    DEADLINE_S,
    fill,
    names,
    ship,
    three_lines,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Clock


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
