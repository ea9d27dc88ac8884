"""OTLP JSON files into the ledger: every span once, however often, and however interrupted, it is imported."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby, islice
from operator import itemgetter
from typing import TYPE_CHECKING

import msgspec

from metering import checks
from metering.errors import InvalidEvent, InvalidFile, InvalidSetting, InvalidUsage
from metering.events import MAX_NAME
from metering.importing import Rejects
from metering.traces.keeping import MAX_SPANS, keeping, kept_span, parents_in
from metering.traces.otlp import open_otlp
from metering.traces.spans import TracedSpan

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime
    from pathlib import Path
    from typing import Self

    from metering.ledger import Ledger
    from metering.traces.otlp import FoundSpan

__all__ = ["SpanImportReport", "SpanImporter"]

SPANS_PER_COMMIT = 5_000
assert SPANS_PER_COMMIT <= MAX_SPANS
TRACES_AT_ONCE = 500

_decoder = msgspec.msgpack.Decoder(TracedSpan)


@dataclass(slots=True, kw_only=True)
class SpanImportReport:
    """What became of a file's spans: `spans` = `inserted` + `known` + `unneeded` + `rejected`."""

    file: Path
    spans: int = 0
    """Also lines that could not be read to their end."""
    inserted: int = 0
    known: int = 0
    """In the ledger already."""
    unneeded: int = 0
    """Spans that say nothing of tokens, and are above none that does."""
    rejected: int = 0
    rejects_file: Path | None = None


class SpanImporter:
    """Imports files of spans into one ledger, as `with SpanImporter(...) as importer`.

    Kept are the spans that say what they used, at once, and when the block ends those above them, which tell whether a
    span repeats what is below it: of all files together, and of what was imported before.
    """

    def __init__(self, ledger: Ledger, *, account: str | None = None, clock: Callable[[], datetime]) -> None:
        if account is not None:
            try:
                checks.text("--account", account, MAX_NAME)
            except InvalidEvent as exc:
                raise InvalidSetting("--account", account, exc.expected) from None
        self.reports: list[SpanImportReport] = []
        self._ledger = ledger
        self._account = account
        self._clock = clock

    def __enter__(self) -> Self:
        # A temporary file, so memory stays bounded.
        self._bare = sqlite3.connect("", isolation_level=None)
        self._bare.executescript(
            "PRAGMA journal_mode = OFF;"
            "CREATE TABLE bare (trace_id TEXT, span_id TEXT, parent_span_id TEXT, file INTEGER, span BLOB,"
            " PRIMARY KEY (trace_id, span_id)) WITHOUT ROWID;"
            "CREATE TABLE wanted (trace_id TEXT, span_id TEXT, PRIMARY KEY (trace_id, span_id)) WITHOUT ROWID;"
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        with closing(self._bare):
            if kind is None or issubclass(kind, Exception):
                self._keep_ancestors()

    def run(self, path: Path, *, rejects: Path, progress: Callable[[float], None] | None = None) -> SpanImportReport:
        """Import one file. What is refused goes to the CSV file `rejects`, with its number and reason.

        Raises `InvalidFile` for one that cannot be read; the spans before the break are kept.
        """
        report = SpanImportReport(file=path)
        self.reports.append(report)
        if rejects.resolve() == path.resolve():
            raise InvalidSetting("--rejects", str(rejects), "another file than the one to import")
        batch: list[tuple[int, TracedSpan]] = []
        with open_otlp(path) as found, Rejects(rejects) as rejected:
            try:
                for item in found:
                    report.spans += 1
                    span = self._read(item, report, rejected)
                    if span is not None:
                        batch.append((report.spans, span))
                    if report.spans % SPANS_PER_COMMIT == 0:
                        self._commit(batch, report, rejected)
                        batch = []
                        if progress is not None:
                            progress(item.progress)
                self._commit(batch, report, rejected)
            except InvalidFile:
                self._commit(batch, report, rejected)
                raise
            finally:
                report.rejected = rejected.count
        if progress is not None:
            progress(1.0)
        report.rejects_file = rejects if report.rejected else None
        return report

    def _read(self, item: FoundSpan, report: SpanImportReport, rejected: Rejects) -> TracedSpan | None:
        """A span to be kept at once."""
        if item.problem is not None:
            rejected.add(report.spans, {}, item.problem)
            return None
        try:
            span = kept_span(item.span, account=self._account)
        except InvalidUsage as exc:
            rejected.add(report.spans, {}, str(exc))
            return None
        if span.usage is not None:
            return span
        report.unneeded += 1
        ids = (span.trace_id, span.span_id, span.parent_span_id)
        row = (*ids, len(self.reports) - 1, msgspec.msgpack.encode(span))
        self._bare.execute("INSERT INTO bare VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING", row)
        return None

    def _commit(self, batch: Sequence[tuple[int, TracedSpan]], report: SpanImportReport, rejected: Rejects) -> None:
        if not batch:
            return
        kept = self._ledger.writer.run(keeping([span for _, span in batch], self._clock))
        report.inserted += kept.inserted
        report.known += kept.known
        for position in kept.conflicting:
            number, span = batch[position]
            ids = {"trace_id": span.trace_id, "span_id": span.span_id}
            rejected.add(number, ids, "span: the same was recorded before with other values")

    def _keep_ancestors(self) -> None:
        """Keep of the spans without usage those that are above one in the ledger."""
        with closing(self._bare.execute("SELECT DISTINCT trace_id FROM bare")) as traces:
            while some := traces.fetchmany(TRACES_AT_ONCE):
                wanted = parents_in(self._ledger, [trace_id for (trace_id,) in some])
                self._bare.executemany("INSERT INTO wanted VALUES (?, ?) ON CONFLICT DO NOTHING", wanted)
        ancestors = (
            "WITH RECURSIVE above AS (SELECT trace_id, span_id FROM wanted UNION"
            " SELECT bare.trace_id, bare.parent_span_id FROM bare JOIN above USING (trace_id, span_id))"
            " SELECT file, span FROM bare JOIN above USING (trace_id, span_id) ORDER BY file"
        )
        with closing(self._bare.execute(ancestors)) as found:
            for file, rows in groupby(found, itemgetter(0)):
                report = self.reports[file]
                while some := list(islice(rows, SPANS_PER_COMMIT)):
                    spans = [_decoder.decode(span) for _, span in some]
                    kept = self._ledger.writer.run(keeping(spans, self._clock))
                    report.unneeded -= len(spans)
                    report.inserted += kept.inserted
                    report.known += len(spans) - kept.inserted
