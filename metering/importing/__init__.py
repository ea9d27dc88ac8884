"""Usage from files into the ledger: every row once, however often, and however interrupted, it is imported."""

from __future__ import annotations

import csv
import hashlib
import sqlite3
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from metering import checks
from metering.admission.sql import MAX_BATCH, SqlStore
from metering.errors import InvalidEvent, InvalidFile, InvalidSetting, StoreUnavailable, UnknownPlan
from metering.events import MAX_LINE, MAX_NAME, TOKEN_FIELDS, TokenUsage, UsageEvent, derive_event_id
from metering.importing.readers import open_rows
from metering.importing.values import FIELDS, is_blank

if TYPE_CHECKING:
    import io
    from collections.abc import Callable, Iterator, Mapping
    from datetime import datetime
    from pathlib import Path

    from metering.accounts import Accounts
    from metering.importing.readers import RawRow, Reader
    from metering.ledger import Ledger

__all__ = ["ImportReport", "Importer", "Rejects"]

ROWS_PER_COMMIT = 5_000
assert ROWS_PER_COMMIT <= MAX_BATCH
MOST_LISTED = 30


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
    number: int
    raw: dict[str, Any]
    event: UsageEvent
    plan: str | None
    zoneless: bool


class Importer:
    """Imports files into one ledger. Imports ask no limits.

    A row's identity is its idempotency key, scoped to account and line, where one is mapped; else the digest of the
    source's name, account, line, its mapped values as written, and how many equal rows came before it in the file.
    A row known by that identity, but with another fingerprint, is refused: other values under one key, or the same
    row with other constants.

    Accounts that are new are created where the row, or `constants`, names a plan. `mapping` is field -> column.
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
        for name, value in constants.items():
            _checked_name(f"--{name}", value, MAX_LINE if name == "line" else MAX_NAME)
        self._ledger = ledger
        self._accounts = accounts
        self._mapping = dict(mapping)
        self._constants = dict(constants)
        described = {name: value for name, value in constants.items() if name not in ("account", "line", "plan")}
        self._described = _digest(described).hex() if described else None
        self._store = SqlStore(ledger, clock=clock)

    def run(
        self, path: Path, *, source: str | None = None, rejects: Path, progress: Callable[[float], None] | None = None
    ) -> ImportReport:
        """Import one file. Good rows are kept, bad ones go to the CSV file `rejects` with their number and reason.

        Raises `InvalidFile` for one that cannot be read (rows before the break are kept), `InvalidSetting` for a
        column that is not there, `UnknownPlan` for a constant that is none.
        """
        report = ImportReport(source=_checked_name("--source", source or path.stem, MAX_NAME))
        if rejects.resolve() == path.resolve():
            raise InvalidSetting("--rejects", str(rejects), "another file than the one to import")
        with open_rows(path) as reader, Rejects(rejects) as rejected, _Occurrences() as occurrences:
            columns = self._columns(reader)
            batch: list[_Parsed] = []
            try:
                for row in reader.rows:
                    report.rows += 1
                    raw = {
                        name: value for name, column in columns.items() if not is_blank(value := row.values.get(column))
                    }
                    try:
                        batch.append(self._parse(row, raw, report.source, occurrences))
                    except InvalidEvent as exc:
                        rejected.add(row.number, raw, row.problem or str(exc))
                    if report.rows % ROWS_PER_COMMIT == 0:
                        self._commit(batch, report, rejected)
                        batch = []
                        if progress is not None:
                            progress(row.progress)
            except InvalidFile:
                self._commit(batch, report, rejected)
                raise
            self._commit(batch, report, rejected)
            report.rejected = rejected.count
        if progress is not None:
            progress(1.0)
        report.rejects_file = rejects if report.rejected else None
        return report

    def _columns(self, reader: Reader) -> dict[str, str]:
        """Field -> column. A column that has a field's name needs no mapping."""
        columns = dict(self._mapping)
        for name in FIELDS:
            if name not in columns and name not in self._constants and (reader.open_ended or name in reader.columns):
                columns[name] = name
        if reader.open_ended and not reader.columns:
            return columns  # no row yet to be wrong about
        seen = f"a column of the file: {_listed(reader.columns)}"
        for name, column in self._mapping.items():
            if column not in reader.columns:
                raise InvalidSetting("--map", f"{name}={column}", seen)
        for name in ("occurred_at", "account", "line"):
            if name not in self._constants and columns.get(name) not in reader.columns:
                hint = "" if name == "occurred_at" else f"--{name} NAME or "
                raise InvalidSetting(name, None, f"{hint}--map {name}=COLUMN, with {seen}")
        return columns

    def _parse(self, row: RawRow, raw: dict[str, Any], source: str, occurrences: _Occurrences) -> _Parsed:
        if row.problem is not None:
            raise InvalidEvent("row", row.number, "a row that can be read")
        if "occurred_at" not in raw and "occurred_at" not in self._constants:
            raise InvalidEvent("occurred_at", None, "a time in every row")
        values = {name: FIELDS[name](name, value) for name, value in (self._constants | raw).items()}
        occurred_at, zoneless = values.pop("occurred_at")
        plan = values.pop("plan", None)
        account, line = values.setdefault("account", ""), values.setdefault("line", "")
        key = values.get("idempotency_key")
        if key is not None:
            event_id = derive_event_id("import", account, line, key)
            fingerprint: str | None = _digest([occurred_at, values]).hex()
        else:
            written = {name: value for name, value in raw.items() if name != "plan"}
            digest = _digest([source, account, line, written])
            event_id = derive_event_id("row", digest.hex(), str(occurrences.before(digest)))
            fingerprint = self._described
        usage = TokenUsage(**{name: values.pop(name) for name in TOKEN_FIELDS if name in values})
        billable = values.get("caller_type", "production_agent") == "production_agent"
        event = UsageEvent(
            event_id=event_id,
            kind="import",
            usage=usage,
            occurred_at=occurred_at,
            fingerprint=fingerprint,
            source=source,
            billable=billable,
            **values,
        )
        return _Parsed(row.number, raw, event, plan, zoneless)

    def _commit(self, parsed: list[_Parsed], report: ImportReport, rejected: Rejects) -> None:
        refused = self._ensure_accounts(parsed, report)
        accepted = []
        for item in parsed:
            problem = refused.get(item.event.account)
            if problem is None:
                accepted.append(item)
            else:
                rejected.add(item.number, item.raw, problem)
        appended = self._store.append([item.event for item in accepted])
        conflicting = set(appended.conflicting)
        for position, item in enumerate(accepted):
            report.zoneless_times += item.zoneless
            if position in conflicting:
                key = item.event.idempotency_key
                same = "row: the same" if key is None else f"idempotency_key: {key!r}"
                rejected.add(item.number, item.raw, f"{same} was imported before with other values")
        report.inserted += appended.inserted
        report.known += appended.known

    def _ensure_accounts(self, parsed: list[_Parsed], report: ImportReport) -> dict[str, str]:
        """Create the accounts that are new. Why it could not be, for those where it could not."""
        wanted: dict[str, str | None] = {}
        for item in parsed:
            wanted[item.event.account] = wanted.get(item.event.account) or item.plan
        refused: dict[str, str] = {}
        created: list[str] = []
        with self._ledger.write() as connection:
            known = self._accounts.known(connection, wanted)
            for account, plan in wanted.items():
                if account in known:
                    continue
                if plan is None:
                    refused[account] = f"account: {account!r} is not known; --plan NAME creates it"
                    continue
                try:
                    with connection.begin_nested():
                        self._accounts.ensure(connection, account, plan, active_from=None)
                    created.append(account)
                except UnknownPlan as exc:
                    if "plan" in self._constants:
                        raise
                    refused[account] = str(exc)
        report.accounts_created += created
        return refused


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
        try:
            row = self._connection.execute(
                "INSERT INTO seen VALUES (?, 1) ON CONFLICT DO UPDATE SET times = times + 1 RETURNING times - 1",
                (digest,),
            ).fetchone()
        except sqlite3.Error as exc:
            raise StoreUnavailable(f"the import's temporary file: {exc}") from exc
        return int(row[0])


class Rejects:
    """Rows that were refused, as a CSV file that appears, or goes, only when the import ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        self._file: io.TextIOWrapper | None = None
        self.count = 0

    def __enter__(self) -> Rejects:
        return self

    def add(self, number: int, values: dict[str, Any], reason: str) -> None:
        """Note one row."""
        self.count += 1
        with self._translated():
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._partial.open("w", encoding="utf-8", newline="")
                csv.writer(self._file).writerow(["row", "reason", "values"])
            csv.writer(self._file).writerow([number, reason, _json(values).decode()])

    def __exit__(self, kind: object, *exc_info: object) -> None:
        with self._translated():
            if self._file is not None:
                self._file.close()
                self._partial.replace(self._path)
            elif kind is None and self._path.parent.is_dir():
                self._path.unlink(missing_ok=True)
                self._partial.unlink(missing_ok=True)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise InvalidFile(self._path, f"refused rows cannot be written here: {exc.strerror}") from exc


def _checked_name(name: str, value: object, max_length: int) -> str:
    try:
        return checks.text(name, value, max_length)
    except InvalidEvent as exc:
        raise InvalidSetting(name, value, exc.expected) from None


def _listed(names: list[str]) -> str:
    shown = names if len(names) <= MOST_LISTED else [*names[:MOST_LISTED], f"and {len(names) - MOST_LISTED} more"]
    return ", ".join(shown)


def _json(value: Any) -> bytes:
    return msgspec.json.encode(value, order="sorted", enc_hook=str)


def _digest(value: Any) -> bytes:
    return hashlib.blake2b(_json(value), digest_size=16).digest()
