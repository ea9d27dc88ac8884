"""Spans from the app itself: recorded one by one, or by the span processor."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.context import Context
from opentelemetry.sdk.trace import IdGenerator, TracerProvider
from opentelemetry.trace import Span, set_span_in_context

from metering.aio import AsyncMeter
from metering.errors import InvalidUsage
from metering.meter import Meter
from metering.traces import otel
from metering.traces.otel import TallystickSpanProcessor
from tests.metering.span_rows import ON_SQLITE, USED, contents, numbers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.conftest import Clock


@pytest.fixture
def ledger_url(either_url: str) -> str:
    return either_url


def span(number: int = 1, parent: int | None = None, /, **said: Any) -> dict[str, Any]:
    return {
        "trace_id": "t",
        "span_id": f"{number:016x}",
        "parent_span_id": None if parent is None else f"{parent:016x}",
        "name": "chat",
        "attributes": USED | said,
    }


@contextmanager
def locked(meter: Meter) -> Iterator[None]:
    """Another writer holds the ledger's spans."""
    if meter.ledger.dialect == "sqlite":
        other = sqlite3.connect(meter.ledger.path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")
        other.close()
    else:
        with meter.ledger.write() as connection:
            connection.exec_driver_sql("LOCK TABLE spans IN ACCESS EXCLUSIVE MODE")
            yield


@pytest.fixture
def impatient(open_meter: Callable[..., Meter], tmp_path: Path) -> Meter:
    return open_meter(timeout_s=0.1, spool=tmp_path / "spool", strict_signals=False)


def test_a_recorded_span_counts_once(meter: Meter) -> None:
    for _ in range(2):
        assert meter.record_span(span(), account="acme", run_id="r")
    assert meter.record_span({**span(), "attributes": {}}, account="other")
    assert contents(meter, "account", "run_id", "input_tokens") == [("acme", "r", 10)]


def test_many_at_once_record_each_span_once(open_meter: Callable[..., Meter]) -> None:
    meters = [open_meter() for _ in range(2)]
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda n: meters[n % 2].record_span(span(1 + n // 4)), range(200)))
    assert all(done)
    assert len(contents(meters[0], "seq")) == 50


@ON_SQLITE
def test_recording_never_raises(impatient: Meter, caplog: pytest.LogCaptureFixture) -> None:
    for alien in (None, 5, {}, {"span_id": "a"}, span() | {"trace_id": "x" * 256}, span() | {"span_id": "a\0"}):
        assert not impatient.record_span(alien)
    assert not impatient.record_span(span(), account="")
    assert impatient.dropped == 7
    assert caplog.text.count("a span was dropped") == 7


@ON_SQLITE
def test_in_tests_recording_raises(meter: Meter) -> None:
    with pytest.raises(InvalidUsage, match="trace_id"):
        meter.record_span({"span_id": "a"})


def test_spans_wait_for_a_ledger_that_is_away(impatient: Meter) -> None:
    with locked(impatient):
        assert impatient.record_span(span(1))
        assert impatient.record_span(span(1))
        assert impatient.record_span(span(2))
        assert [len(file.read_bytes()) > 0 for file in (impatient._courier._folder).iterdir()] == [True]
    impatient.flush()
    assert numbers(impatient) == {1, 2}
    assert impatient.dropped == 0


def test_awaited(ledger_url: str, clock: Clock, tmp_path: Path) -> None:
    async def record() -> tuple[list[bool], int]:
        async with AsyncMeter(ledger_url, clock=clock, timeout_s=0.1, spool=tmp_path / "spool") as meter:
            told = await asyncio.gather(*(meter.record_span(span(1 + n // 2), account="acme") for n in range(20)))
            with locked(meter._blocking):
                told.append(await meter.record_span(span(99)))
            told.append(not await meter.record_span("alien"))
            await meter.flush()
            return told, meter.dropped

    assert asyncio.run(record()) == ([True] * 22, 1)
    with Meter(ledger_url) as meter:
        assert numbers(meter) == {*range(1, 11), 99}


# The span processor, in the SDK it is for


class InOrder(IdGenerator):
    """One trace, whose spans are numbered."""

    def __init__(self) -> None:
        self.count = 0

    def generate_trace_id(self) -> int:
        return 7

    def generate_span_id(self) -> int:
        self.count += 1
        return self.count


class Provider:
    """An app's tracer provider, with the processor."""

    def __init__(self, processor: TallystickSpanProcessor) -> None:
        self.processor = processor
        self.ids = InOrder()
        self.tracers = TracerProvider(id_generator=self.ids, shutdown_on_exit=False)
        self.tracers.add_span_processor(processor)

    def run(self, parent: Span | None = None, **attributes: Any) -> Span:
        """Start a span; `end` ends it."""
        above = Context() if parent is None else set_span_in_context(parent, Context())
        return self.tracers.get_tracer("app").start_span("chat", context=above, attributes=attributes)

    def end(self, *made: Span) -> None:
        for span in made:
            span.end()


@pytest.fixture
def provider(meter: Meter) -> Iterator[Provider]:
    provider = Provider(TallystickSpanProcessor(meter))
    yield provider
    provider.tracers.shutdown()


def test_the_processor_keeps_usage_and_what_is_above_it(meter: Meter, provider: Provider) -> None:
    root = provider.run()
    step = provider.run(root)
    call = provider.run(step, **USED)
    aside = provider.run(root)
    provider.end(aside, call, step, root)
    assert provider.processor.force_flush()
    assert numbers(meter) == {1, 2, 3}
    assert provider.processor.dropped == 0


@ON_SQLITE
def test_the_processor_writes_by_itself(meter: Meter, provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otel, "EVERY_S", 0.01)
    provider.end(provider.run(**USED))
    thread = provider.processor._thread
    thread.join(10)
    assert numbers(meter) == {1}
    provider.end(provider.run(**USED))
    assert provider.processor.force_flush()
    assert numbers(meter) == {1, 2}


@ON_SQLITE
def test_many_threads_end_spans(meter: Meter, provider: Provider) -> None:
    made = [provider.run(**USED) for _ in range(2_000)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(provider.end, made))
    provider.processor.shutdown()
    assert len(numbers(meter)) == 2_000
    provider.end(provider.run(**USED))
    assert provider.processor.dropped == 1


@ON_SQLITE
def test_the_processor_never_blocks_or_breaks_the_app(
    impatient: Meter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    provider = Provider(TallystickSpanProcessor(impatient))
    monkeypatch.setattr(otel, "MAX_WAITING", 5)
    entered, leave = threading.Event(), threading.Event()
    keep = impatient._traces.keep

    def stuck(spans: Any) -> None:
        entered.set()
        assert leave.wait(20)
        keep(spans)

    monkeypatch.setattr(impatient._traces, "keep", stuck)
    provider.end(provider.run(**USED))
    assert not provider.processor.force_flush(0)
    assert entered.wait(20)
    provider.end(*(provider.run(**USED) for _ in range(8)))
    assert provider.processor.dropped == 3
    provider.processor.on_end(SimpleNamespace())
    leave.set()
    assert provider.processor.force_flush()
    assert numbers(impatient) == {1, *range(2, 7)}

    def broken(spans: Any) -> None:
        raise OSError("no room")

    monkeypatch.setattr(impatient._traces, "keep", broken)
    provider.end(provider.run(**USED))
    provider.processor.on_end(SimpleNamespace(name="odd"))
    provider.processor.shutdown()
    assert provider.processor.dropped == 6
    assert "no room" in caplog.text


def test_the_processor_spools_while_the_ledger_is_away(impatient: Meter) -> None:
    provider = Provider(TallystickSpanProcessor(impatient))
    with locked(impatient):
        provider.end(*(provider.run(**USED) for _ in range(3)))
        provider.processor.shutdown()
    impatient.flush()
    assert numbers(impatient) == {1, 2, 3}


def test_the_processor_survives_a_fork(meter: Meter, provider: Provider) -> None:
    provider.end(provider.run(**USED))
    assert provider.processor.force_flush()
    child = os.fork()
    if child == 0:
        provider.end(provider.run(**USED))
        os._exit(0 if provider.processor.force_flush() else 1)
    assert os.waitpid(child, 0)[1] == 0
    provider.ids.count += 1
    provider.end(provider.run(**USED))
    assert provider.processor.force_flush()
    assert numbers(meter) == {1, 2, 3}
