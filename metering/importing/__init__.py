"""Usage from files into the ledger: every row once, however often, and however interrupted, it is imported."""

from __future__ import annotations

import csv
import hashlib
import sqlite3
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import msgspec

from metering.admission.sql import MAX_BATCH, SqlStore
from metering.errors import InvalidEvent, InvalidFile, InvalidSetting
from metering.events import TOKEN_FIELDS, TokenUsage, UsageEvent, derive_event_id
from metering.importing.readers import RawRow, open_rows
from metering.importing.values import FIELDS, is_blank, raw_text

if TYPE_CHECKING:
    import io
    from collections.abc import Callable, Mapping
    from datetime import datetime
    from pathlib import Path

    from metering.accounts import Accounts
    from metering.ledger import Ledger

__all__ = ["ImportReport", "Importer"]

ROWS_PER_COMMIT = 5_000
assert ROWS_PER_COMMIT <= MAX_BATCH


@dataclass(slots=True, kw_only=True)
class ImportReport:
    """What became of a file's rows: `rows` = `inserted` + `known` + `rejected`."""

    source: str
    rows: int = 0
    inserted: int = 0
    known: int = 0
    """In the ledger already."""
    rejected: int = 0
    zoneless_times: int = 0
    """Times without a zone, read as UTC."""
    accounts_created: list[str] = field(default_factory=list)
    rejects_file: Path | None = None


@dataclass(frozen=True, slots=True)
class _Parsed:
    row: RawRow
    event: UsageEvent
    plan: str | None
    zoneless: bool


class Importer:
    """Imports files into one ledger.

    A row's identity is its idempotency key, scoped to account and line, where one is mapped; else the digest of the
    source's name, its mapped values as written, and how many equal rows came before it in the file. Imports ask no
    limits. Accounts that are new are created where the row, or `constants`, names a plan.
    """

    def __init__(
        self,
        ledger: Ledger,
        accounts: Accounts,
        *,
        mapping: Mapping[str, str],
        constants: Mapping[str, str],
        clock: Callable[[], datetime],
    ) -> None:
        for name in (*mapping, *constants):
            if name not in FIELDS:
                raise InvalidSetting("--map", name, f"one of {', '.join(FIELDS)}")
        both = sorted(mapping.keys() & constants.keys())
        if both:
            raise InvalidSetting("--map", both[0], f"either a column or a constant for {both[0]}, not both")
        self._ledger = ledger
        self._accounts = accounts
        self._mapping = dict(mapping)
        self._constants = dict(constants)
        self._store = SqlStore(ledger, clock=clock)

    def run(
        self, path: Path, *, source: str | None = None, rejects: Path, progress: Callable[[float], None] | None = None
    ) -> ImportReport:
        """Import one file. Good rows are kept, bad ones go to the CSV file `rejects` with their number and reason.

        Raises `InvalidFile` for one that cannot be read (rows before the break are kept), `InvalidSetting` for a
        column that is not there, `UnknownPlan`.
        """
        report = ImportReport(source=source or path.stem)
        with open_rows(path) as reader, _Rejects(rejects) as rejected, _Occurrences() as occurrences:
            columns = self._columns(reader.columns)
            rows = iter(reader.rows)
            while batch := list(islice(rows, ROWS_PER_COMMIT)):
                parsed = []
                for row in batch:
                    try:
                        parsed.append(self._parse(row, columns, report.source, occurrences))
                    except InvalidEvent as exc:
                        rejected.add(row, str(exc))
                self._commit(parsed, report, rejected)
                report.rows += len(batch)
                if progress is not None:
                    progress(batch[-1].progress)
            report.rejected = rejected.count
        report.rejects_file = rejects if report.rejected else None
        return report

    def _columns(self, seen: list[str] | None) -> dict[str, str]:
        """Field -> column. A column that has a field's name needs no mapping."""
        columns = dict(self._mapping)
        for name in FIELDS:
            if name not in columns and name not in self._constants and (seen is None or name in seen):
                columns[name] = name
        for name, column in self._mapping.items():
            if seen is not None and column not in seen:
                raise InvalidSetting("--map", f"{name}={column}", f"a column of the file: {', '.join(seen)}")
        for name in ("occurred_at", "account", "line"):
            if name not in columns and name not in self._constants:
                hint = "--map occurred_at=COLUMN" if name == "occurred_at" else f"--{name} NAME or --map {name}=COLUMN"
                raise InvalidSetting(name, None, f"{hint}; the file has the columns {', '.join(seen or [])}")
        return columns

    def _parse(self, row: RawRow, columns: Mapping[str, str], source: str, occurrences: _Occurrences) -> _Parsed:
        if row.problem is not None:
            raise InvalidEvent(f"row {row.number}", "(unreadable)", row.problem)
        raw: dict[str, Any] = dict(self._constants)
        for name, column in columns.items():
            value = row.values.get(column)
            if not is_blank(value):
                raw[name] = value
        if "occurred_at" not in raw:
            raise InvalidEvent("occurred_at", None, "a time in every row")
        values = {name: FIELDS[name](name, value) for name, value in raw.items()}
        occurred_at, zoneless = values.pop("occurred_at")
        plan = values.pop("plan", None)
        usage = TokenUsage(**{name: values.pop(name) for name in TOKEN_FIELDS if name in values})
        account, line = values.get("account", ""), values.get("line", "")
        identity = [part for name in sorted(raw) if name != "plan" for part in (name, raw_text(raw[name]))]
        key = values.get("idempotency_key")
        event_id, fingerprint = (
            (derive_event_id("import", account, line, key), _digest(identity).hex())
            if key is not None
            else (_row_id(source, account, line, identity, occurrences), None)
        )
        billable = values.get("caller_type", "production_agent") == "production_agent"
        event = UsageEvent(
            event_id=event_id,
            kind="import",
            usage=usage,
            occurred_at=occurred_at,
            fingerprint=fingerprint,
            source=source,
            billable=billable,
            **{"account": account, "line": line, **values},
        )
        return _Parsed(row, event, plan, zoneless)

    def _commit(self, parsed: list[_Parsed], report: ImportReport, rejected: _Rejects) -> None:
        known = self._ensure_accounts(parsed, report)
        accepted = []
        for item in parsed:
            if item.event.account in known:
                accepted.append(item)
            else:
                problem = f"account: {item.event.account!r} is not known; --plan NAME creates it"
                rejected.add(item.row, problem)
        appended = self._store.append([item.event for item in accepted])
        conflicting = set(appended.conflicting)
        for position, item in enumerate(accepted):
            report.zoneless_times += item.zoneless
            if position in conflicting:
                key = item.event.idempotency_key
                rejected.add(item.row, f"idempotency_key: {key!r} was imported before with other values")
        report.inserted += appended.inserted
        report.known += appended.known

    def _ensure_accounts(self, parsed: list[_Parsed], report: ImportReport) -> set[str]:
        wanted: dict[str, str | None] = {}
        for item in parsed:
            wanted[item.event.account] = wanted.get(item.event.account) or item.plan
        with self._ledger.write() as connection:
            known = self._accounts.known(connection, wanted)
            for account, plan in wanted.items():
                if account not in known and plan is not None:
                    self._accounts.ensure(connection, account, plan, active_from=None)
                    report.accounts_created.append(account)
                    known.add(account)
        return known


class _Occurrences:
    """How many equal rows came before. Lies in a temporary file of its own, so memory stays bounded."""

    def __enter__(self) -> _Occurrences:
        self._connection = sqlite3.connect("", isolation_level=None)
        self._connection.execute("PRAGMA journal_mode = OFF")
        self._connection.execute("CREATE TABLE seen (digest BLOB PRIMARY KEY, times INTEGER) WITHOUT ROWID")
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._connection.close()

    def before(self, digest: bytes) -> int:
        """Count this occurrence; how many there were before it."""
        row = self._connection.execute(
            "INSERT INTO seen VALUES (?, 1) ON CONFLICT DO UPDATE SET times = times + 1 RETURNING times - 1", (digest,)
        ).fetchone()
        return int(row[0])


class _Rejects:
    """Rows that were refused, as a CSV file that appears, or goes, only when the import ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        self._file: io.TextIOWrapper | None = None
        self.count = 0

    def __enter__(self) -> _Rejects:
        return self

    def add(self, row: RawRow, reason: str) -> None:
        """Note one row."""
        self.count += 1
        if self._file is None:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._partial.open("w", encoding="utf-8", newline="")
            except OSError as exc:
                raise InvalidFile(self._path, f"rejects cannot be written: {exc.strerror}") from exc
            csv.writer(self._file).writerow(["row", "reason", "values"])
        values = msgspec.json.encode(row.values, enc_hook=str).decode()
        csv.writer(self._file).writerow([row.number, reason, values])

    def __exit__(self, *exc_info: object) -> None:
        if self._file is None:
            self._path.unlink(missing_ok=True)
        else:
            self._file.close()
            self._partial.replace(self._path)


def _row_id(source: str, account: str, line: str, identity: list[str], occurrences: _Occurrences) -> Any:
    digest = _digest([source, account, line, *identity])
    return derive_event_id("row", digest.hex(), str(occurrences.before(digest)))


def _digest(parts: list[str]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        encoded = part.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "big"))
        digest.update(encoded)
    return digest.digest()
