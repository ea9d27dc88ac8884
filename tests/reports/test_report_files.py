from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from reports.files import write_atomically

if TYPE_CHECKING:
    from pathlib import Path


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_text_is_written_as_utf_8_with_its_line_ends(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a.csv", "é\r\n")
    assert (tmp_path / "a.csv").read_bytes() == b"\xc3\xa9\r\n"


def test_bytes_replace_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"a longer old content")
    write_atomically(target, b"\x00new")
    assert target.read_bytes() == b"\x00new"
    assert names_in(tmp_path) == ["a.bin"]


def test_until_all_is_on_disk_a_reader_sees_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    seen = []
    monkeypatch.setattr(os, "fsync", lambda fd: seen.append(target.read_text()))
    write_atomically(target, "new")
    assert seen == ["old", "new"]  # the file's own fsync, then its folder's


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")

    def disk_full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(target, "new")
    assert target.read_text() == "old"
    assert names_in(tmp_path) == ["a.txt"]


def test_a_target_that_cannot_be_replaced_leaves_no_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write_atomically(tmp_path / "folder", "text")
    assert names_in(tmp_path) == ["folder"]


def test_the_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("")
    write_atomically(tmp_path / "a.txt", "")
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "plain.txt").stat().st_mode
