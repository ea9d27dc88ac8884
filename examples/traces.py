"""What an app's tracing would have exported of the made-up month: OTLP JSON lines, with a few faults to be found.

A line has the spans of a run: an agent's, which repeats what its calls used, and below it a span for each call.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from datetime import datetime, timedelta
from itertools import cycle
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["FAULTS", "write_traces"]

FAULTS = ("lost trace", "unbilled call", "cache billed on top", "unbilled run")
"""Planted in turn, in one run of so many."""

RUNS_A_FAULT = 400

_COUNTS = {
    "input_tokens": "gen_ai.usage.input_tokens",
    "cache_read_tokens": "gen_ai.usage.cache_read.input_tokens",
    "output_tokens": "gen_ai.usage.output_tokens",
    "reasoning_tokens": "gen_ai.usage.reasoning.output_tokens",
}


def write_traces(calls: Path, path: Path) -> Counter[str]:
    """Write what was traced of the calls of `examples.traffic.write_month`; runs by the fault planted in them."""
    runs: dict[str, list[dict[str, Any]]] = {}
    with calls.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            call: dict[str, Any] = {**row, **{name: int(row[name]) for name in _COUNTS}}
            if call["input_tokens"] or call["output_tokens"]:
                runs.setdefault(row["run_id"], []).append(call)
    planted: Counter[str] = Counter()
    faults, due = cycle(FAULTS), RUNS_A_FAULT
    next_fault = next(faults)
    with path.open("w", encoding="utf-8") as file:
        for number, (run_id, billed) in enumerate(runs.items(), 1):
            fault = "none"
            if number >= due and (next_fault != "cache billed on top" or _has_room(billed)):
                fault, next_fault, due = next_fault, next(faults), due + RUNS_A_FAULT
            planted[fault] += 1
            traced = _with_fault(billed, fault)
            if fault == "unbilled run":
                file.write(_line(f"{run_id}-again", traced))
            if traced:
                file.write(_line(run_id, traced))
    return planted


def _with_fault(billed: list[dict[str, Any]], fault: str) -> list[dict[str, Any]]:
    match fault:
        case "lost trace":
            return []
        case "unbilled call":
            return [*billed, {**billed[-1], "request_id": "another"}]
        case "cache billed on top":
            # What was billed is made up already, so the trace is what has less.
            return [{**call, "input_tokens": call["input_tokens"] - call["cache_read_tokens"]} for call in billed]
    return billed


def _has_room(billed: Sequence[dict[str, Any]]) -> bool:
    """Whether the cache could have been added to inputs that have it already."""
    return any(call["cache_read_tokens"] for call in billed) and all(
        2 * call["cache_read_tokens"] <= call["input_tokens"] for call in billed
    )


def _line(run_id: str, calls: Sequence[dict[str, Any]]) -> str:
    first = calls[0]
    trace_id = hashlib.md5(run_id.encode(), usedforsecurity=False).hexdigest()
    agent = {**first, **{name: sum(call[name] for call in calls) for name in _COUNTS}}
    spans = [_span(trace_id, "invoke_agent", None, agent, "agent")]
    spans += [
        _span(trace_id, "chat", spans[0]["spanId"], call, f"{number} {call['request_id']}")
        for number, call in enumerate(calls)
    ]
    resource = {"tallystick.account": first["account"], "tallystick.run_id": run_id, "service.name": "demo"}
    document = {
        "resourceSpans": [{"resource": {"attributes": _attributes(resource)}, "scopeSpans": [{"spans": spans}]}]
    }
    return json.dumps(document) + "\n"


def _span(trace_id: str, operation: str, parent: str | None, call: dict[str, Any], what: str) -> dict[str, Any]:
    started_at = datetime.fromisoformat(call["occurred_at"])
    said = {name: call[count] for count, name in _COUNTS.items()}
    said |= {"gen_ai.operation.name": operation, "gen_ai.provider.name": call["provider"]}
    return {
        "traceId": trace_id,
        "spanId": hashlib.md5(f"{trace_id} {what}".encode(), usedforsecurity=False).hexdigest()[:16],
        "parentSpanId": parent or "",
        "name": f"{operation} {call['model']}",
        "startTimeUnixNano": str(_nanoseconds(started_at)),
        "endTimeUnixNano": str(_nanoseconds(started_at + timedelta(seconds=2))),
        "attributes": _attributes({**said, "gen_ai.response.model": call["model"]}),
    }


def _nanoseconds(at: datetime) -> int:
    return int(at.timestamp()) * 10**9


def _attributes(values: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"key": name, "value": {"intValue": str(value)} if isinstance(value, int) else {"stringValue": value}}
        for name, value in values.items()
    ]
