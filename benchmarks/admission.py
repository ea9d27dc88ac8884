"""`Meter.consume` on the ledger beside its floor: the same statements through bare `sqlite3`, one commit each.

    python -m benchmarks.admission [--calls 2000] [--rounds 5]

Both run in turns, on ledgers of their own, at synchronous=FULL: the ratio holds while the machine's speed drifts.
"""

from __future__ import annotations

import statistics
import threading
import time
from argparse import ArgumentParser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from metering import Meter, TokenUsage
from metering.ledger.sqlite import connect

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable

USAGE = TokenUsage(input_tokens=812, output_tokens=120)


def main() -> None:
    """Print microseconds per call, and the ratio to the floor."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with TemporaryDirectory() as folder:
        floor = _Floor(Path(folder) / "floor.db")
        meter = Meter(f"sqlite:///{folder}/meter.db")
        secret = meter.keys.create("acme", plan="enterprise").secret

        def consume() -> None:
            meter.consume(secret, line="application", usage=USAGE, provider="openai", model="gpt-4.1-mini")

        rows: dict[str, list[float]] = {"floor": [], "1 thread": [], "8 threads": []}
        for _ in range(given.rounds):
            rows["floor"].append(_timed(floor.consume, given.calls, 1))
            rows["1 thread"].append(_timed(consume, given.calls, 1))
            rows["8 threads"].append(_timed(consume, given.calls, 8))
        meter.close()
    print(f"{'':12}{'us a call':>12}{'x floor':>10}{'x floor, min to max':>22}")
    for name, times in rows.items():
        ratios = [mine / theirs for mine, theirs in zip(times, rows["floor"], strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{name:12}{statistics.median(times) * 1e6:12.0f}{statistics.median(ratios):10.2f}{spread:>22}")


def _timed(call: Callable[[], None], calls: int, threads: int) -> float:
    """Seconds a call."""

    def run() -> None:
        for _ in range(calls // threads):
            call()

    workers = [threading.Thread(target=run) for _ in range(threads)]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return (time.perf_counter() - start) / calls


class _Floor:
    """The statements of one real `consume`, recorded, and replayed with new ids."""

    def __init__(self, path: Path) -> None:
        with Meter(f"sqlite:///{path}") as meter:
            secret = meter.keys.create("acme", plan="enterprise").secret
            recorded: list[tuple[str, dict[str, Any]]] = []
            run = meter.ledger.writer.run
            meter.ledger.writer.run = lambda work: run(lambda cursor: work(_Recorder(cursor, recorded)))  # type: ignore[method-assign]
            for _ in range(2):  # the first call also notes when its key was last used
                recorded.clear()
                meter.consume(secret, line="application", usage=USAGE, provider="openai", model="gpt-4.1-mini")
        self._statements = recorded
        self._connection = connect(path, timeout_s=5)

    def consume(self) -> None:
        """One transaction."""
        cursor = self._connection.cursor()
        event_id = uuid4().hex
        cursor.execute("BEGIN IMMEDIATE")
        for sql, values in self._statements:
            cursor.execute(sql, values | {"event_id": event_id} if "event_id" in values else values).fetchall()
        cursor.execute("COMMIT")


class _Recorder:
    def __init__(self, cursor: sqlite3.Cursor, recorded: list[tuple[str, dict[str, Any]]]) -> None:
        self._cursor = cursor
        self._recorded = recorded

    def execute(self, sql: str, values: dict[str, Any] | None = None) -> sqlite3.Cursor:
        self._recorded.append((sql, dict(values or {})))
        return self._cursor.execute(sql, values or {})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cursor, name)


if __name__ == "__main__":
    main()
