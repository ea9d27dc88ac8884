"""What cannot be written is refused whole, and leaves what was written."""

from __future__ import annotations

import os
import resource
from typing import TYPE_CHECKING, Any

import pytest

from metering.errors import StoreUnavailable
from metering.spool import Line, Shipped, Spool
from tests.metering.spool.place import (
    fill,
    names,
    ship,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


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
