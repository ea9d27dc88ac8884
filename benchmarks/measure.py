"""Contenders measured in turns, and what a table says of them.

Standard library only: the peer's process runs it too.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import threading
import time
from dataclasses import dataclass
from textwrap import fill
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

__all__ = ["Contender", "Rate", "Table", "Target", "compare", "in_tasks", "in_threads"]


WIDTH = 120


class Rate(NamedTuple):
    """What was done in one turn."""

    calls: int
    seconds: float
    cpu_s: float
    """Of the caller's process."""

    @property
    def per_second(self) -> float:
        """Calls a second."""
        return self.calls / self.seconds

    @property
    def cpu_us(self) -> float:
        """CPU time of the caller's process, a call."""
        return self.cpu_s / self.calls * 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One way to do the work. `turn` does it for so many seconds and raises where what was sent is not all there."""

    name: str
    does: str
    turn: Callable[[float], Rate]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """How fast one contender is to be beside another: `least` times its calls a second."""

    name: str
    beside: str
    least: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """What each contender did, by round. The first contender is the floor."""

    title: str
    contenders: Sequence[Contender]
    targets: Sequence[Target]
    rates: Mapping[str, Sequence[Rate]]
    notes: Sequence[str] = ()

    def ratios(self, name: str, beside: str) -> list[float]:
        """How many times the other's calls a second, by round: what drifts with the machine cancels out."""
        pairs = zip(self.rates[name], self.rates[beside], strict=True)
        return [mine.per_second / theirs.per_second for mine, theirs in pairs]

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON can say it."""
        floor = self.contenders[0].name
        return {
            "title": self.title,
            "floor": floor,
            "contenders": [
                {
                    "name": contender.name,
                    "does": contender.does,
                    "calls_per_s": [round(rate.per_second) for rate in self.rates[contender.name]],
                    "client_cpu_us": [round(rate.cpu_us, 1) for rate in self.rates[contender.name]],
                    "times_floor": _summary(self.ratios(contender.name, floor)),
                }
                for contender in self.contenders
            ],
            "targets": [
                {
                    "name": target.name,
                    "beside": target.beside,
                    "least": round(target.least, 2),
                    "times": _summary(self.ratios(target.name, target.beside)),
                    "met": _is_met(target, self),
                }
                for target in self.targets
            ],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        floor = self.contenders[0].name
        width = max(len(contender.name) for contender in self.contenders) + 2
        lines = [
            self.title,
            f"  {'':{width}}{'calls/s':>9}{'min to max':>19}{'x floor':>10}{'min to max':>16}{'client CPU':>15}",
        ]
        for contender in self.contenders:
            rates = self.rates[contender.name]
            speeds = [rate.per_second for rate in rates]
            spread = f"{min(speeds):,.0f} to {max(speeds):,.0f}"
            times = _summary(self.ratios(contender.name, floor))
            cpu_us = statistics.median(rate.cpu_us for rate in rates)
            lines.append(
                f"  {contender.name:{width}}{statistics.median(speeds):9,.0f}{spread:>19}"
                f"{times['median']:10.2f}{times['min']:8.2f} to {times['max']:.2f}{cpu_us:9.0f} us/call"
            )
        for target in self.targets:
            times = _summary(self.ratios(target.name, target.beside))
            lines.append(
                f"  target {'met' if _is_met(target, self) else 'MISSED'}: {target.name} is {times['median']:.2f} x "
                f"{target.beside} ({times['min']:.2f} to {times['max']:.2f}); at least {target.least:.2f}"
            )
        said = (*(f"{contender.name}: {contender.does}" for contender in self.contenders), *self.notes)
        lines += [fill(line, WIDTH, initial_indent="  ", subsequent_indent="    ") for line in said]
        return "\n".join(lines)


def compare(
    title: str,
    contenders: Sequence[Contender],
    targets: Sequence[Target],
    *,
    rounds: int,
    turn_s: float,
) -> Table:
    """Give each its turn in every round, one round forwards and the next backwards, after a short turn to warm up."""
    rates: dict[str, list[Rate]] = {contender.name: [] for contender in contenders}
    for contender in contenders:
        contender.turn(turn_s / 2)
    for place in range(rounds):
        for contender in contenders[:: -1 if place % 2 else 1]:
            gc.collect()  # what one leaves behind is not the next one's to pay
            rates[contender.name].append(contender.turn(turn_s))
    return Table(title=title, contenders=contenders, targets=targets, rates=rates)


def in_threads(call: Callable[[], object], *, threads: int, seconds: float) -> Rate:
    """Call it from so many threads for so long. Raises what a call raises."""
    calls = [0] * threads
    errors: list[BaseException] = []

    def run(place: int) -> None:
        done = 0
        try:
            while time.perf_counter() < until:
                call()
                done += 1
        except BaseException as exc:  # noqa: BLE001  raised again where it is seen
            errors.append(exc)
        calls[place] = done

    workers = [threading.Thread(target=run, args=(place,)) for place in range(threads)]
    start, cpu = time.perf_counter(), time.process_time()
    until = start + seconds
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    return Rate(sum(calls), time.perf_counter() - start, time.process_time() - cpu)


async def in_tasks(call: Callable[[], Awaitable[object]], *, tasks: int, seconds: float) -> Rate:
    """Await it in so many tasks for so long. Raises what a call raises."""

    async def run() -> int:
        done = 0
        while time.perf_counter() < until:
            await call()
            done += 1
        return done

    start, cpu = time.perf_counter(), time.process_time()
    until = start + seconds
    calls = sum(await asyncio.gather(*[run() for _ in range(tasks)]))
    return Rate(calls, time.perf_counter() - start, time.process_time() - cpu)


def _summary(ratios: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(ratios), 2),
        "min": round(min(ratios), 2),
        "max": round(max(ratios), 2),
    }


def _is_met(target: Target, table: Table) -> bool:
    return statistics.median(table.ratios(target.name, target.beside)) >= target.least
