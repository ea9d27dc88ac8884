from __future__ import annotations

import csv
import json
from collections import defaultdict
from typing import TYPE_CHECKING

from examples import traces
from examples.traffic import write_month
from metering.events import TOKEN_FIELDS, TokenUsage
from metering.traces import sum_trace_tokens

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

SAID = ("input_tokens", "cache_read_tokens", "output_tokens", "reasoning_tokens")


def test_traces_say_what_was_billed_but_for_the_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "RUNS_A_FAULT", 40)
    calls, path = tmp_path / "calls.csv", tmp_path / "traces.jsonl"
    write_month(calls, period="2026-10", events=3_000)
    planted = traces.write_traces(calls, path)
    assert set(planted) == {"none", *traces.FAULTS}
    assert min(planted[fault] for fault in traces.FAULTS) >= 3

    billed: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(TOKEN_FIELDS, 0))
    with calls.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            for name in SAID:
                billed[row["run_id"]][name] += int(row[name])
    billed = {run_id: counts for run_id, counts in billed.items() if counts["input_tokens"]}
    traced = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        (part,) = json.loads(line)["resourceSpans"]
        (run_id,) = (said["value"]["stringValue"] for said in part["resource"]["attributes"] if "run_id" in said["key"])
        totals = sum_trace_tokens(part["scopeSpans"][0]["spans"])
        assert not totals.flags
        traced[run_id] = totals.to_usage()
    assert len(traced) == len(billed) - planted["lost trace"] + planted["unbilled run"]
    same = [run_id for run_id, counts in billed.items() if traced.get(run_id) == TokenUsage(**counts)]
    assert len(same) == planted["none"] + planted["unbilled run"]
