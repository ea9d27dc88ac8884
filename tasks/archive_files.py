"""Archives as files: events of a closed period of an account with their costs, as Parquet, and a manifest beside it.

What an app may write freely of a call (`attributes`, `session_id`, `error`) is not archived: it is not needed to bill,
and an archive is never changed, so it could not be erased there.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from uuid import UUID

import duckdb
import msgspec
import pyarrow as pa
from pyarrow import parquet

from metering.events import TOKEN_FIELDS
from metering.ledger.schema import event_costs, events
from metering.ledger.types import decimal_text, instant_text
from reports.files import write_atomically
from tasks.errors import ArchiveError
from tasks.warehouse import sql

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

__all__ = [
    "ARCHIVED",
    "Manifest",
    "as_texts",
    "check_file",
    "file_sums",
    "numbers_in",
    "place_of",
    "sums_by_group",
    "write_archive",
    "write_manifest",
]

ARCHIVED = (
    *(column for column in events.c if column.name not in ("attributes", "session_id", "error")),
    *(column for column in event_costs.c if column.name != "seq"),
)
"""The columns of an archive, of `events` and `event_costs`."""
AMOUNTS = ("quantity", "cost")
AT_ONCE = 64 * 1024
"""Bytes, and rows."""

_MONEY = pa.decimal128(38, 12)
_TIME = pa.timestamp("us", tz="UTC")
_KINDS: dict[str, pa.DataType] = {
    **dict.fromkeys(("seq", *TOKEN_FIELDS), pa.int64()),
    **dict.fromkeys(("plan_version", "requests", "latency_ms"), pa.int32()),
    **dict.fromkeys(AMOUNTS, _MONEY),
    **dict.fromkeys(("occurred_at", "recorded_at", "costed_at"), _TIME),
    **dict.fromkeys(("platform_paid", "billable", "estimated", "counted", "late"), pa.bool_()),
}
_SCHEMA = pa.schema([(column.name, _KINDS.get(column.name, pa.string())) for column in ARCHIVED])


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What is in an archive, as it was when it was made. Sums are decimal text."""

    ledger_id: str
    account: str
    period: str
    part: int
    file: str
    """Relative to the folder of the archives."""
    made_at: str
    bytes: int
    sha256: str
    events: int
    seq_from: int
    seq_to: int
    first_at: str
    last_at: str
    sums: dict[str, str]

    def text(self) -> str:
        """Canonical JSON."""
        return msgspec.json.encode(self, order="sorted").decode()


def place_of(account: str, period: str, part: int) -> str:
    """Where an archive lies in its folder. Accounts may have names that no file can have."""
    digest = hashlib.sha256(account.encode()).hexdigest()[:16]
    return f"{period}/{quote(account, safe='')[:80]}-{digest}-{part}.parquet"


def write_archive(path: Path, pages: Iterable[Sequence[Mapping[Any, Any]]]) -> tuple[int, str]:
    """Write a file, whole or not at all; its length and SHA-256. Memory is that of a page. Raises `ArchiveError`."""
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with parquet.ParquetWriter(temporary, _SCHEMA, compression="zstd") as writer:
                for page in pages:
                    columns = [[_told(row[name]) for row in page] for name in _SCHEMA.names]
                    writer.write_table(pa.table(columns, schema=_SCHEMA))
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            found = _digest(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as exc:
        raise ArchiveError(path, f"cannot be written: {exc.strerror or exc}") from exc
    return found


def write_manifest(path: Path, text: str) -> None:
    """Write the manifest of the archive at `path`, durably, and with it that the archive is there."""
    try:
        write_atomically(path.with_suffix(".json"), text)
    except OSError as exc:
        raise ArchiveError(path.with_suffix(".json"), f"cannot be written: {exc.strerror or exc}") from exc


def check_file(folder: Path, text: str, *, thoroughly: bool) -> Manifest:
    """Read an archive back: its digest, its manifest, and `thoroughly` its sums, are those of the manifest `text`.

    Raises `ArchiveError`, which names the file.
    """
    manifest = msgspec.json.decode(text, type=Manifest)
    path = folder / manifest.file
    try:
        said = path.with_suffix(".json").read_text(encoding="utf-8")
        length, digest = _digest(path)
    except OSError as exc:
        raise ArchiveError(path, f"cannot be read: {exc.strerror or exc}") from exc
    except UnicodeDecodeError:
        said = ""
    if said != text:
        raise ArchiveError(path.with_suffix(".json"), "is not the manifest that the ledger has")
    if (length, digest) != (manifest.bytes, manifest.sha256):
        raise ArchiveError(path, f"has SHA-256 {digest}, but was archived with {manifest.sha256}: it was changed")
    if thoroughly:
        found = file_sums(path, manifest.account, manifest.period)
        expected = {
            **manifest.sums,
            **{name: str(getattr(manifest, name)) for name in ("events", "seq_from", "seq_to", "first_at", "last_at")},
        }
        if found != expected:
            raise ArchiveError(path, f"adds up to {_differing(found, expected)}, which is not what was archived")
    return manifest


def file_sums(path: Path, account: str, period: str) -> dict[str, str]:
    """What the events of a file come to, as texts. Raises `ArchiveError` for one that is no such file."""
    try:
        with duckdb.connect() as connection:
            connection.execute("SET TimeZone = 'UTC'")
            values = {"file": str(path), "account": account, "period": period}
            result = connection.execute(sql("archive_file_sums"), values)
            names = [column[0] for column in result.description or ()]
            row = result.fetchone()
    except duckdb.Error as exc:
        raise ArchiveError(path, f"cannot be read back: {exc}") from exc
    assert row is not None
    return as_texts(dict(zip(names, row, strict=True)))


def sums_by_group(files: Sequence[str]) -> list[dict[str, Any]]:
    """Billable usage of archives, by account and by what it is priced by."""
    with duckdb.connect() as connection:
        result = connection.execute(sql("archived_sums"), {"files": list(files)})
        names = [column[0] for column in result.description or ()]
        return [dict(zip(names, row, strict=True)) for row in result.fetchall()]


def as_texts(sums: Mapping[str, Any]) -> dict[str, str]:
    """Sums in one spelling, whichever database they are from."""
    return {
        name: instant_text(value) if isinstance(value, datetime) else _number(value) for name, value in sums.items()
    }


def numbers_in(path: Path) -> Iterator[list[int]]:
    """The numbers of a file's events, some at a time."""
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=AT_ONCE, columns=["seq"]):
            yield batch.column("seq").to_pylist()


def _differing(found: Mapping[str, str], expected: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {found[name]}" for name in found if found[name] != expected.get(name))


def _number(value: Any) -> str:
    if value is None or (isinstance(value, str) and value.endswith("Z")):
        return str(value)
    return decimal_text(Decimal(value))


def _told(value: Any) -> Any:
    if isinstance(value, UUID):
        return value.hex
    return value.astimezone(UTC) if isinstance(value, datetime) else value


def _digest(path: Path) -> tuple[int, str]:
    digest, length = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(AT_ONCE):
            digest.update(chunk)
            length += len(chunk)
    return length, digest.hexdigest()
