"""What was traced: spans of any convention, summed to a run's tokens, and kept in the ledger beside what is billed.

Importing this loads the pure part alone. `metering.traces.otel` has the span processor for `opentelemetry-sdk`.
"""

from __future__ import annotations

from metering.traces.spans import TracedSpan, read_span
from metering.traces.totals import UNKNOWN_MODEL, RunTokenTotals, TokenTotals, TraceFlag, sum_trace_tokens

__all__ = [
    "UNKNOWN_MODEL",
    "RunTokenTotals",
    "TokenTotals",
    "TraceFlag",
    "TracedSpan",
    "read_span",
    "sum_trace_tokens",
]
