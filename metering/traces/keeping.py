"""Spans into the ledger: each (trace, span) once, now or, where the ledger is away, later."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import msgspec

from metering import checks
from metering.admission.statements import statements
from metering.errors import InvalidEvent, InvalidUsage, StoreUnavailable
from metering.events import MAX_NAME, TokenUsage, derive_event_id
from metering.ledger.transactions import Locked, cursor_of
from metering.ledger.types import instant_text
from metering.traces.spans import TracedSpan, read_span

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime

    from metering.courier import Courier
    from metering.ledger import Ledger
    from metering.ledger.transactions import Cursor
    from metering.ledger.writer import Work
    from metering.spool import Line

__all__ = ["MAX_SPANS", "KeptSpans", "TraceStore", "keeping", "kept_span", "parents_in"]

MAX_SPANS = 10_000
"""Spans in one transaction at the most."""

_SQL = statements("metering.traces")
logger = logging.getLogger("metering")

_decoder = msgspec.msgpack.Decoder(TracedSpan)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptSpans:
    """What became of a batch of spans."""

    inserted: int
    known: int
    """In the ledger already."""
    conflicting: tuple[int, ...] = ()
    """Positions of spans whose ids are taken by others: of other usage, model or parent. Not written."""


def kept_span(span: Any, *, account: str | None = None, run_id: str | None = None) -> TracedSpan:
    """A span as the ledger keeps it; `account` and `run_id` stand above what it says itself.

    Its run is its trace where nothing names one. Raises `InvalidUsage` for what is no span, or has no ids.
    """
    read = read_span(span)
    return replace(
        read,
        trace_id=_checked("trace_id", read.trace_id),
        span_id=_checked("span_id", read.span_id),
        parent_span_id=None if read.parent_span_id is None else _checked("parent_span_id", read.parent_span_id),
        run_id=_checked("run_id", run_id or read.run_id or read.trace_id),
        account=read.account if account is None else _checked("account", account),
    )


def keeping(spans: Sequence[TracedSpan], clock: Callable[[], datetime]) -> Work[KeptSpans]:
    """Writes those spans, of `kept_span`, that the ledger does not have. Raises `InvalidEvent` for too many at once."""
    if len(spans) > MAX_SPANS:
        raise InvalidEvent("spans", len(spans), f"at most {MAX_SPANS} in one batch")
    return Locked(lambda cursor: _keep(cursor, spans, clock()))


def parents_in(ledger: Ledger, trace_ids: Sequence[str]) -> list[tuple[str, str]]:
    """Which (trace, span) the ledger's spans of these traces name as their parents."""
    with ledger.read() as connection:
        asked = {"trace_ids": _json(trace_ids)}
        return [tuple(ids) for ids in cursor_of(connection).execute(_SQL["find_parents"], asked).fetchall()]


class TraceStore:
    """Keeps spans in the ledger; where that is away, in the spool of `courier` until it is back."""

    def __init__(self, ledger: Ledger, courier: Courier, *, clock: Callable[[], datetime]) -> None:
        self._ledger = ledger
        self._courier = courier
        self._clock = clock
        courier.carries("span", self._deliver)

    def keep(self, spans: Sequence[TracedSpan]) -> None:
        """Keep spans of `kept_span`. Raises `StoreUnavailable` where they cannot wait either."""
        try:
            self._ledger.writer.run(self.work(spans))
        except StoreUnavailable:
            self.keep_later(spans)

    def work(self, spans: Sequence[TracedSpan]) -> Work[KeptSpans]:
        """What keeps them, for the ledger's writer."""
        return keeping(spans, self._clock)

    def keep_later(self, spans: Sequence[TracedSpan]) -> None:
        """Keep spans until the ledger is back. Raises `StoreUnavailable` where they cannot be kept either."""
        for left, span in enumerate(reversed(spans)):
            named = derive_event_id("span", span.trace_id or "", span.span_id or "")
            self._courier.keep("span", named, msgspec.msgpack.encode(span), durable=left == len(spans) - 1)

    def _deliver(self, lines: list[Line]) -> list[Line]:
        spans, unread = [], []
        for line in lines:
            try:
                spans.append(_decoder.decode(line.payload))
            except msgspec.MsgspecError:
                logger.exception("span of line %s cannot be read; it stays in the spool", line.event_id)
                unread.append(line)
        try:
            for start in range(0, len(spans), MAX_SPANS):
                self._ledger.writer.run(self.work(spans[start : start + MAX_SPANS]))
        except StoreUnavailable:
            return lines
        return unread


def _keep(cursor: Cursor, spans: Sequence[TracedSpan], now: datetime) -> KeptSpans:
    first: dict[tuple[Any, Any], TracedSpan] = {}
    for span in spans:
        first.setdefault((span.trace_id, span.span_id), span)
    # In one order, so that two processes do not block each other.
    rows = [_row(first[ids], now) for ids in sorted(first)]
    written = {tuple(ids) for ids in cursor.execute(_SQL["insert_spans"], {"rows": _json(rows)}).fetchall()}
    kept = {ids: _facts(first[ids]) for ids in written}
    others = [ids for ids in first if ids not in written]
    if others:
        for trace_id, span_id, *facts in cursor.execute(_SQL["find_spans"], {"ids": _json(others)}).fetchall():
            kept[trace_id, span_id] = tuple(facts)
    conflicting = tuple(
        position for position, span in enumerate(spans) if kept[span.trace_id, span.span_id] != _facts(span)
    )
    return KeptSpans(inserted=len(written), known=len(spans) - len(written) - len(conflicting), conflicting=conflicting)


def _facts(span: TracedSpan) -> tuple[Any, ...]:
    """What two spans of one id have to agree on."""
    counts = (span.usage or TokenUsage()).counts()
    return (span.parent_span_id, span.convention, *counts, span.provider, span.model)


def _row(span: TracedSpan, now: datetime) -> tuple[Any, ...]:
    return (
        span.trace_id,
        span.span_id,
        span.parent_span_id,
        span.run_id,
        span.account,
        span.name,
        span.convention,
        *(span.usage or TokenUsage()).counts(),
        span.provider,
        span.model,
        None if span.started_at is None else instant_text(span.started_at),
        None if span.ended_at is None else instant_text(span.ended_at),
        instant_text(now),
        ",".join(span.flags) or None,
    )


def _checked(field: str, value: Any) -> str:
    try:
        return checks.text(field, value, MAX_NAME)
    except InvalidEvent as exc:
        raise InvalidUsage(field, value, exc.expected) from None


def _json(values: Any) -> str:
    return msgspec.json.encode(values).decode()
