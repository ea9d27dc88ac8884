"""DuckDB and `sum_trace_tokens` agree on which spans count, however they lie above each other."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import duckdb
from hypothesis import given, settings
from hypothesis import strategies as st

from metering.traces import sum_trace_tokens
from tasks.warehouse import sql
from tests.tasks.place import NOVEMBER, PERIOD

if TYPE_CHECKING:
    from collections.abc import Sequence

Node = tuple[int | None, int]
"""Parent (possibly the span itself, a descendant, or one that is not there) and tokens."""

forests = st.lists(st.tuples(st.none() | st.integers(0, 9), st.sampled_from([0, 0, 1, 10, 200])), max_size=9)


@settings(max_examples=40)
@given(st.lists(forests, min_size=1, max_size=3))
def test_the_same_spans_count(traces: Sequence[Sequence[Node]]) -> None:
    expected = {
        str(trace): total
        for trace, nodes in enumerate(traces)
        if (total := sum_trace_tokens([as_span(trace, number, node) for number, node in enumerate(nodes)]).total_tokens)
    }
    with duckdb.connect() as connection:
        connection.execute("ATTACH ':memory:' AS warehouse; USE warehouse; SET TimeZone = 'UTC'")
        connection.execute(sql("warehouse"))
        rows = [as_row(trace, number, node) for trace, nodes in enumerate(traces) for number, node in enumerate(nodes)]
        if rows:
            connection.executemany(f"INSERT INTO spans VALUES ({', '.join('?' * len(rows[0]))})", rows)
        set_variables(connection)
        for step in ("reconcile_tables", "counted_spans", "reconcile"):
            connection.execute(sql(step))
        found = connection.execute("SELECT run_id, sum(input_tokens) FROM counted GROUP BY ALL").fetchall()
    assert {run_id: int(total) for run_id, total in found} == expected


def as_span(trace: int, number: int, node: Node) -> dict[str, Any]:
    parent, tokens = node
    attributes = {"gen_ai.usage.input_tokens": tokens, "gen_ai.usage.output_tokens": 0} if tokens else {}
    return {"trace_id": str(trace), "span_id": f"s{number}", "parent_span_id": f"s{parent}", "attributes": attributes}


def as_row(trace: int, number: int, node: Node) -> tuple[Any, ...]:
    parent, tokens = node
    ids = (trace * 100 + number, str(trace), f"s{number}", None if parent is None else f"s{parent}", str(trace), "acme")
    return (*ids, tokens, 0, 0, 0, 0, 0, 0, 0, None, None, NOVEMBER, NOVEMBER)


def set_variables(connection: duckdb.DuckDBPyConnection) -> None:
    month = NOVEMBER - timedelta(days=40), NOVEMBER + timedelta(days=40)
    values = {
        "period": PERIOD,
        "since": month[0],
        "until": month[1],
        "near_since": month[0],
        "near_until": month[1],
        "month_start": month[0],
        "month_end": month[1],
        "tolerance_tokens": 0,
    }
    for name, value in values.items():
        connection.execute(f"SET VARIABLE {name} = $value", {"value": value})
