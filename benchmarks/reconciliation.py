"""What it costs to reconcile a month: `python -m benchmarks.reconciliation`.

A call is an event, of two million beside two million spans, and spans of agents above some, which repeat them. The
floor is the bare join in DuckDB, on the same file, which knows that agents are one level above. Ours finds what repeats
at any depth, knows a model by all its names, leaves out what may still change, judges and prices what differs, and
writes the verdicts into a ledger.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from benchmarks.measure import Contender, Rate, Target, compare
from metering.billing.reconciliation import Tolerance
from metering.meter import Meter
from tasks.reconcile import reconcile
from tasks.warehouse import lease, open_for_reading, open_for_writing

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.measure import Table

__all__ = ["reconciliation_table"]

EVENTS = 2_000_000
CALLS_A_RUN = 4
ACCOUNTS = 50
PERIOD = "2023-11"
NOW = datetime(2023, 12, 2, tzinfo=UTC)
TOO_MUCH = 100
"""Runs of which one call was traced with other counts."""

_MADE = """
CREATE TEMP TABLE calls AS
SELECT
    i AS seq,
    i // {per_run} AS run,
    md5((i // {per_run})::VARCHAR) AS run_id,
    'account-' || (i // {per_run}) % {accounts} AS account,
    CASE WHEN i % {per_run} = 0 THEN 'gpt-4.1' ELSE 'gpt-4.1-mini' END AS model,
    1000 + i % 977 AS input_tokens,
    200 + i % 97 AS output_tokens,
    TIMESTAMPTZ '2023-11-01' + INTERVAL (i // 2 % 2500000) SECOND AS at_time
FROM range({events}) AS made(i);
INSERT INTO usage_events
SELECT
    seq + 1, uuid(), 'usage', NULL, account, NULL, 1, 'application', NULL, 'production_agent', at_time, at_time,
    '2023-11', 1, input_tokens, 100, 0, 0, 0, output_tokens, 20, 0, 0, 'openai', model, NULL, run_id, NULL, true, true,
    false, false, NULL, NULL, 0.001
FROM calls;
INSERT INTO spans
SELECT
    seq + 1, run_id, substr(md5('call' || seq), 1, 16),
    CASE WHEN run % 10 = 0 THEN substr(md5('agent' || run), 1, 16) END,
    run_id, account, input_tokens + CASE WHEN seq % {per_run} = 0 AND run < {faults} THEN 50 ELSE 0 END, 100, 0, 0, 0,
    output_tokens, 20, 0, 'openai', model, at_time, at_time
FROM calls;
INSERT INTO spans
SELECT
    {events} + run + 1, run_id, substr(md5('agent' || run), 1, 16), NULL, run_id, account, sum(input_tokens), 400,
    0, 0, 0, sum(output_tokens), 80, 0, 'openai', 'gpt-4.1-mini', min(at_time), max(at_time)
FROM calls WHERE run % 10 = 0 GROUP BY run, run_id, account;
INSERT INTO load_watermark VALUES ('benchmark', {events});
INSERT INTO span_watermark VALUES ({events});
"""


def reconciliation_table(folder: Path, *, rounds: int) -> Table:
    """One table: ours beside the floor."""
    warehouse, ledger_url = folder / "warehouse.duckdb", f"sqlite:///{folder / 'ledger.db'}"
    with Meter(ledger_url) as meter:
        for number in range(ACCOUNTS):
            meter.accounts.create(f"account-{number}", plan="pro")
    with lease(warehouse, exclusive=True), open_for_writing(warehouse) as connection:
        connection.execute(_MADE.format(events=EVENTS, per_run=CALLS_A_RUN, accounts=ACCOUNTS, faults=TOO_MUCH))
    bare = Path(__file__).with_suffix(".sql").read_text(encoding="utf-8")

    def join() -> None:
        with open_for_reading(warehouse) as connection:
            ((differing,),) = connection.execute(bare).fetchall()
        assert differing == TOO_MUCH

    def ours() -> None:
        number = reconcile(ledger_url, warehouse, PERIOD, now=NOW, tolerance=Tolerance())
        with Meter(ledger_url) as meter, meter.ledger.read() as connection:
            found = connection.exec_driver_sql(
                f"SELECT verdict, count(*) FROM verdicts WHERE reconciliation = {number} GROUP BY verdict"
            ).all()
        assert found == [("mismatched", TOO_MUCH)]

    contenders = [
        Contender(
            name="bare join", does="both sides grouped, joined and compared in DuckDB", turn=partial(_once, join)
        ),
        Contender(name="reconcile", does="the whole task, verdicts written", turn=partial(_once, ours)),
    ]
    targets = [Target(name="reconcile", beside="bare join", least=0.5)]
    title = f"{EVENTS:,} events reconciled with as many spans"
    return compare(title, contenders, targets, rounds=rounds, turn_s=0)


def _once(work: Callable[[], None], _seconds: float) -> Rate:
    start, cpu = time.perf_counter(), time.process_time()
    work()
    return Rate(EVENTS, time.perf_counter() - start, time.process_time() - cpu)


if __name__ == "__main__":
    with TemporaryDirectory(prefix="tallystick-bench-") as place:
        print(reconciliation_table(Path(place), rounds=5))
