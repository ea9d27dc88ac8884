"""Metrics for OpenTelemetry, as its own API hands them on. Its SDK is not needed, and not here."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import create_autospec

import pytest
from opentelemetry.metrics import CallbackOptions, MeterProvider
from opentelemetry.metrics import Meter as OtelMeter

from metering import AsyncMeter, Limit, Meter, Plan, TokenUsage
from metering.errors import LimitExceeded, Replayed, StoreUnavailable
from metering.telemetry import instrument
from tests.servers import RedisServer

if TYPE_CHECKING:
    from collections.abc import Callable

PLAN = Plan(name="two", retention_days=30, limits=(Limit(metric="requests", per="month", max=2),))


class Collector:
    """A meter provider that remembers what is added, and asks what is observed."""

    def __init__(self) -> None:
        self.added: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        self._observed: dict[str, Any] = {}
        # Checks names and arguments against the API.
        meter = create_autospec(OtelMeter, instance=True)
        meter.create_counter.side_effect = self._counter
        meter.create_observable_gauge.side_effect = self._observable
        meter.create_observable_counter.side_effect = self._observable
        self.provider = create_autospec(MeterProvider, instance=True)
        self.provider.get_meter.return_value = meter

    def observed(self, name: str) -> list[float]:
        [callback] = self._observed[name]
        return [observation.value for observation in callback(CallbackOptions())]

    def _counter(self, name: str, unit: str, description: str) -> Any:
        counter = create_autospec(OtelMeter.create_counter)
        counter.add = lambda amount, attributes: self.added[name].append({"amount": amount, **attributes})
        return counter

    def _observable(self, name: str, callbacks: Any, unit: str, description: str) -> None:
        self._observed[name] = callbacks


@pytest.fixture
def collector() -> Collector:
    return Collector()


def test_what_is_decided_is_counted(meter: Meter, collector: Collector) -> None:
    meter.apply_plans([PLAN])
    secret = meter.keys.create("acme", plan="two").secret
    instrument(meter, collector.provider)
    meter.consume(secret, line="chat", idempotency_key="1")
    meter.consume(secret, line="chat", idempotency_key="1")
    with meter.reserve(secret, line="vision") as hold:
        hold.settle(TokenUsage(input_tokens=3))
    assert not meter.consume(secret, line="chat").allowed
    with pytest.raises(LimitExceeded):
        meter.reserve(secret, line="vision")
    assert [tuple(row.values()) for row in collector.added["tallystick.admissions"]] == [
        (1, "chat", "two", "admitted"),
        (1, "chat", "two", "replayed"),
        (1, "vision", "two", "admitted"),
    ]
    assert collector.added["tallystick.refusals"] == [
        {"amount": 1, "line": line, "plan": "two", "limit.metric": "requests"} for line in ("chat", "vision")
    ]
    assert not collector.added["tallystick.undecided"]
    assert collector.observed("tallystick.signals.dropped") == [0]
    assert collector.observed("tallystick.spool.lines") == collector.observed("tallystick.spool.age") == [0]
    assert collector.observed("tallystick.drain.events") == collector.observed("tallystick.drain.age") == []


async def counted_when_awaited(ledger_url: str, collector: Collector) -> None:
    async with AsyncMeter(ledger_url) as meter:
        await meter.apply_plans([PLAN])
        secret = (await meter.keys.create("acme", plan="two")).secret
        instrument(meter, collector.provider)
        await meter.consume(secret, line="chat", idempotency_key="1")
        with pytest.raises(Replayed):
            await meter.reserve(secret, line="chat", idempotency_key="1", request=None)
        await meter.consume(secret, line="chat")
        await meter.consume(secret, line="chat")


def test_what_is_awaited_is_counted_once(ledger_url: str, collector: Collector) -> None:
    import asyncio

    asyncio.run(counted_when_awaited(ledger_url, collector))
    outcomes = [row["outcome"] for row in collector.added["tallystick.admissions"]]
    assert outcomes == ["admitted", "replayed", "admitted"]
    assert len(collector.added["tallystick.refusals"]) == 1


def test_what_waits_is_observed(ledger_url: str, collector: Collector) -> None:
    with (
        RedisServer(appendonly=True) as server,
        Meter(ledger_url, quota_url=server.url, quota_timeout_s=2, spool=Path("spool")) as meter,
    ):
        secret = meter.keys.create("acme", plan="pro").secret
        instrument(meter, collector.provider)
        hold = meter.reserve(secret, line="chat")
        meter.consume(secret, line="chat")
        assert collector.observed("tallystick.drain.events") == [1]
        assert collector.observed("tallystick.drain.age")[0] >= 0
        server.kill()
        with pytest.raises(StoreUnavailable):
            meter.consume(secret, line="chat")
        [undecided] = collector.added["tallystick.undecided"]
        assert (undecided["amount"], undecided["line"]) == (1, "chat")
        hold.settle(TokenUsage())
        # The settle, and a cancel of the call where nobody can tell whether it was admitted.
        assert collector.observed("tallystick.spool.lines") == [1 + undecided["in_doubt"]]
        assert collector.observed("tallystick.spool.age")[0] > 0
        assert collector.observed("tallystick.drain.events") == []
        server.start()


def test_a_meter_that_is_gone_is_not_asked(open_meter: Callable[..., Meter], ledger_url: str) -> None:
    collector = Collector()
    meter = Meter(ledger_url)
    instrument(meter, collector.provider)
    meter.close()
    del meter
    import gc

    gc.collect()
    assert collector.observed("tallystick.signals.dropped") == []


def test_without_a_provider_nothing_is_sent_and_nothing_breaks(meter: Meter) -> None:
    instrument(meter)
    assert meter.consume(meter.keys.create("acme", plan="pro").secret, line="chat").allowed
