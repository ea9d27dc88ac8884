"""Files as rows: CSV, JSON lines and Parquet, one row at a time, whatever their size."""

from __future__ import annotations

import csv
import os
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from typing import IO, TYPE_CHECKING, Any

import msgspec

from metering.errors import InvalidFile

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["RawRow", "Reader", "open_rows"]

MAX_CELL = 1024 * 1024
MAX_LINE = 16 * 1024 * 1024
JSON_ROWS_LOOKED_AT = 1_000
PARQUET_ROWS_AT_ONCE = 8_192

_ROWS_KEPT = "the rows before it were imported"
# A quantity keeps every digit; a float would keep 17.
_decode = msgspec.json.Decoder(float_hook=Decimal).decode


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as the file has it. `problem` says why it could not be read."""

    number: int
    """Counts from 1, the header not counted."""
    values: dict[str, Any]
    progress: float
    """Share of the file read so far, 0 to 1."""
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Reader:
    """An open file."""

    columns: list[str]
    rows: Iterator[RawRow]
    open_ended: bool = False
    """JSON lines: `columns` are those of the first rows, and later ones may have more."""


@contextmanager
def open_rows(path: Path) -> Iterator[Reader]:
    """Open a file by its suffix: .csv, .jsonl or .ndjson, .parquet. Raises `InvalidFile`."""
    try:
        file = path.open("rb")
    except OSError as exc:
        raise InvalidFile(path, f"cannot be read: {exc.strerror}") from exc
    openers = {".csv": _open_csv, ".jsonl": _open_json_lines, ".ndjson": _open_json_lines, ".parquet": _open_parquet}
    with file:
        opener = openers.get(path.suffix.lower())
        if opener is None:
            raise InvalidFile(path, f"unknown suffix {path.suffix!r}, expected one of {', '.join(openers)}")
        yield opener(path, file)


class _Lines:
    """Lines of a UTF-8 file, and how many bytes of it they were."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self._path = path
        self._file = file
        self._size = max(os.fstat(file.fileno()).st_size, 1)
        self._read = 0

    @property
    def progress(self) -> float:
        """Share of the file read so far."""
        return self._read / self._size

    def __iter__(self) -> Iterator[str]:
        for number, line in enumerate(iter(lambda: self._file.readline(MAX_LINE + 1), b""), 1):
            self._read += len(line)
            if len(line) > MAX_LINE:
                raise InvalidFile(self._path, f"line {number} has more than {MAX_LINE:,} bytes; {_ROWS_KEPT}")
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as exc:
                raise InvalidFile(self._path, f"line {number} is not UTF-8; {_ROWS_KEPT}") from exc


def _open_csv(path: Path, file: IO[bytes]) -> Reader:
    csv.field_size_limit(MAX_CELL)
    lines = _Lines(path, file)
    table = csv.reader(iter(lines), strict=True)
    try:
        header = next(table, None)
    except csv.Error as exc:
        raise InvalidFile(path, f"line 1: {exc}") from exc
    if header is None:
        raise InvalidFile(path, "is empty, expected a header line")
    _check_distinct(path, header)

    def rows() -> Iterator[RawRow]:
        number = 0
        ended = table.line_num
        try:
            for cells in table:
                ended = table.line_num
                if not cells:
                    continue
                number += 1
                whole = len(cells) == len(header)
                problem = None if whole else f"the row has {len(cells)} columns, the header {len(header)}"
                yield RawRow(number, dict(zip(header, cells, strict=False)), lines.progress, problem)
        except csv.Error as exc:
            raise InvalidFile(path, f"the row that begins on line {ended + 1}: {exc}; {_ROWS_KEPT}") from exc

    return Reader(header, rows())


def _open_json_lines(path: Path, file: IO[bytes]) -> Reader:
    columns: dict[str, None] = {}
    try:
        for row in islice(_json_rows(path, file), JSON_ROWS_LOOKED_AT):
            columns.update(dict.fromkeys(row.values))
    except InvalidFile:
        pass  # met again, after the rows before it
    file.seek(0)
    return Reader(list(columns), _json_rows(path, file), open_ended=True)


def _json_rows(path: Path, file: IO[bytes]) -> Iterator[RawRow]:
    lines = _Lines(path, file)
    for number, line in enumerate(filter(str.strip, lines), 1):
        values: Any = None
        problem = None
        try:
            values = _decode(line)
        except (msgspec.DecodeError, RecursionError) as exc:
            problem = f"the row is not JSON: {exc}"
        if problem is None and not isinstance(values, dict):
            problem = "the row is not a JSON object"
        yield RawRow(number, {} if problem else values, lines.progress, problem)


def _open_parquet(path: Path, file: IO[bytes]) -> Reader:
    try:
        import pyarrow as pa  # noqa: PLC0415  an extra
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError as exc:
        raise InvalidFile(path, "Parquet needs pyarrow: pip install 'tallystick[import]'") from exc
    try:
        table = parquet.ParquetFile(file)
        schema = table.schema_arrow
    except (pa.ArrowException, OSError) as exc:
        raise InvalidFile(path, f"is not a readable Parquet file: {exc}") from exc
    _check_distinct(path, schema.names)
    # Python's datetime has microseconds; what lies below them is cut off, as for text.
    readable = pa.schema(
        [
            pa.field(field.name, pa.timestamp("us", field.type.tz)) if pa.types.is_timestamp(field.type) else field
            for field in schema
        ]
    )
    total = max(table.metadata.num_rows, 1)

    def rows() -> Iterator[RawRow]:
        number = 0
        try:
            for batch in table.iter_batches(batch_size=PARQUET_ROWS_AT_ONCE):
                for values in pa.Table.from_batches([batch]).cast(readable, safe=False).to_pylist():
                    number += 1
                    yield RawRow(number, values, number / total)
        # What Arrow reads need not be a value in Python: text that is not UTF-8, an unknown zone, the year 200,000.
        except (pa.ArrowException, OSError, ValueError, OverflowError, LookupError) as exc:
            raise InvalidFile(path, f"breaks off after row {number}: {exc}; {_ROWS_KEPT}") from exc

    return Reader(schema.names, rows())


def _check_distinct(path: Path, columns: list[str]) -> None:
    twice = [name for name, times in Counter(columns).items() if times > 1]
    if twice:
        raise InvalidFile(path, f"two columns are named {twice[0]!r}, expected names that differ")
