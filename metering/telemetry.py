"""OpenTelemetry metrics of a meter, for apps that have OpenTelemetry (the extra `otel`): `instrument(meter)`."""

from __future__ import annotations

import weakref
from functools import wraps
from typing import TYPE_CHECKING, Any

from opentelemetry import metrics
from opentelemetry.metrics import Observation

from metering.admission.protocol import Undecided
from metering.aio import AsyncMeter
from metering.clock import utc_now
from metering.errors import MeteringError, StoreUnavailable
from metering.spool import Spool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from datetime import datetime

    from opentelemetry.metrics import CallbackOptions, MeterProvider

    from metering.admission.protocol import Admission, Decision
    from metering.drain import ShardLag
    from metering.meter import Meter
    from metering.spool import SpoolState

__all__ = ["instrument"]


def instrument(meter: Meter | AsyncMeter, meter_provider: MeterProvider | None = None) -> None:
    """Count and observe what a meter does. Call it once for each meter, in the process that uses it.

    | metric | says |
    |---|---|
    | `tallystick.admissions` | counts calls that may run, by `line`, `plan`, `outcome`: admitted, replayed, unchecked |
    | `tallystick.refusals` | counts calls that a limit refused, by `line`, `plan` and `limit.metric` |
    | `tallystick.undecided` | counts calls answered `StoreUnavailable`, by `line`; `in_doubt`: it may be admitted |
    | `tallystick.signals.dropped` | counts what `record` could not keep |
    | `tallystick.spool.lines`, `.age` | what waits on this machine, and for how many seconds |
    | `tallystick.drain.events`, `.age` | what Redis has and the ledger has not, and for how many seconds |

    Gauges are read when metrics are exported; what cannot be read then is left out. Those of the drain ask each shard
    of Redis, and are the same in every process. `meter_provider` is the global one unless it is given.
    """
    otel = (meter_provider or metrics.get_meter_provider()).get_meter("tallystick")
    admissions = otel.create_counter("tallystick.admissions", "{call}", "Calls that may run")
    refusals = otel.create_counter("tallystick.refusals", "{call}", "Calls that a limit refused")
    undecided = otel.create_counter("tallystick.undecided", "{call}", "Calls whose store was away")

    def decided(admission: Admission, decision: Decision) -> None:
        named = {"line": admission.call.line, "plan": decision.plan}
        if decision.refused_by is not None:
            refusals.add(1, {**named, "limit.metric": decision.refused_by.limit.metric})
        else:
            outcome = "replayed" if decision.replayed else "unchecked" if decision.unchecked else "admitted"
            admissions.add(1, {**named, "outcome": outcome})

    def away(admission: Admission, error: StoreUnavailable) -> None:
        undecided.add(1, {"line": admission.call.line, "in_doubt": isinstance(error, Undecided)})

    if isinstance(meter, AsyncMeter):
        meter._store.admit = _counted_when_awaited(meter._store.admit, decided, away)  # type: ignore[method-assign]
        _observe(otel, meter._blocking)
    else:
        meter._store.admit = _counted(meter._store.admit, decided, away)  # type: ignore[method-assign]
        _observe(otel, meter)


def _counted(admit: Callable[..., Decision], decided: Callable[..., None], away: Callable[..., None]) -> Any:
    @wraps(admit)
    def counted(admission: Admission, *rest: Any) -> Decision:
        try:
            decision = admit(admission, *rest)
        except StoreUnavailable as exc:
            away(admission, exc)
            raise
        decided(admission, decision)
        return decision

    return counted


def _counted_when_awaited(admit: Callable[..., Any], decided: Callable[..., None], away: Callable[..., None]) -> Any:
    @wraps(admit)
    async def counted(admission: Admission, *rest: Any) -> Decision:
        try:
            decision: Decision = await admit(admission, *rest)
        except StoreUnavailable as exc:
            away(admission, exc)
            raise
        decided(admission, decision)
        return decision

    return counted


def _observe(otel: metrics.Meter, meter: Meter) -> None:
    # What is read at each export must not keep a meter alive that its app has let go.
    known = weakref.ref(meter)

    def read_by(look: Callable[[Meter], float | None]) -> list[Callable[[CallbackOptions], Iterable[Observation]]]:
        def callback(_: CallbackOptions) -> Iterable[Observation]:
            try:
                value = None if (found := known()) is None else look(found)
            except MeteringError:  # away: there is nothing to say
                return []
            return [] if value is None else [Observation(value)]

        return [callback]

    otel.create_observable_counter(
        "tallystick.signals.dropped", read_by(lambda found: found.dropped), "{signal}", "Signals that were not kept"
    )
    gauges: list[tuple[str, str, str, Callable[[Meter], float | None]]] = [
        ("tallystick.spool.lines", "{line}", "Facts that wait on this machine", lambda found: _spool(found).lines),
        ("tallystick.spool.age", "s", "Since the oldest waits", lambda found: _age_s(_spool(found).oldest)),
        ("tallystick.drain.events", "{event}", "Events that the ledger has not yet", _undrained),
        ("tallystick.drain.age", "s", "Age of the oldest of them", _undrained_s),
    ]
    for name, unit, says, look in gauges:
        otel.create_observable_gauge(name, read_by(look), unit, says)


def _spool(meter: Meter) -> SpoolState:
    return Spool(meter._courier._folder).pending()


def _age_s(since: datetime | None) -> float:
    return 0.0 if since is None else max(0.0, (utc_now() - since).total_seconds())


def _undrained(meter: Meter) -> float | None:
    return None if meter._redis is None else sum(lag.entries for lag in _lags(meter))


def _undrained_s(meter: Meter) -> float | None:
    return None if meter._redis is None else max((lag.oldest_s or 0.0 for lag in _lags(meter)), default=0.0)


def _lags(meter: Meter) -> list[ShardLag]:
    from metering.drain import Drain  # noqa: PLC0415  an app without Redis need not have its client

    assert meter._redis is not None
    return Drain(meter.ledger, meter._redis.link).lag()
