"""The meter on event loops: the same words, nobody blocked, every cancelled task in a known state."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import sqlite3
import threading
from typing import TYPE_CHECKING, Any

import pytest

from metering import AsyncMeter, Limit, Meter, TokenUsage
from metering.accounts import Accounts, Keys
from metering.aio import AsyncAccounts, AsyncHold, AsyncKeys
from metering.errors import InvalidEvent, LimitExceeded, SettleConflict, StoreUnavailable, UnknownAccount, UnknownKey
from metering.holds import Hold, UnsettledHold
from metering.plans import Plan
from metering.testing import temporary_async_meter
from tests.metering.loops import DEADLINE_S, on_a_loop, until

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from pathlib import Path

ESTIMATE = TokenUsage(input_tokens=10, output_tokens=5)
REAL = TokenUsage(input_tokens=8, output_tokens=2)


class OtherProcess:
    """Another writer of the ledger, which keeps its write lock until told otherwise."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._connection.execute("BEGIN IMMEDIATE")

    def leave(self) -> None:
        self._connection.rollback()
        self._connection.close()


@pytest.fixture
def meter(ledger_url: str, clock: Any) -> Iterator[AsyncMeter]:
    meter = AsyncMeter(ledger_url, clock=clock, strict_signals=True)
    yield meter
    asyncio.run(meter.aclose())


@pytest.fixture
def secret(meter: AsyncMeter) -> str:
    return asyncio.run(meter.keys.create("acme", plan="pro")).secret


def rows(meter: AsyncMeter, query: str) -> list[Any]:
    with meter.ledger.read() as connection:
        return [tuple(row) for row in connection.exec_driver_sql(query).all()]


def billed(meter: AsyncMeter) -> list[Any]:
    return rows(meter, "SELECT input_tokens, output_tokens, estimated FROM events ORDER BY seq")


def open_holds(meter: AsyncMeter) -> int:
    return len(rows(meter, "SELECT 1 FROM holds WHERE state = 'open'"))


@pytest.mark.parametrize(
    ("blocking", "awaited"),
    [(Meter, AsyncMeter), (Hold, AsyncHold), (Keys, AsyncKeys), (Accounts, AsyncAccounts)],
)
def test_the_words_are_the_same(blocking: type, awaited: type) -> None:
    # `ensure` and `known` work within a transaction, `digest` asks nobody.
    left_out = {"close", "ensure", "known", "digest"}
    words = {name for name, value in vars(blocking).items() if callable(value) and not name.startswith("_")}
    for name in words - left_out:
        assert inspect.signature(getattr(awaited, name)) == inspect.signature(getattr(blocking, name)), name
        assert getattr(awaited, name).__doc__
    assert inspect.signature(AsyncMeter) == inspect.signature(Meter)


@on_a_loop
async def test_a_day_with_the_meter(meter: AsyncMeter, secret: str) -> None:
    first = await meter.consume(secret, line="a", usage=REAL, idempotency_key="k", response="r")
    again = await meter.consume(secret, line="a", usage=REAL, idempotency_key="k")
    assert (first.allowed, again.replayed, again.response) == (True, True, "r")
    assert await meter.record(account="acme", line="a", quantity=3)
    assert (await meter.authenticate(secret)).account == "acme"
    [total] = await meter.usage("acme")
    assert (total.requests, total.quantity, total.input_tokens) == (2, 3, 8)
    assert (await meter.quota("acme"))[0].used == 1
    assert [entry.response for entry in await meter.log("acme")] == ["r"]
    await meter.correct(first.event_id, usage=ESTIMATE, reason="typo")
    assert (await meter.usage("acme"))[0].input_tokens == 10
    key = await meter.keys.create("acme", label="second")
    assert key.key_id in {known.key_id for known in await meter.keys.list("acme")}
    assert (await meter.keys.revoke(key.key_id)).revoked_at is not None
    assert (await meter.accounts.change_plan("acme", "free")).plan == "free"
    assert await meter.expire_holds() == 0
    assert repr(meter) == f"<AsyncMeter on {meter.ledger.path}>"
    with pytest.raises(UnknownKey):
        await meter.quota("acme", key_id="none")
    with pytest.raises(UnknownAccount):
        await meter.record(account="nobody", line="a")


@on_a_loop
async def test_errors_are_those_of_the_blocking_meter(meter: AsyncMeter, secret: str) -> None:
    with pytest.raises(UnknownKey):
        await meter.consume("application", line="application")
    with pytest.raises(InvalidEvent, match=r"model: got '\(not shown\)'"):
        await meter.consume(secret, line="a", model=secret)
    with pytest.raises(InvalidEvent, match="line"):
        await meter.reserve(secret, line="")
    with pytest.raises(TypeError, match="no_such"):
        await meter.consume(secret, line="a", no_such=1)  # type: ignore[call-arg]


def test_a_signal_that_cannot_be_kept_is_counted(ledger_url: str, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        async with AsyncMeter(ledger_url) as meter:
            assert await meter.record(account="nobody", line="a") is False
            assert await meter.record(account="nobody", line="a", no_such=1) is False  # type: ignore[call-arg]
            assert meter.dropped == 2

    asyncio.run(run())
    assert len(caplog.records) == 2


@on_a_loop
async def test_the_loop_runs_on_while_another_writer_holds_the_ledger(meter: AsyncMeter, secret: str) -> None:
    other = OtherProcess(meter.ledger.path)
    calls: list[Callable[[], Coroutine[Any, Any, Any]]] = [
        lambda: meter.consume(secret, line="a"),
        lambda: meter.record(account="acme", line="a"),
        lambda: meter.keys.create("acme"),
    ]
    tasks = [asyncio.create_task(call()) for call in calls]
    for _ in range(200):
        await asyncio.sleep(0.001)
    assert not any(task.done() for task in tasks)
    other.leave()
    decision, *_ = await asyncio.gather(*tasks)
    assert decision.allowed


@on_a_loop
async def test_concurrent_tasks_share_commits_and_admit_exactly_the_limit(meter: AsyncMeter) -> None:
    await meter.apply_plans([Plan(name="p", retention_days=1, limits=(Limit(metric="requests", per="day", max=100),))])
    secret = (await meter.keys.create("acme", plan="p")).secret
    await meter.consume(secret, line="a")
    commits: list[str] = []
    connection = meter.ledger.writer._connection
    assert connection is not None
    connection.set_trace_callback(lambda sql: commits.append(sql) if sql == "COMMIT" else None)

    async def call() -> int:
        return sum([(await meter.consume(secret, line="a")).allowed for _ in range(3)])

    admitted = sum(await asyncio.gather(*(call() for _ in range(64))))
    connection.set_trace_callback(None)
    assert admitted == 99
    assert (await meter.quota("acme"))[0].used == len(billed(meter)) == 100
    assert len(commits) <= 64, "192 calls"


@on_a_loop
async def test_one_refused_call_of_a_group_is_nobody_else_s(meter: AsyncMeter, secret: str) -> None:
    other = OtherProcess(meter.ledger.path)
    tasks = [asyncio.create_task(meter.consume(key, line="a")) for key in (secret, "stranger" * 3, secret)]
    await asyncio.sleep(0)
    other.leave()
    first, second, third = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(second, UnknownKey)
    assert {first.allowed, third.allowed} == {True}  # type: ignore[union-attr]
    assert len(billed(meter)) == 2


@on_a_loop
async def test_a_call_that_waits_too_long_is_told_and_not_made_later(ledger_url: str) -> None:
    async with AsyncMeter(ledger_url, timeout_s=0.2) as meter:
        secret = (await meter.keys.create("acme", plan="pro")).secret
        other = OtherProcess(meter.ledger.path)
        answers = await asyncio.gather(*(meter.consume(secret, line="a") for _ in range(5)), return_exceptions=True)
        other.leave()
        assert [type(answer) for answer in answers] == [StoreUnavailable] * 5
        assert (await meter.consume(secret, line="a")).allowed
        assert len(billed(meter)) == 1


@on_a_loop
async def test_a_call_cancelled_before_it_is_begun_is_not_made(meter: AsyncMeter, secret: str) -> None:
    other = OtherProcess(meter.ledger.path)
    tasks = [asyncio.create_task(meter.consume(secret, line="a")) for _ in range(3)]
    await asyncio.sleep(0.01)
    tasks[0].cancel()
    tasks[2].cancel()
    await asyncio.wait([tasks[0], tasks[2]])
    assert not tasks[1].done()
    other.leave()
    assert (await tasks[1]).allowed
    assert len(billed(meter)) == 1


@on_a_loop
async def test_a_reserve_that_is_cancelled_reserves_nothing(meter: AsyncMeter, secret: str) -> None:
    other = OtherProcess(meter.ledger.path)
    reserving = asyncio.ensure_future(_await(meter.reserve(secret, line="a", estimate=ESTIMATE)))
    await asyncio.sleep(0.01)
    reserving.cancel()
    await asyncio.sleep(0.01)
    other.leave()
    await asyncio.wait([reserving])
    assert reserving.cancelled()
    assert open_holds(meter) == 0
    assert (await meter.quota("acme"))[0].used == 0


async def _await(reserving: Any) -> Any:
    return await reserving


@on_a_loop
async def test_a_block_settles_once(meter: AsyncMeter, secret: str) -> None:
    async with meter.reserve(secret, line="a", estimate=ESTIMATE, request="q") as hold:
        assert open_holds(meter) == 1
        settled = await hold.settle(REAL, response="r")
    assert (settled.billable, settled.late, hold.settled) == (True, False, settled)
    assert billed(meter) == [(8, 2, 0)]
    [entry] = await meter.log("acme")
    assert (entry.request, entry.response) == ("q", "r")
    assert (await hold.settle(REAL)).repeated
    with pytest.raises(SettleConflict):
        await hold.settle(ESTIMATE)


@on_a_loop
async def test_a_hold_without_a_block(meter: AsyncMeter, secret: str) -> None:
    hold = await meter.reserve(secret, line="a", estimate=ESTIMATE)
    assert repr(hold).startswith("<AsyncHold ")
    assert await hold.release("no longer wanted")
    assert not await hold.release()
    other = await meter.reserve(secret, line="a", estimate=ESTIMATE)
    async with other:
        await other.settle(REAL)
    assert billed(meter) == [(8, 2, 0)]
    assert [entry.error for entry in await meter.log("acme")] == ["no longer wanted"]


@on_a_loop
async def test_leaving_without_settling_books_the_estimate_and_warns(meter: AsyncMeter, secret: str) -> None:
    with pytest.warns(UnsettledHold, match="its estimate was booked") as caught:
        async with meter.reserve(secret, line="a", estimate=ESTIMATE):
            pass
    assert caught[0].filename == __file__
    assert billed(meter) == [(10, 5, 1)]


@on_a_loop
async def test_an_exception_releases_and_is_logged(meter: AsyncMeter, secret: str) -> None:
    with pytest.raises(RuntimeError, match="model is down"):
        async with meter.reserve(secret, line="a", estimate=ESTIMATE):
            raise RuntimeError("model is down")
    assert (billed(meter), open_holds(meter)) == ([], 0)
    assert [entry.error for entry in await meter.log("acme")] == ["RuntimeError: model is down"]


@on_a_loop
async def test_a_refused_reserve_never_runs_its_block(meter: AsyncMeter) -> None:
    await meter.apply_plans([Plan(name="p", retention_days=1, limits=(Limit(metric="requests", per="day", max=1),))])
    secret = (await meter.keys.create("acme", plan="p")).secret
    await meter.consume(secret, line="a")
    ran = False
    with pytest.raises(LimitExceeded):
        async with meter.reserve(secret, line="a"):
            ran = True
    assert not ran


@on_a_loop
async def test_a_task_cancelled_in_its_block_gives_back_however_often_it_is_cancelled(
    meter: AsyncMeter, secret: str
) -> None:
    inside = asyncio.Event()

    async def call() -> None:
        async with meter.reserve(secret, line="a", estimate=ESTIMATE):
            inside.set()
            await asyncio.sleep(DEADLINE_S)

    task = asyncio.create_task(call())
    await inside.wait()
    other = OtherProcess(meter.ledger.path)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0.001)
    assert not task.done(), "it gives back first"
    other.leave()
    await asyncio.wait([task])
    assert task.cancelled()
    assert (billed(meter), open_holds(meter)) == ([], 0)
    assert [entry.error for entry in await meter.log("acme")] == ["CancelledError: "]


@on_a_loop
async def test_a_settle_that_is_cancelled_is_made_good_at_the_end_of_the_block(meter: AsyncMeter, secret: str) -> None:
    inside, go = asyncio.Event(), asyncio.Event()

    async def call() -> None:
        async with meter.reserve(secret, line="a", estimate=ESTIMATE) as hold:
            inside.set()
            await go.wait()
            await hold.settle(REAL, model="m")

    task = asyncio.create_task(call())
    await inside.wait()
    other = OtherProcess(meter.ledger.path)
    go.set()
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.sleep(0.01)
    other.leave()
    await asyncio.wait([task])
    assert task.cancelled()
    assert billed(meter) == [(8, 2, 0)], "the real cost, not the estimate"


def test_a_loop_that_ends_in_the_middle_of_blocks_leaves_no_hold(meter: AsyncMeter, secret: str) -> None:
    async def call(settles: bool) -> None:
        async with meter.reserve(secret, line="a", estimate=ESTIMATE) as hold:
            if settles:
                await hold.settle(REAL)
            await asyncio.sleep(DEADLINE_S)

    async def main() -> None:
        tasks = [asyncio.create_task(call(number % 2 == 0)) for number in range(6)]
        await until(lambda: len(billed(meter)) == 3 and open_holds(meter) == 3)
        assert not any(task.done() for task in tasks)

    asyncio.run(main())  # cancels what still runs
    assert (len(billed(meter)), open_holds(meter)) == (3, 0)


def test_an_interrupted_app_gives_its_holds_back(meter: AsyncMeter, secret: str) -> None:
    async def main() -> None:
        async with meter.reserve(secret, line="a", estimate=ESTIMATE):
            signal.raise_signal(signal.SIGINT)
            await asyncio.sleep(DEADLINE_S)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            asyncio.run(main())
    finally:
        signal.signal(signal.SIGINT, before)
    assert (billed(meter), open_holds(meter)) == ([], 0)


class Away:
    """A store that is away until it is told otherwise."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.is_away = True

    def __getattr__(self, name: str) -> Any:
        if self.is_away:
            raise StoreUnavailable("the store is away")
        return getattr(self._store, name)


@on_a_loop
async def test_an_outage_is_made_good_or_told(meter: AsyncMeter, secret: str, caplog: pytest.LogCaptureFixture) -> None:
    away = Away(meter._store)
    async with meter.reserve(secret, line="a", estimate=ESTIMATE) as hold:
        hold._store = away  # type: ignore[assignment]
        with pytest.raises(StoreUnavailable):
            await hold.settle(REAL)
        away.is_away = False
    assert billed(meter) == [(8, 2, 0)]
    away.is_away = True
    with pytest.raises(StoreUnavailable):
        async with meter.reserve(secret, line="a", estimate=ESTIMATE) as hold:
            hold._store = away  # type: ignore[assignment]
    with pytest.raises(ZeroDivisionError):  # noqa: PT012
        async with meter.reserve(secret, line="a", estimate=ESTIMATE) as hold:
            hold._store = away  # type: ignore[assignment]
            raise ZeroDivisionError
    assert ["could not be released" in record.getMessage() for record in caplog.records] == [True]


def test_a_hold_is_renewed_inside_its_block_and_only_there(ledger_url: str, clock: Any) -> None:
    async def run() -> None:
        async with AsyncMeter(ledger_url, clock=clock, hold_ttl_s=0.03) as meter:
            secret = (await meter.keys.create("acme", plan="pro")).secret
            dropped = await meter.reserve(secret, line="a")

            def expiries() -> list[str]:
                return [at for (at,) in rows(meter, "SELECT expires_at FROM holds ORDER BY rowid")]

            async with meter.reserve(secret, line="a") as hold:
                clock.advance(seconds=0.02)
                await until(lambda: len(set(expiries())) == 2)
                clock.advance(seconds=0.02)
                assert await meter.expire_holds() == 1
                assert not (await hold.settle()).late
            assert (await dropped.settle()).late
            assert meter._keeper._tasks == {}

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))


@on_a_loop
async def test_a_renewal_that_fails_is_tried_again(
    meter: AsyncMeter, secret: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Any] = []

    async def renew(ticket: Any) -> bool:
        tried.append(ticket)
        raise StoreUnavailable("away")

    monkeypatch.setattr(meter._keeper, "_renew", renew)
    monkeypatch.setattr(meter._keeper, "_every_s", 0.001)
    async with meter.reserve(secret, line="a") as hold:
        await until(lambda: len(tried) >= 3)
        await hold.settle()
    assert len(caplog.records) == len(tried)
    async with meter.reserve(secret, line="a") as hold:
        await meter.aclose()
        assert meter._keeper._tasks == {}
        await hold.settle()


def test_one_meter_serves_many_loops(meter: AsyncMeter, secret: str) -> None:
    async def call() -> int:
        return sum([(await meter.consume(secret, line="a")).allowed for _ in range(20)])

    async def crowd(admitted: list[int]) -> None:
        admitted += await asyncio.gather(*(call() for _ in range(4)))

    admitted: list[int] = []
    threads = [threading.Thread(target=lambda: asyncio.run(crowd(admitted))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        meter._blocking.consume(secret, line="a")  # and threads besides
    for thread in threads:
        thread.join(DEADLINE_S)
    assert admitted == [20] * 12
    assert len(billed(meter)) == 260


def test_a_loop_that_is_gone_holds_nobody_up(meter: AsyncMeter, secret: str) -> None:
    other = OtherProcess(meter.ledger.path)
    loop = asyncio.new_event_loop()
    task = loop.create_task(meter.consume(secret, line="a"))
    loop.run_until_complete(asyncio.sleep(0.01))
    loop.close()
    other.leave()

    async def main() -> None:
        assert (await meter.consume(secret, line="a")).allowed

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))
    assert len(billed(meter)) == 2, "it was not cancelled"
    task._log_destroy_pending = False  # type: ignore[attr-defined]


def test_a_forked_meter_goes_on_in_parent_and_child(meter: AsyncMeter, secret: str) -> None:
    async def call() -> None:
        async with meter.reserve(secret, line="a", estimate=ESTIMATE) as hold:
            assert (await meter.consume(secret, line="a")).allowed
            await hold.settle(REAL)
            assert (await meter.quota("acme"))[0].used

    asyncio.run(call())
    assert meter.ledger.writer._worker is not None
    child = os.fork()
    if not child:
        try:
            signal.alarm(int(DEADLINE_S))
            asyncio.run(call())
            os._exit(0)
        finally:
            os._exit(1)
    asyncio.run(call())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(billed(meter)) == 6


def test_a_meter_from_the_settings_and_one_for_tests(monkeypatch: pytest.MonkeyPatch, ledger_url: str) -> None:
    monkeypatch.setenv("METERING_LEDGER_URL", ledger_url)

    async def main() -> None:
        async with AsyncMeter.from_env() as meter:
            assert str(meter.ledger.path) == ledger_url.removeprefix("sqlite:///")
        async with temporary_async_meter() as meter:
            folder = meter.ledger.path.parent
            secret = (await meter.keys.create("acme", plan="free")).secret
            assert (await meter.consume(secret, line="a")).allowed
            with pytest.raises(UnknownAccount):
                await meter.record(account="nobody", line="a")
        assert not folder.exists()

    asyncio.run(main())
