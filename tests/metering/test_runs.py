"""A run of an operation: what it tells the meter, what it keeps to itself, and that none of it does harm."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from decimal import Decimal, localcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metering import AsyncMeter, InvalidEvent, Meter, TokenUsage
from metering.calls import Calls
from metering.clock import utc_now
from metering.redaction import SECRETS
from metering.signals import (
    Operation,
    Run,
    Signal,
    add_tokens,
    applied_learnings,
    extraction_tokens,
    learnings_generated,
)
from metering.traces import RunTokenTotals, TokenTotals
from tests.metering.test_signals import Hostile
from tests.servers import DEADLINE_S

if TYPE_CHECKING:
    from collections.abc import Coroutine

SEARCH = Operation("search", emits_billing=True)
QUIET = Operation("quiet")
ONE = TokenUsage(input_tokens=10, output_tokens=3)
OPENAI = {
    "object": "chat.completion",
    "model": "gpt-4.1-mini",
    "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9},
}


class Recorder:
    """Stands where `Meter.record` does, and keeps what it was told."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []

    def __call__(self, **said: Any) -> bool:
        self.told.append(said)
        return True

    async def awaited(self, **said: Any) -> bool:
        await asyncio.sleep(0)
        return self(**said)

    @property
    def lines(self) -> list[tuple[str, Decimal]]:
        return [(said["line"], said["quantity"]) for said in self.told]


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def in_time(test: Coroutine[Any, Any, Any]) -> Any:
    async def run() -> Any:
        async with asyncio.timeout(DEADLINE_S):
            return await test

    return asyncio.run(run())


# Runs


def test_an_operation_that_ends_well_tells_the_meter(recorder: Recorder) -> None:
    with SEARCH.run(
        recorder,
        account="acme",
        run_id="run-1",
        idempotency_key="run-1",
        request_id="req-1",
        session_id="s-1",
        llm={"api_key": "k"},
    ) as run:
        run.emit(applied_learnings, ["a", "b"])
        assert not recorder.told, "the work is not done"
    [said] = recorder.told
    assert len(said.pop("idempotency_key")) == 36
    assert said == {
        "account": "acme", "line": "application", "quantity": 2, "usage": TokenUsage(), "operation": "search",
        "caller_type": "internal", "run_id": "run-1", "request_id": "req-1", "session_id": "s-1",
        "platform_paid": False,
    }  # fmt: skip


def test_a_line_is_one_event_with_all_that_was_emitted(recorder: Recorder) -> None:
    with localcontext() as ours, SEARCH.run(recorder, account="acme") as run:
        ours.prec = 3
        for text in ("one", "two three", ""):
            run.emit(extraction_tokens, text)
        for results in ([], ["a"], ["b", "c"]):
            run.emit(applied_learnings, results)
        run.emit(learnings_generated, 0)
        run.emit(Signal, line="own", quantity=Decimal("123456.000000000001"))
        run.emit(Signal, line="own", quantity=Decimal("0.000000000001"))
    assert recorder.lines == [("extraction_tokens", 0), ("application", 3), ("own", Decimal("123456.000000000002"))]
    assert recorder.told[0]["usage"] == TokenUsage(input_tokens=3)


def test_no_billing_is_emitted_unless_it_is_declared(recorder: Recorder) -> None:
    assert not Operation("any").emits_billing
    with QUIET.run(recorder, account="acme") as run:
        run.add(ONE)
        run.emit(lambda: pytest.fail("nothing is counted in vain"))
    assert (recorder.told, run.dropped, run.totals.input_tokens) == ([], 0, 10)


def test_a_failed_or_skipped_operation_emits_nothing(recorder: Recorder) -> None:
    with suppress(ZeroDivisionError), SEARCH.run(recorder, account="acme") as run:
        run.emit(applied_learnings, ["a"])
        raise ZeroDivisionError
    with suppress(SystemExit), SEARCH.run(recorder, account="acme") as run:
        run.emit(applied_learnings, ["a"])
        raise SystemExit
    with SEARCH.run(recorder, account="acme") as run:
        run.emit(applied_learnings, ["a"])
        run.skip()
        run.emit(applied_learnings, ["a"])

    async def asynchronous() -> None:
        with suppress(ZeroDivisionError):
            async with SEARCH.run(recorder.awaited, account="acme") as run:
                run.emit(applied_learnings, ["a"])
                raise ZeroDivisionError
        async with SEARCH.run(recorder.awaited, account="acme") as run:
            run.emit(applied_learnings, ["a"])
            run.skip()

    in_time(asynchronous())
    assert not recorder.told


def test_a_result_carries_the_totals_of_its_run(recorder: Recorder) -> None:
    with QUIET.run(recorder, account="acme") as run:
        run.add(ONE, model="b")
        add_tokens(TokenUsage(input_tokens=5, cache_read_tokens=4), model="a")
        add_tokens(OPENAI)
        add_tokens(OPENAI | {"model": "theirs"}, model="a")
        run.add(ONE)
        result = run.result("value")
        run.add(ONE)
    assert result.value == "value"
    assert result.totals == RunTokenTotals(
        input_tokens=39,
        cache_read_tokens=4,
        output_tokens=10,
        model_calls=5,
        by_model={
            "a": TokenTotals(input_tokens=12, cache_read_tokens=4, output_tokens=2, model_calls=2),
            "b": TokenTotals(input_tokens=10, output_tokens=3, model_calls=1),
            "gpt-4.1-mini": TokenTotals(input_tokens=7, output_tokens=2, model_calls=1),
            "unknown": TokenTotals(input_tokens=10, output_tokens=3, model_calls=1),
        },
    )
    assert list(result.totals.by_model) == sorted(result.totals.by_model)
    assert run.totals.model_calls == 6
    with QUIET.run(recorder, account="acme") as fresh:
        assert fresh.result(None).totals == RunTokenTotals()


def test_a_model_may_be_anything(recorder: Recorder) -> None:
    with QUIET.run(recorder, account="acme") as run:
        for model in ("m", 7, ["m"], Hostile(), None):
            run.add(ONE, model=model)  # type: ignore[arg-type]
    assert list(run.totals.by_model) == ["7", "['m']", "m", "unknown"]
    assert run.totals.model_calls == 5


def test_a_run_within_a_run_has_totals_of_its_own(recorder: Recorder) -> None:
    with QUIET.run(recorder, account="acme") as outer:
        add_tokens(ONE)
        with SEARCH.run(recorder, account="acme") as inner:
            add_tokens(ONE)
            add_tokens(ONE)
        add_tokens(ONE)
    add_tokens(ONE)  # without a run it is nobody's
    assert (outer.totals.model_calls, inner.totals.model_calls) == (2, 2)


def test_a_run_is_run_once(recorder: Recorder) -> None:
    with QUIET.run(recorder, account="acme") as run, pytest.raises(RuntimeError, match="was run before"):
        run.__enter__()
    with pytest.raises(RuntimeError, match="'quiet' was run before"):
        run.__enter__()


def test_an_operation_has_a_name_that_an_event_may_have() -> None:
    for name in ("", "x" * 256, "a\nb"):
        with pytest.raises(InvalidEvent, match="operation"):
            Operation(name)


# Nothing of one run reaches another


def test_what_comes_after_a_timeout_reaches_no_other_run(recorder: Recorder) -> None:
    """A thread and a task go on after their caller gave up, and add while the next run is running."""

    async def test() -> None:
        go_on, added = threading.Event(), threading.Event()

        def slow() -> None:
            add_tokens(ONE)
            assert go_on.wait(DEADLINE_S)
            add_tokens(TokenUsage(input_tokens=1_000))
            late.emit(applied_learnings, ["late"])
            added.set()

        async def slow_task() -> None:
            await asyncio.to_thread(added.wait, DEADLINE_S)
            add_tokens(TokenUsage(input_tokens=1_000))

        with suppress(TimeoutError):
            async with SEARCH.run(recorder.awaited, account="acme") as late:
                late.emit(applied_learnings, ["early"])
                background = asyncio.create_task(slow_task())
                async with asyncio.timeout(0.01):
                    await asyncio.to_thread(slow)
        async with SEARCH.run(recorder.awaited, account="acme") as following:
            add_tokens(ONE)
            go_on.set()
            await background
            following.emit(applied_learnings, ["one", "two"])
            result = following.result(None)
        assert (late.totals.input_tokens, late.totals.model_calls, late.dropped) == (10, 1, 3)
        assert (result.totals.input_tokens, result.totals.model_calls, following.dropped) == (10, 1, 0)

    in_time(test())
    assert recorder.lines == [("application", 2)]


def test_a_thread_of_a_pool_keeps_no_run(recorder: Recorder) -> None:
    """Threads without a context of their own do one job after another, and some of the jobs fail."""
    runs: list[Run] = []

    def job(number: int) -> None:
        add_tokens(ONE)  # of nobody, though this thread has run others
        with suppress(ZeroDivisionError), QUIET.run(recorder, account="acme") as run:
            runs.append(run)
            for _ in range(number):
                add_tokens(ONE, model=str(number))
            if number % 2:
                raise ZeroDivisionError

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(job, range(20)))
    assert sorted(run.totals.model_calls for run in runs) == list(range(20))
    assert all(len(run.totals.by_model) <= 1 for run in runs)


def test_tasks_beside_each_other_share_nothing(recorder: Recorder) -> None:
    async def one(number: int) -> tuple[int, int]:
        async with SEARCH.run(recorder.awaited, account=f"account-{number}") as run:
            for _ in range(number):
                await asyncio.sleep(0)
                await asyncio.to_thread(add_tokens, ONE)
                await asyncio.create_task(deep())
            run.emit(learnings_generated, number)
            return number, run.result(None).totals.model_calls

    async def deep() -> None:
        add_tokens(ONE)

    async def test() -> list[tuple[int, int]]:
        return await asyncio.gather(*(one(number) for number in range(12)))

    assert in_time(test()) == [(number, 2 * number) for number in range(12)]
    assert sorted((said["account"], said["quantity"]) for said in recorder.told) == sorted(
        (f"account-{number}", number) for number in range(1, 12)
    )


def test_totals_of_many_threads_are_exact(recorder: Recorder, request: pytest.FixtureRequest) -> None:
    request.addfinalizer(partial(sys.setswitchinterval, sys.getswitchinterval()))
    sys.setswitchinterval(1e-6)
    begun = threading.Barrier(4)

    def work() -> None:
        begun.wait(DEADLINE_S)
        for _ in range(300):
            run.add(ONE, model="m")
            run.emit(applied_learnings, ["one"])

    with SEARCH.run(recorder, account="acme") as run, ThreadPoolExecutor(4) as pool:
        assert [done.result() for done in [pool.submit(work) for _ in range(4)]] == [None] * 4
    assert (run.totals.input_tokens, run.totals.model_calls) == (12_000, 1_200)
    assert recorder.lines == [("application", 1_200)]


def test_a_run_may_end_in_another_context_than_it_began_in(recorder: Recorder) -> None:
    """As that of a dependency does that is a generator run in threads."""
    run = SEARCH.run(recorder, account="acme")
    contextvars.copy_context().run(run.__enter__)
    run.emit(applied_learnings, ["a"])
    contextvars.copy_context().run(run.__exit__, None, None, None)
    assert recorder.lines == [("application", 1)]


def test_a_cancellation_while_signals_are_recorded_loses_none(recorder: Recorder) -> None:
    async def test() -> None:
        recording, go_on = asyncio.Event(), asyncio.Event()

        async def record(**said: Any) -> bool:
            recording.set()
            await go_on.wait()
            return recorder(**said)

        async def work() -> None:
            async with SEARCH.run(record, account="acme") as run:
                run.emit(applied_learnings, ["a"])
                run.emit(learnings_generated, 2)

        task = asyncio.create_task(work())
        await recording.wait()
        task.cancel()
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    in_time(test())
    assert recorder.lines == [("application", 1), ("learnings_generated", 2)]


# No harm


def test_what_cannot_be_understood_is_logged_and_left_out(recorder: Recorder, caplog: pytest.LogCaptureFixture) -> None:
    with SEARCH.run(recorder, account="acme", idempotency_key="run-1") as run:
        for usage in (None, "tokens", {"unknown": 1}, Hostile(), -1):
            run.add(usage)
        run.emit(applied_learnings, None)  # type: ignore[arg-type]
        run.emit(applied_learnings, (n for n in "abc"))  # type: ignore[arg-type]
        run.emit(learnings_generated, -3)
        run.emit(extraction_tokens, None)  # type: ignore[arg-type]
        run.emit(lambda: "no signal")  # type: ignore[arg-type,return-value]
        run.emit(Signal, line="", quantity=1)
        run.emit(Signal, line="own", quantity=1.5)  # type: ignore[arg-type]
        run.emit(Signal, line="own", usage={"input_tokens": 1})  # type: ignore[arg-type]
        run.emit(applied_learnings, ["a"])
    assert recorder.lines == [("application", 1)]
    assert (run.totals, run.dropped) == (RunTokenTotals(), 13)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 13
    assert all("the run 'run-1' of 'search'" in record.getMessage() for record in caplog.records)


def test_a_missing_tokenizer_costs_the_signal_and_nothing_else(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(text: str) -> int:
        raise ModuleNotFoundError("No module named 'tiktoken'")

    monkeypatch.setattr("metering.signals.count_input_tokens", missing)
    with SEARCH.run(recorder, account="acme") as run:
        run.emit(extraction_tokens, "text")
        run.emit(learnings_generated, 1)
    assert (recorder.lines, run.dropped) == ([("learnings_generated", 1)], 1)


def test_a_meter_that_fails_does_no_harm(recorder: Recorder, caplog: pytest.LogCaptureFixture) -> None:
    def failing(**said: Any) -> bool:
        if said["line"] == "application":
            raise RuntimeError("down")
        return recorder(**said)

    async def asynchronous() -> str:
        async def awaited(**said: Any) -> bool:
            return failing(**said)

        async with SEARCH.run(awaited, account="acme") as run:
            run.emit(applied_learnings, ["a"])
            run.emit(learnings_generated, 2)
            return "answer"

    with SEARCH.run(failing, account="acme") as run:
        run.emit(applied_learnings, ["a"])
        run.emit(learnings_generated, 1)
    assert in_time(asynchronous()) == "answer"
    assert recorder.lines == [("learnings_generated", 1), ("learnings_generated", 2)]
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 2


def test_a_record_that_is_awaited_is_missed_in_a_plain_with(
    recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    with SEARCH.run(recorder.awaited, account="acme") as run:
        run.emit(applied_learnings, ["a"])
    assert not recorder.told
    assert "async with" in caplog.text

    async def test() -> None:
        async with SEARCH.run(recorder, account="acme") as run:
            run.emit(applied_learnings, ["a"])

    in_time(test())
    assert recorder.lines == [("application", 1)]


@given(st.none() | st.text() | st.integers() | st.just(Hostile()) | st.sampled_from(["", "x" * 256, "\x00", "\ud800"]))
def test_ids_of_any_kind_let_nobody_escape_a_bill(odd: object) -> None:
    events: list[Any] = []
    calls = Calls(str, clock=utc_now, hold_ttl_s=1, redact=SECRETS)

    def record(**said: Any) -> None:
        events.append(calls.signal(**said))  # what `Meter.record` makes of it, and might refuse

    with SEARCH.run(
        record, account="acme", run_id=odd, request_id=odd, session_id=odd, idempotency_key=odd, llm=odd
    ) as run:
        run.emit(applied_learnings, ["a"])
    assert [event.quantity for event in events] == [1]


# In the ledger


def events_of(meter: Meter) -> list[tuple[Any, ...]]:
    with meter.ledger.read() as connection:
        rows = connection.exec_driver_sql(
            "SELECT line, quantity, input_tokens, caller_type, billable, platform_paid, run_id, request_id, session_id"
            " FROM events ORDER BY seq"
        )
        return [(row[0], int(row[1]), row[2], row[3], bool(row[4]), bool(row[5]), *row[6:]) for row in rows]


def job(meter: Meter, **said: Any) -> None:
    with SEARCH.run(meter.record, **{"account": "acme", "caller_type": "production_agent", **said}) as run:
        run.emit(extraction_tokens, "hello world")
        run.emit(learnings_generated, 3)


def test_a_retried_job_bills_once(meter: Meter) -> None:
    meter.accounts.create("acme", plan="pro")
    meter.accounts.create("other", plan="pro")
    for _ in range(3):
        job(meter, run_id="job-1", idempotency_key="job-1", request_id="req-1", session_id="s-1")
        job(meter, run_id="job-1", idempotency_key="key-1")
    billed = ("production_agent", True, True, "job-1")
    first = [
        ("extraction_tokens", 0, 2, *billed, "req-1", "s-1"),
        ("learnings_generated", 3, 0, *billed, "req-1", "s-1"),
    ]
    second = [
        ("extraction_tokens", 0, 2, *billed, None, None),
        ("learnings_generated", 3, 0, *billed, None, None),
    ]
    assert events_of(meter) == first + second
    job(meter, idempotency_key="job-1", account="other")
    with Operation("another", emits_billing=True).run(meter.record, account="acme", idempotency_key="job-1") as run:
        run.emit(learnings_generated, 3)
    assert len(events_of(meter)) == 7, "the job of another account, and another operation of the job"
    for _ in range(2):
        job(meter)
    assert len(events_of(meter)) == 11, "without a name every run is another job"


def test_a_retry_in_another_order_bills_once(meter: Meter) -> None:
    meter.accounts.create("acme", plan="pro")
    for shapes in (
        [learnings_generated, extraction_tokens],
        [extraction_tokens],
        [extraction_tokens, learnings_generated],
    ):
        with SEARCH.run(meter.record, account="acme", idempotency_key="job-1") as run:
            for shape in shapes:
                run.emit(shape, "hello" if shape is extraction_tokens else 2)  # type: ignore[operator]
    assert sorted(event[:3] for event in events_of(meter)) == [
        ("extraction_tokens", 0, 1),
        ("learnings_generated", 2, 0),
    ]


@pytest.mark.parametrize(
    ("caller_type", "billable"), [("production_agent", True), ("dashboard", False), ("internal", False)]
)
def test_who_calls_decides_what_is_billed(meter: Meter, caller_type: Any, billable: bool) -> None:
    meter.accounts.create("acme", plan="pro")
    job(meter, caller_type=caller_type, llm={"api_key": "sk-1"})
    assert {event[3:6] for event in events_of(meter)} == {(caller_type, billable, False)}


def test_an_async_meter_that_was_away_gets_it_once(ledger_url: str, meter: Meter) -> None:
    meter.accounts.create("acme", plan="pro")

    async def test() -> None:
        async with AsyncMeter(ledger_url, timeout_s=0.05) as away:
            for _ in range(2):
                async with SEARCH.run(away.record, account="acme", idempotency_key="job-1") as run:
                    run.emit(learnings_generated, 3)

    with meter.ledger.write():
        app = threading.Thread(target=in_time, args=(test(),))
        app.start()
        app.join(DEADLINE_S)
        assert not app.is_alive()
    meter.flush()
    assert [event[:2] for event in events_of(meter)] == [("learnings_generated", 3)]
