"""The `with` block around a call: every way out of it, and the thread that keeps its hold alive."""

from __future__ import annotations

import threading
import time
import warnings
from typing import TYPE_CHECKING, Any

import pytest

from metering import Meter, TokenUsage
from metering.errors import InvalidEvent, LedgerError, LimitExceeded, SettleConflict, StoreUnavailable
from metering.holds import Keeper, UnsettledHold

if TYPE_CHECKING:
    from collections.abc import Callable

DEADLINE_S = 20.0
ESTIMATE = TokenUsage(input_tokens=10, output_tokens=5)
REAL = TokenUsage(input_tokens=8, output_tokens=2)


@pytest.fixture
def secret(meter: Meter) -> str:
    return meter.keys.create("acme", plan="pro").secret


def events(meter: Meter) -> list[dict[str, Any]]:
    with meter.ledger.read() as connection:
        return [dict(row) for row in connection.exec_driver_sql("SELECT * FROM events ORDER BY seq").mappings()]


def billed(meter: Meter) -> list[tuple[int, int, bool]]:
    return [(row["input_tokens"], row["output_tokens"], bool(row["estimated"])) for row in events(meter)]


def wait_until(condition: Callable[[], bool]) -> None:
    end, pause = time.monotonic() + DEADLINE_S, threading.Event()
    while not condition():
        assert time.monotonic() < end
        pause.wait(0.001)


class Away:
    """A store that is away until it is told otherwise."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.is_away = True

    def __getattr__(self, name: str) -> Any:
        if self.is_away:
            raise StoreUnavailable("the store is away")
        return getattr(self._store, name)


@pytest.fixture
def away(meter: Meter) -> Away:
    return Away(meter._store)


def test_settling_in_the_block_bills_once(meter: Meter, secret: str) -> None:
    with meter.reserve(secret, line="a", estimate=ESTIMATE) as hold:
        hold.settle(REAL)
    assert billed(meter) == [(8, 2, False)]


def test_leaving_without_settling_books_the_estimate_and_warns(meter: Meter, secret: str) -> None:
    with (
        pytest.warns(UnsettledHold, match="on line 'a' was not settled: its estimate was booked") as caught,
        meter.reserve(secret, line="a", estimate=ESTIMATE, quantity=3) as hold,
    ):
        pass
    assert caught[0].filename == __file__
    assert billed(meter) == [(10, 5, True)]
    assert events(meter)[0]["quantity"] == "3"
    assert hold.settled is not None
    with pytest.raises(SettleConflict):
        hold.settle(REAL)


def test_an_exception_before_settling_releases_and_is_logged(meter: Meter, secret: str) -> None:
    with pytest.raises(RuntimeError, match="model is down"), meter.reserve(secret, line="a", request="q"):
        raise RuntimeError("model is down")
    assert billed(meter) == []
    assert meter.quota("acme")[0].used == 0
    [entry] = meter.log("acme")
    assert (entry.event_id, entry.request, entry.error) == (None, "q", "RuntimeError: model is down")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), GeneratorExit(), SystemExit(1)])
def test_an_interrupt_releases_too(meter: Meter, secret: str, error: BaseException) -> None:
    with pytest.raises(type(error)), meter.reserve(secret, line="a"):
        raise error
    assert meter.quota("acme")[0].used == 0


def test_an_exception_after_settling_keeps_the_bill(meter: Meter, secret: str) -> None:
    def call() -> None:
        with meter.reserve(secret, line="a", estimate=ESTIMATE) as hold:
            hold.settle(REAL)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        call()
    assert billed(meter) == [(8, 2, False)]


def test_a_release_in_the_block_is_the_end_of_it(meter: Meter, secret: str) -> None:
    def cancelled_call() -> None:
        with meter.reserve(secret, line="a", estimate=ESTIMATE, request="q") as hold:
            hold.release("cancelled")
            raise RuntimeError

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with meter.reserve(secret, line="a", estimate=ESTIMATE) as hold:
            assert hold.release()
    assert billed(meter) == []
    assert meter.quota("acme")[0].used == 0
    with pytest.raises(RuntimeError):
        cancelled_call()
    assert [entry.error for entry in meter.log("acme")] == ["cancelled"]


def test_a_refused_settle_bills_the_estimate_rather_than_nothing(meter: Meter, secret: str) -> None:
    with pytest.raises(InvalidEvent), meter.reserve(secret, line="a", estimate=ESTIMATE) as hold:
        hold.settle(REAL, quantity=-1, model="m")
    assert billed(meter) == [(10, 5, True)]


def test_a_refused_reserve_never_runs_its_block(meter: Meter) -> None:
    secret = meter.keys.create("small", plan="free").secret
    for _ in range(1_000):
        meter.consume(secret, line="a")
    ran = False
    with pytest.raises(LimitExceeded), meter.reserve(secret, line="a"):
        ran = True
    assert not ran


def test_a_settle_while_the_store_is_away_is_made_good_at_the_end(meter: Meter, secret: str, away: Away) -> None:
    """With the real cost: the estimate is for calls whose cost nobody knows."""
    with meter.reserve(secret, line="a", estimate=ESTIMATE) as hold:
        hold._store = away
        with pytest.raises(StoreUnavailable):
            hold.settle(REAL, model="m")
        away.is_away = False
    assert billed(meter) == [(8, 2, False)]
    assert events(meter)[0]["model"] == "m"
    assert hold.settle(REAL).repeated


def test_an_outage_at_the_end_does_not_hide_the_error_of_the_app(
    meter: Meter, secret: str, away: Away, caplog: pytest.LogCaptureFixture
) -> None:
    holds = [meter.reserve(secret, line="a", estimate=ESTIMATE) for _ in range(2)]

    def failing_call() -> None:
        with holds[0] as hold:
            hold._store = away
            raise ZeroDivisionError

    def unsettled_call() -> None:
        with holds[1] as hold:
            hold._store = away
            hold.settle(REAL)

    with pytest.raises(ZeroDivisionError):
        failing_call()
    with pytest.raises(StoreUnavailable, match="away"):
        unsettled_call()
    assert [record.getMessage().split(": ")[0].split(" ", 2)[2] for record in caplog.records] == [
        "could not be released; it expires by itself",
        "could not be settled",
    ]
    away.is_away = False
    assert holds[1].settle(REAL).billable
    assert billed(meter) == [(8, 2, False)]


def test_an_outage_at_the_end_of_a_calm_block_is_told(meter: Meter, secret: str, away: Away) -> None:
    with pytest.raises(StoreUnavailable), meter.reserve(secret, line="a", estimate=ESTIMATE) as hold:
        hold._store = away


def test_the_response_of_a_settle_is_what_a_replay_answers(meter: Meter, secret: str) -> None:
    with meter.reserve(secret, line="a", idempotency_key="k", request={"q": 1}) as hold:
        hold.settle(response={"text": "hi"}, latency_ms=20)
    replay = meter.consume(secret, line="a", idempotency_key="k", request={"q": 1})
    assert replay.response == {"text": "hi"}
    [entry] = meter.log("acme")
    assert (entry.request, entry.response, entry.latency_ms) == ({"q": 1}, {"text": "hi"}, 20)


def test_a_hold_is_renewed_inside_its_block_and_only_there(open_meter: Callable[..., Meter], clock: Any) -> None:
    meter = open_meter(hold_ttl_s=0.03)
    secret = meter.keys.create("acme", plan="pro").secret
    dropped = meter.reserve(secret, line="a")
    with meter.reserve(secret, line="a") as hold:
        clock.advance(seconds=0.02)
        wait_until(lambda: expiry(meter, hold) > expiry(meter, dropped))
        clock.advance(seconds=0.02)
        assert meter.expire_holds() == 1
        assert not hold.settle().late
    assert dropped.settle().late
    wait_until(lambda: meter._keeper._thread is None)


def expiry(meter: Meter, hold: Any) -> str:
    with meter.ledger.read() as connection:
        query = f"SELECT expires_at FROM holds WHERE hold_id = '{hold._ticket.hold_id.hex}'"
        return str(connection.exec_driver_sql(query).scalar_one())


def test_a_keeper_goes_on_after_any_error(meter: Meter, secret: str, caplog: pytest.LogCaptureFixture) -> None:
    tickets = [meter.reserve(secret, line="a").decision.hold for _ in range(2)]
    renewed: list[Any] = []

    def renew(ticket: Any) -> bool:
        renewed.append(ticket)
        raise (LedgerError("malformed"), StoreUnavailable("away"), ValueError("bug"))[len(renewed) % 3]

    keeper = Keeper(renew, every_s=0.002)
    for ticket in tickets:
        assert ticket is not None
        keeper.add(ticket)
    wait_until(lambda: len(renewed) >= 9)
    keeper.close()
    count = len(renewed)
    assert keeper._thread is None
    assert len(caplog.records) >= count - 1
    assert set(map(id, renewed)) == set(map(id, tickets))


def test_a_closed_keeper_has_no_renewal_under_way(meter: Meter, secret: str) -> None:
    ticket = meter.reserve(secret, line="a").decision.hold
    assert ticket is not None
    started, finished, go = threading.Event(), threading.Event(), threading.Event()

    def renew(_: Any) -> bool:
        started.set()
        go.wait(DEADLINE_S)
        finished.set()
        return True

    keeper = Keeper(renew, every_s=0.001)
    keeper.add(ticket)
    assert started.wait(DEADLINE_S)
    closing = threading.Thread(target=keeper.close)
    closing.start()
    wait_until(lambda: not keeper._tickets)
    assert closing.is_alive()
    go.set()
    closing.join(DEADLINE_S)
    assert (closing.is_alive(), finished.is_set()) == (False, True)
