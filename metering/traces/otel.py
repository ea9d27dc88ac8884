"""Spans of an app's own OpenTelemetry SDK into the ledger, from a thread beside it.

    provider.add_span_processor(TallystickSpanProcessor(meter))

Nothing of `opentelemetry` is imported: the SDK asks a processor for its methods alone.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any

from metering.errors import MeteringError
from metering.traces.keeping import kept_span

if TYPE_CHECKING:
    from metering.meter import Meter
    from metering.traces.spans import TracedSpan

__all__ = ["TallystickSpanProcessor"]

logger = logging.getLogger("metering")

MAX_WAITING = 10_000
"""Spans that wait in memory at the most; above it they are dropped."""

MAX_BATCH = 512
EVERY_S = 1.0
MOST_PARENTS = 100_000
"""Parents remembered at the most until they end."""

_processors: weakref.WeakSet[TallystickSpanProcessor] = weakref.WeakSet()


class TallystickSpanProcessor:
    """A span processor of `opentelemetry-sdk`: records what spans used, and the spans above those that did.

    Never blocks or breaks the app: a span that ends is put aside, and a thread writes batches at least once a second.
    `dropped` counts spans that could not be put aside or kept. Where the ledger is away they wait in the meter's spool.
    A span that ends before the spans below it is kept only where it says what it used itself.

    Shut it down, as its provider does, before the meter is closed.
    """

    def __init__(self, meter: Meter) -> None:
        self.dropped = 0
        self._traces = meter._traces
        self._parents: dict[tuple[str | None, str], None] = {}
        self._waiting: deque[Any] = deque()
        self._thread: threading.Thread | None = None
        self._start_anew()
        _processors.add(self)

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        """Nothing: what counts is there when it ends."""

    def _on_ending(self, span: Any) -> None:
        """Nothing. The SDK asks its own processors for it, too."""

    def on_end(self, span: Any) -> None:
        """Put a span aside."""
        with self._news:
            if self._has_ended or len(self._waiting) >= MAX_WAITING:
                self.dropped += 1
                return
            self._waiting.append(span)
            if self._thread is None:
                self._start_thread()
            elif len(self._waiting) == MAX_BATCH:
                self._news.notify_all()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Write what ended so far. Whether that was done in time."""
        with self._news:
            self._is_urgent = True
            self._news.notify_all()
            return self._news.wait_for(lambda: not self._waiting and not self._at_work, timeout_millis / 1000)

    def shutdown(self) -> None:
        """Write what ended so far, and take no more."""
        with self._news:
            self._has_ended = True
        self.force_flush()

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._run, name="metering-spans", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the interpreter is ending
            self.dropped += len(self._waiting)
            self._waiting.clear()
        else:
            self._thread = thread

    def _run(self) -> None:
        while True:
            with self._news:
                self._at_work = 0
                if not self._waiting:
                    self._is_urgent = False
                self._news.notify_all()
                self._news.wait_for(self._has_to_write, EVERY_S)
                if not self._waiting:
                    self._thread = None
                    return
                batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), MAX_BATCH))]
                self._at_work = len(batch)
            self._keep(batch)

    def _has_to_write(self) -> bool:
        return self._is_urgent or self._has_ended or len(self._waiting) >= MAX_BATCH

    def _keep(self, batch: list[Any]) -> None:
        spans: list[TracedSpan] = []
        for ended in batch:
            try:
                span = kept_span(ended)
            except Exception as exc:  # noqa: BLE001  whatever an app's own span raises
                self._note_drop(1, exc)
                continue
            if self._is_needed(span):
                spans.append(span)
        try:
            if spans:
                self._traces.keep(spans)
        except Exception as exc:  # noqa: BLE001  the thread must live, whatever the ledger says
            self._note_drop(len(spans), exc)

    def _is_needed(self, span: TracedSpan) -> bool:
        """Whether it says what it used, or is above one that does. Spans end before those above them."""
        assert span.span_id is not None
        is_above = (span.trace_id, span.span_id) in self._parents
        self._parents.pop((span.trace_id, span.span_id), None)
        if span.usage is None and not is_above:
            return False
        if span.parent_span_id is not None:
            self._parents[span.trace_id, span.parent_span_id] = None
            if len(self._parents) > MOST_PARENTS:
                del self._parents[next(iter(self._parents))]
        return True

    def _note_drop(self, count: int, error: Exception) -> None:
        with self._news:
            self.dropped += count
        log = logger.warning if isinstance(error, MeteringError) else logger.exception
        log("%d spans were dropped: %s", count, error)

    def _start_anew(self) -> None:
        """As new, in a child too: its parent's thread is not there, and writes what ended before the fork."""
        self._news = threading.Condition()
        self._waiting = deque()
        self._thread = None
        self._at_work = 0
        self._is_urgent = False
        self._has_ended = False


def _start_anew_after_fork() -> None:
    for processor in _processors:
        processor._start_anew()


os.register_at_fork(after_in_child=_start_anew_after_fork)
