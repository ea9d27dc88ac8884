"""Admissions in the ledger itself, at synchronous=FULL, beside the same statements through bare `sqlite3`."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack, closing
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.measure import Contender, Target, compare, in_tasks, in_threads
from benchmarks.redis_store import PLAN, SAID, TASKS, THREADS, USAGE
from metering import AsyncMeter, Meter
from metering.events import new_event_id
from metering.ledger.sqlite import connect

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable
    from pathlib import Path

    from benchmarks.measure import Rate, Table

__all__ = ["sql_table"]


def sql_table(folder: Path, *, rounds: int, turn_s: float) -> Table:
    """`Meter.consume` by one thread and by many, and `AsyncMeter.consume`; each on a ledger of its own."""
    with ExitStack() as stack:
        runner = stack.enter_context(asyncio.Runner())
        floor = stack.enter_context(closing(_Floor(folder / "floor.db")))
        alone, shared = (_Ledger(folder / f"{name}.db") for name in ("alone", "shared"))
        for ledger in (alone, shared):
            stack.enter_context(ledger.meter)
        awaited = _Ledger(folder / "awaited.db", AsyncMeter)
        stack.callback(lambda: runner.run(awaited.meter.aclose()))

        def consume(ledger: _Ledger) -> None:
            assert ledger.meter.consume(ledger.secret, **SAID).allowed

        async def consume_async() -> None:
            assert (await awaited.meter.consume(awaited.secret, **SAID)).allowed

        def threads(call: Callable[[], None], number: int, seconds: float) -> Rate:
            return in_threads(call, threads=number, seconds=seconds)

        def tasks(seconds: float) -> Rate:
            return runner.run(in_tasks(consume_async, tasks=TASKS, seconds=seconds))

        does = "three limits and the event, answered with a Decision once it is durable"
        contenders = [
            Contender(
                name="bare sqlite3, 1 thread",
                does="the statements of one consume with a fresh id each, one commit each; nothing else",
                turn=floor.counted(partial(threads, floor.consume, 1)),
            ),
            Contender(
                name="Meter.consume, 1 thread",
                does=does,
                turn=alone.counted(partial(threads, partial(consume, alone), 1)),
            ),
            Contender(
                name=f"Meter.consume, {THREADS} threads",
                does="the same; those who wait meanwhile share a commit",
                turn=shared.counted(partial(threads, partial(consume, shared), THREADS)),
            ),
            Contender(
                name=f"AsyncMeter.consume, {TASKS} tasks",
                does="the same; tasks share commits",
                turn=awaited.counted(tasks),
            ),
        ]
        targets = [
            Target(name=contender.name, beside=contenders[0].name, least=least)
            for contender, least in zip(contenders[1:], (1 / 1.7, 2, 4), strict=True)
        ]
        return compare(
            "SQL, synchronous=FULL (without idempotency keys)", contenders, targets, rounds=rounds, turn_s=turn_s
        )


class _Ledger:
    """A meter with an account on the plan, on a ledger of its own."""

    def __init__(self, path: Path, kind: Any = Meter) -> None:
        with Meter(f"sqlite:///{path}") as office:
            office.apply_plans([PLAN])
            self.secret = office.keys.create("acme", plan=PLAN.name).secret
        self.meter = kind(f"sqlite:///{path}")
        self._blocking: Meter = self.meter if isinstance(self.meter, Meter) else self.meter._blocking
        self._blocking.consume(self.secret, **SAID)  # the first also notes when its key was last used

    def counted(self, turn: Callable[[float], Rate]) -> Callable[[float], Rate]:
        """The turn; afterwards every call of it must be an event of the ledger, and in the month's counter."""

        def checked(seconds: float) -> Rate:
            before = self._kept()
            rate = turn(seconds)
            kept = [now - then for now, then in zip(self._kept(), before, strict=True)]
            assert kept == [rate.calls, rate.calls, rate.calls * USAGE.total_tokens], (rate.calls, kept)
            return rate

        return checked

    def _kept(self) -> list[int]:
        month = self._blocking.quota("acme")[0].used
        (total,) = self._blocking.usage("acme")
        return [int(month), total.requests, total.input_tokens + total.output_tokens]


class _Floor:
    """The statements of one real `consume`, recorded, and replayed with new ids."""

    def __init__(self, path: Path) -> None:
        ledger = _Ledger(path)
        with ledger.meter as meter:
            recorded: list[tuple[str, Any]] = []
            run = meter.ledger.writer.run
            meter.ledger.writer.run = lambda work: run(lambda cursor: work(_Recorder(cursor, recorded)))
            decision = meter.consume(ledger.secret, **SAID)
        self._statements = recorded
        self._event_id = decision.event_id.hex
        self._connection = connect(path, timeout_s=5)
        # Its counters are put as they were then: only the events grow.
        (self._events,) = self._connection.execute("SELECT count(*) FROM events").fetchone()

    def consume(self) -> None:
        """One transaction."""
        cursor = self._connection.cursor()
        event_id = new_event_id().hex
        cursor.execute("BEGIN IMMEDIATE")
        for sql, values in self._statements:
            cursor.execute(sql, self._with(event_id, values)).fetchall()
        cursor.execute("COMMIT")

    def counted(self, turn: Callable[[float], Rate]) -> Callable[[float], Rate]:
        """The turn; afterwards every call of it must be an event of the ledger."""

        def checked(seconds: float) -> Rate:
            rate = turn(seconds)
            self._events += rate.calls
            (events,) = self._connection.execute("SELECT count(*) FROM events").fetchone()
            assert events == self._events, (events, self._events)
            return rate

        return checked

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _with(self, event_id: str, values: Any) -> Any:
        if isinstance(values, dict):
            return values | {"event_id": event_id} if "event_id" in values else values
        return tuple(event_id if value == self._event_id else value for value in values)


class _Recorder:
    def __init__(self, cursor: sqlite3.Cursor, recorded: list[tuple[str, Any]]) -> None:
        self._cursor = cursor
        self._recorded = recorded

    def execute(self, sql: str, values: Any = ()) -> sqlite3.Cursor:
        self._recorded.append((sql, values))
        return self._cursor.execute(sql, values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cursor, name)
