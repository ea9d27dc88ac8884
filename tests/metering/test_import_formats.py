"""Files of every kind, and files that are broken: read to the last good row, or refused in one line."""

from __future__ import annotations

import json
import random
import shutil
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from metering.errors import InvalidFile
from metering.importing import readers

if TYPE_CHECKING:
    from collections.abc import Callable

HEADER = "occurred_at,account,line,input_tokens,quantity"
ROW = {"occurred_at": "2023-11-16T18:17:03Z", "account": "acme", "line": "chat", "input_tokens": 812, "quantity": "0.5"}
ROWS = [ROW | {"input_tokens": count} for count in range(1, 8)]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n".join([HEADER, *(",".join(map(str, row.values())) for row in rows), ""]))


def write_json_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)


WRITERS = {".csv": write_csv, ".jsonl": write_json_lines, ".ndjson": write_json_lines, ".parquet": write_parquet}


def write(text: str | bytes, name: str = "usage.csv") -> Path:
    path = Path(name)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def used(tallystick: Callable[..., Any], account: str = "acme") -> tuple[int, int, str]:
    answer = tallystick("usage", account, "--json")
    if answer.status:
        return 0, 0, "0"
    (total,) = answer.json
    return total["requests"], total["input_tokens"], total["quantity"]


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_the_same_usage(tallystick: Callable[..., Any], suffix: str) -> None:
    path = Path(f"usage{suffix}")
    WRITERS[suffix](path, ROWS)
    for inserted in (7, 0):
        answer = tallystick("import", path, "--plan", "pro", "--json")
        assert (answer.status, answer.json[0]["rows"], answer.json[0]["inserted"]) == (0, 7, inserted)
        assert used(tallystick) == (7, 28, "3.5")


def test_a_file_may_be_shouted(tallystick: Callable[..., Any]) -> None:
    write_csv(Path("USAGE.CSV"), ROWS)
    assert tallystick("import", "USAGE.CSV", "--plan", "pro").status == 0


def test_csv_with_a_mark_quotes_blank_lines_and_crlf(tallystick: Callable[..., Any]) -> None:
    write(f'\ufeff{HEADER}\r\n\r\n2023-11-16,acme,"chat, ""x""\nand y",1,\r\n\r\n2023-11-16,acme,chat,2,\r\n')
    answer = tallystick("import", "usage.csv", "--plan", "pro", "--json")
    (report,) = answer.json
    assert (report["rows"], report["inserted"], report["rejected"]) == (2, 1, 1)
    assert "'chat, \"x\"\\nand y', expected printable" in Path(report["rejects_file"]).read_text().replace('""', '"')


def test_json_lines_keep_every_digit_of_a_quantity(tallystick: Callable[..., Any]) -> None:
    write(json.dumps(ROW).replace('"0.5"', "12345678901234567.123456789012"), "usage.jsonl")
    assert tallystick("import", "usage.jsonl", "--plan", "pro").status == 0
    assert used(tallystick)[2] == "12345678901234567.123456789012"


def test_a_column_that_only_later_json_lines_have_is_read(
    tallystick: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "JSON_ROWS_LOOKED_AT", 1)
    write_json_lines(Path("usage.jsonl"), [ROW, ROW | {"output_tokens": 5}])
    assert tallystick("import", "usage.jsonl", "--plan", "pro").status == 0
    assert tallystick("usage", "acme", "--json").json[0]["output_tokens"] == 5


@pytest.mark.parametrize("name", ["empty.jsonl", "blank.jsonl", "header.csv", "none.parquet"])
def test_a_file_without_rows_is_fine(tallystick: Callable[..., Any], name: str) -> None:
    write({"empty.jsonl": "", "blank.jsonl": "\n\n", "header.csv": HEADER}.get(name, ""), name)
    if name == "none.parquet":
        parquet.write_table(pa.Table.from_pylist([ROW]).slice(0, 0), name)
    answer = tallystick("import", name, "--map", "input_tokens=input_tokens", "--plan", "pro", "--json")
    assert (answer.status, answer.json[0]["rows"]) == (0, 0)


@pytest.mark.parametrize("kind", ["s", "ms", "us", "ns"])
def test_parquet_timestamps_of_every_unit(tallystick: Callable[..., Any], kind: str) -> None:
    times = pa.array([1_700_000_000], pa.timestamp("s")).cast(pa.timestamp(kind, "Asia/Kolkata"))
    parquet.write_table(pa.table({"occurred_at": times, "account": [b"acme"], "line": ["chat"]}), "usage.parquet")
    assert tallystick("import", "usage.parquet", "--plan", "pro").status == 0
    assert tallystick("usage", "acme", "--by", "day", "--json").json[0]["group"] == "2023-11-14"


GOOD = f"{HEADER}\n2023-11-16,acme,chat,1,\n2023-11-16,acme,chat,2,\n"

BROKEN = {
    "unclosed quote": (GOOD + '2023-11-16,acme,"chat,3,\n2023-11-16,acme,chat,4,\n', "the row that begins on line 4"),
    "text after a quote": (GOOD + '2023-11-16,acme,"chat"s,3,\n', "the row that begins on line 4"),
    "not UTF-8": (GOOD.encode() + b"2023-11-16,acm\xe9,chat,3,\n", "line 4 is not UTF-8"),
    "endless cell": (GOOD + "2023-11-16,acme," + "x" * (readers.MAX_CELL + 1), "field larger than field limit"),
}


@pytest.mark.parametrize("flaw", BROKEN)
def test_rows_before_a_break_are_kept_and_it_is_said_where(tallystick: Callable[..., Any], flaw: str) -> None:
    text, expected = BROKEN[flaw]
    write(text)
    answer = tallystick("import", "usage.csv", "--plan", "pro", "--json")
    assert (answer.status, answer.json) == (1, [])
    assert answer.err.startswith("error: usage.csv: ")
    assert expected in answer.err
    assert answer.err.endswith("; the rows before it were imported\n")
    assert used(tallystick) == (2, 3, "0")


def test_a_mended_file_only_adds_what_was_missing(tallystick: Callable[..., Any]) -> None:
    write(GOOD + '2023-11-16,acme,"chat,3,\n')
    tallystick("import", "usage.csv", "--plan", "pro")
    write(GOOD + "2023-11-16,acme,chat,3,\n")
    (report,) = tallystick("import", "usage.csv", "--json").json
    assert (report["inserted"], report["known"]) == (1, 2)


def test_an_endless_line_is_refused_before_it_fills_the_memory(
    tallystick: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "MAX_LINE", 1_000)
    write(json.dumps(ROW) + "\n" + "[" * 1_001, "usage.jsonl")
    answer = tallystick("import", "usage.jsonl", "--plan", "pro")
    assert "line 2 has more than 1,000 bytes" in answer.err
    assert used(tallystick)[0] == 1


WITHOUT_ROWS = {
    "empty.csv": ("", "is empty, expected a header line"),
    "twice.csv": ("occurred_at,account,line,account\n", "two columns are named 'account'"),
    "quote.csv": ('"occurred_at,account\n', "line 1: unexpected end of data"),
    "utf16.csv": (GOOD.encode("utf-16"), "line 1 is not UTF-8"),
    "noise.parquet": (random.Random(1).randbytes(5_000), "is not a readable Parquet file"),
    "empty.parquet": ("", "is not a readable Parquet file"),
    "usage.xlsx": ("PK", "unknown suffix '.xlsx', expected one of .csv, .jsonl, .ndjson, .parquet"),
    "usage": ("PK", "unknown suffix ''"),
}


@pytest.mark.parametrize("name", WITHOUT_ROWS)
def test_what_is_no_usage_file_is_refused_in_one_line(tallystick: Callable[..., Any], name: str) -> None:
    content, expected = WITHOUT_ROWS[name]
    write(content, name)
    answer = tallystick("import", name, "--plan", "pro")
    assert (answer.status, answer.out, answer.err.count("\n")) == (1, "", 1)
    assert answer.err.startswith(f"error: {name}: {expected}")
    assert tallystick("accounts", "list", "--json").json == []


def test_a_folder_and_a_missing_file_are_refused(tallystick: Callable[..., Any]) -> None:
    Path("folder.csv").mkdir()
    assert tallystick("import", "folder.csv").err == "error: folder.csv: cannot be read: Is a directory\n"
    assert tallystick("import", "missing").err == "error: missing: cannot be read: No such file or directory\n"


def test_a_truncated_or_corrupt_parquet_file_never_gives_a_traceback() -> None:
    write_parquet(Path("good.parquet"), [ROW | {"input_tokens": count, "account": "a" * count} for count in range(60)])
    good = Path("good.parquet").read_bytes()
    chance = random.Random(7)
    refused = 0
    for attempt in range(150):
        damaged = bytearray(good)
        if attempt % 3:
            for _ in range(3):
                damaged[chance.randrange(len(good))] ^= 1 << chance.randrange(8)
        else:
            del damaged[chance.randrange(len(good)) :]
        path = write(bytes(damaged), "damaged.parquet")
        try:
            with readers.open_rows(path) as reader:
                assert sum(1 for _ in reader.rows) <= 60
        except InvalidFile:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize(
    "column",
    [
        pa.array([2**62], pa.timestamp("us")),
        pa.array([1], pa.timestamp("us", "Nowhere/Land")),
        pa.array([b"\xff"]).view(pa.string()),
    ],
    ids=["year 148,000", "unknown zone", "text that is none"],
)
def test_parquet_values_that_python_has_not_are_refused(tallystick: Callable[..., Any], column: Any) -> None:
    good = pa.table({"occurred_at": ["2023-11-16"], "account": ["acme"], "line": ["chat"]})
    parquet.write_table(good.append_column("spoilt", column), "usage.parquet")
    answer = tallystick("import", "usage.parquet", "--plan", "pro")
    assert (answer.status, answer.err.count("\n")) == (1, 1)
    assert answer.err.startswith("error: usage.parquet: breaks off after row 0: ")


def test_two_parquet_columns_of_one_name_are_refused(tallystick: Callable[..., Any]) -> None:
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["account", "account"])
    parquet.write_table(table, "usage.parquet")
    assert "two columns are named 'account'" in tallystick("import", "usage.parquet").err


@pytest.mark.parametrize("suffix", WRITERS)
def test_rows_are_read_only_when_they_are_asked_for(suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "JSON_ROWS_LOOKED_AT", 1)
    monkeypatch.setattr(readers, "PARQUET_ROWS_AT_ONCE", 100)
    path = Path(f"long{suffix}")
    WRITERS[suffix](path, [ROW] * 20_000 if suffix != ".parquet" else [ROW] * 1_000)
    with readers.open_rows(path) as reader:
        row = next(reader.rows)
        assert (row.number, row.values["account"], str(row.values["input_tokens"])) == (1, "acme", "812")
        assert 0 < row.progress < 0.05
        assert [row.progress for row in reader.rows][-1] == 1


def test_a_quantity_may_be_any_kind_of_number_in_parquet(tallystick: Callable[..., Any]) -> None:
    table = pa.Table.from_pylist([{key: ROW[key] for key in ("occurred_at", "account", "line")}])
    for number, kind in enumerate((pa.float64(), pa.int32(), pa.decimal128(30, 3))):
        amount = pa.array([2]).cast(kind)
        parquet.write_table(table.append_column("quantity", amount), f"usage{number}.parquet")
        assert tallystick("import", f"usage{number}.parquet", "--plan", "pro").status == 0
    assert Decimal(used(tallystick)[2]) == 6


def test_the_file_is_never_written(tallystick: Callable[..., Any]) -> None:
    write(GOOD + "2023-11-16,acme,chat,-1,\n")
    shutil.copy("usage.csv", "copy.csv")
    for _ in range(2):
        tallystick("import", "usage.csv", "--plan", "pro", "--rejects", ".")
    assert Path("usage.csv").read_bytes() == Path("copy.csv").read_bytes()
