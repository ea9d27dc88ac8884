"""What a run of retention costs those who are admitted meanwhile: `python -m benchmarks.retention --on postgres`.

A request log of two million rows, half of them over, beside another process that has calls admitted and logged, one
after the other: how long these take before the run and during it, the longest time a batch kept other writers out, and
by how much the job's memory grew.
"""

from __future__ import annotations

import json
import os
import resource
import select
import subprocess
import sys
import time
from argparse import ArgumentParser
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import quantiles
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from metering.clock import utc_now
from metering.ledger import log_partitions
from metering.ledger.retention import Kept, rules, shrink, sweep
from metering.meter import Meter
from tests.servers import PostgresServer

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["measured"]

ROWS = 2_000_000
DAYS = 45
"""So long ago the log began: by now half of it is over."""
SAID = {"text": "x" * 500}
BEFORE_S = 5.0
EVERY_S = 0.005
"""Between two calls: without a pause they alone would keep the ledger busy."""

# Account by account in turn, in the order of time: five keep a week, three a month and two a quarter.
_KEPT_DAYS = "(CASE WHEN n % 10 < 5 THEN 7 WHEN n % 10 < 8 THEN 30 ELSE 90 END)"
_FILL = {
    "sqlite": f"""
        WITH RECURSIVE numbers(n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM numbers WHERE n + 1 < {{rows}}),
        said AS (SELECT n, n * {{days}} * 86400 / {{rows}} AS since, {_KEPT_DAYS} AS kept FROM numbers)
        INSERT INTO request_log (account, line, logged_at, expires_at, request, response)
        SELECT 'account-' || (n % 10), 'application',
            strftime('%Y-%m-%dT%H:%M:%S', '{{start}}', since || ' seconds') || '.000000Z',
            strftime('%Y-%m-%dT%H:%M:%S', '{{start}}', (since + kept * 86400) || ' seconds') || '.000000Z',
            '"' || hex(randomblob(150)) || '"', '"' || hex(randomblob(150)) || '"'
        FROM said""",
    "postgresql": f"""
        INSERT INTO request_log (account, line, logged_at, expires_at, request, response)
        SELECT 'account-' || (n % 10), 'application', logged_at, logged_at + make_interval(days => {_KEPT_DAYS}),
            '"' || repeat(md5(n::text), 9) || '"', '"' || repeat(md5(n::text), 9) || '"'
        FROM (
            SELECT n, timestamptz '{{start}}+00' + make_interval(secs => n * {{days}} * 86400.0 / {{rows}}) AS logged_at
            FROM generate_series(0, {{rows}} - 1) AS made(n)
        ) AS said""",
}


def main() -> None:
    """Print what was seen as JSON; with `--admit` be the other process."""
    parser = ArgumentParser(prog="python -m benchmarks.retention", description=__doc__)
    parser.add_argument("--rows", type=int, default=ROWS, help="default: %(default)s")
    parser.add_argument("--on", choices=("sqlite", "postgres"), default="sqlite", help="default: %(default)s")
    parser.add_argument("--admit", metavar="URL")
    given = parser.parse_args()
    if given.admit:
        _admit(given.admit)
        return
    with TemporaryDirectory(prefix="tallystick-bench-") as folder, _ledger(given.on, Path(folder)) as url:
        print(json.dumps(measured(url, given.rows), indent=2))


@contextmanager
def _ledger(on: str, folder: Path) -> Iterator[str]:
    if on == "sqlite":
        yield f"sqlite:///{folder / 'ledger.db'}"
        return
    with PostgresServer() as server:
        yield server.database()


def measured(url: str, rows: int, before_s: float = BEFORE_S) -> dict[str, Any]:
    """Fill a new ledger with so many rows, half of them over, and delete these beside admissions."""
    now = utc_now()
    with Meter(url, create=True) as meter:
        secret = meter.keys.create("live", plan="enterprise").secret
        _fill(meter, rows, now)
        other = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.retention", "--admit", url],
            cwd=Path(__file__).parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert other.stdin is not None
        assert other.stdout is not None
        other.stdin.write(f"{secret}\n")
        other.stdin.flush()
        assert other.stdout.readline() == "ready\n"
        time.sleep(before_s)
        memory_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        other.stdin.write("now\n")
        other.stdin.flush()
        began = time.monotonic()
        dropped: Any = log_partitions.drop_past(meter.ledger, now) if meter.ledger.dialect == "postgresql" else {}
        dropped_s = time.monotonic() - began
        swept = sweep(meter.ledger, rules(now, Kept())[0])
        swept_s = time.monotonic() - began - dropped_s
        pages = shrink(meter.ledger)
        took_s = time.monotonic() - began
        grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_kb
        latencies, _ = other.communicate()
        return {
            "rows": rows,
            "dropped_with_partitions": sum(dropped.values()),
            "deleted_by_row": swept.gone.total(),
            "took_s": round(took_s, 1),
            "of_it": {"dropping": round(dropped_s, 1), "deleting": round(swept_s, 1), "pages_given_back": pages},
            "longest_batch_ms": round(swept.longest_s * 1000, 1),
            "memory_grown_mib": round(grown_kb / 1024, 1),
            "admissions_ms": json.loads(latencies),
        }


def _fill(meter: Meter, rows: int, now: datetime) -> None:
    start = now.astimezone(UTC).replace(microsecond=0) - timedelta(days=DAYS)
    dialect = meter.ledger.dialect
    with meter.ledger.write() as connection:
        if dialect == "postgresql":  # as runs of each day before have made them
            for day in range(2 * DAYS + 60):
                log_partitions._make(connection, start.date() + timedelta(days=day))
        fill = _FILL[dialect].format(rows=rows, days=DAYS, start=start.strftime("%Y-%m-%d %H:%M:%S"))
        connection.execute(sa.text(fill.replace(":", r"\:")))
    if dialect == "postgresql":  # a log that grew in 45 days is not on its way to the disk
        with meter.ledger.write() as connection:
            connection.exec_driver_sql("CHECKPOINT")


def _admit(url: str) -> None:
    """Have calls admitted until standard input ends; say how long they took before the first word and after it."""
    secret = sys.stdin.readline().strip()
    phases: list[list[float]] = [[], []]
    with Meter(url) as meter:
        meter.consume(secret, line="application")
        print("ready", flush=True)
        phase = 0
        while True:
            readable, _, _ = select.select([sys.stdin], [], [], 0)
            if readable:
                if not os.read(sys.stdin.fileno(), 64):
                    break
                phase = 1
            began = time.perf_counter()
            assert meter.consume(secret, line="application", request=SAID, response=SAID).allowed
            phases[phase].append((time.perf_counter() - began) * 1000)
            time.sleep(EVERY_S)
    print(json.dumps({name: _summary(found) for name, found in zip(("before", "beside"), phases, strict=True)}))


def _summary(found: list[float]) -> dict[str, float]:
    if len(found) < 2:
        return {"calls": len(found)}
    cuts = quantiles(found, n=1000)
    return {
        "calls": len(found),
        "median": round(cuts[499], 2),
        "p99": round(cuts[989], 2),
        "p99.9": round(cuts[998], 2),
        "longest": round(max(found), 1),
    }


if __name__ == "__main__":
    main()
