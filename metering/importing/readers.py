"""Files as rows: CSV, JSON lines and Parquet, one row at a time, whatever their size."""

from __future__ import annotations

import csv
import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import msgspec

from metering.errors import InvalidFile

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["RawRow", "Reader", "open_rows"]

MAX_CELL = 1024 * 1024
PARQUET_ROWS_AT_ONCE = 8_192


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
    """An open file. `columns` is None where only the rows tell (JSON lines)."""

    columns: list[str] | None
    rows: Iterator[RawRow]


@contextmanager
def open_rows(path: Path) -> Iterator[Reader]:
    """Open a file by its suffix: .csv, .jsonl or .ndjson, .parquet. Raises `InvalidFile`."""
    openers = {".csv": _open_csv, ".jsonl": _open_json_lines, ".ndjson": _open_json_lines, ".parquet": _open_parquet}
    opener = openers.get(path.suffix.lower())
    if opener is None:
        raise InvalidFile(path, f"unknown suffix {path.suffix!r}, expected one of {', '.join(openers)}")
    try:
        file = path.open("rb")
    except OSError as exc:
        raise InvalidFile(path, f"cannot be read: {exc.strerror}") from exc
    with file:
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
        for number, line in enumerate(self._file, 1):
            self._read += len(line)
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as exc:
                raise InvalidFile(self._path, f"line {number} is not UTF-8; the rows before it were imported") from exc


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
    if len(set(header)) != len(header):
        raise InvalidFile(path, f"two columns have the same name: {', '.join(header)}")

    def rows() -> Iterator[RawRow]:
        number = 0
        try:
            for cells in filter(None, table):
                number += 1
                whole = len(cells) == len(header)
                problem = None if whole else f"has {len(cells)} columns, the header has {len(header)}"
                yield RawRow(number, dict(zip(header, cells, strict=False)), lines.progress, problem)
        except csv.Error as exc:
            raise InvalidFile(path, f"line {table.line_num}: {exc}; the rows before it were imported") from exc

    return Reader(header, rows())


def _open_json_lines(path: Path, file: IO[bytes]) -> Reader:
    lines = _Lines(path, file)

    def rows() -> Iterator[RawRow]:
        for number, line in enumerate(filter(str.strip, lines), 1):
            values: Any = None
            problem = None
            try:
                values = msgspec.json.decode(line)
            except msgspec.DecodeError as exc:
                problem = f"is not JSON: {exc}"
            if problem is None and not isinstance(values, dict):
                problem = "is not a JSON object"
            yield RawRow(number, {} if problem else values, lines.progress, problem)

    return Reader(None, rows())


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
        except (pa.ArrowException, OSError) as exc:
            raise InvalidFile(path, f"breaks off after row {number}: {exc}; the rows before were imported") from exc

    return Reader(schema.names, rows())
