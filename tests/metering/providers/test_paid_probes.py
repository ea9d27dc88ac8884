"""Calls that cost: leave is taken before each, and what it took is told afterwards."""

from __future__ import annotations

import logging
import threading
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from metering.errors import ProbeTimeout, StoreUnavailable, UnexpectedAnswer
from metering.providers.paying import MAX_KEPT, PaidByProcess, PaidProbe
from metering.providers.probing import Credential, Memory, ProviderStatus, probe_sync
from tests.metering.providers.conftest import hidden
from tests.metering.providers.probe_server import KEY, MODELS, OPENAI_MODELS, ProbeServer, reply

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from tests.conftest import Clock

SAMPLE = "POST /v1/chat/completions"


class Book(PaidByProcess):
    """Remembers what it was told, and how many requests the server had seen by then; fails where it shall."""

    def __init__(self, server: ProbeServer) -> None:
        super().__init__()
        self._server = server
        self.fails: set[str] = set()
        self.told: list[tuple[str, int, PaidProbe | None, tuple[int | None, ...]]] = []

    def take(self, **asked: Any) -> PaidProbe | None:
        self._fail("take")
        paid = super().take(**asked)
        self.told.append(("take", len(self._server.asked), paid, ()))
        return paid

    def spent(self, paid: PaidProbe, **took: int | None) -> None:
        self._fail("spent")
        self.told.append(("spent", len(self._server.asked), paid, tuple(took.values())))

    def _fail(self, what: str) -> None:
        assert threading.current_thread() is not threading.main_thread(), "it may block, and this is the loop's thread"
        if what in self.fails:
            raise StoreUnavailable(f"no ledger, and {KEY}")


@pytest.fixture
def book(server: ProbeServer) -> Book:
    server.replies[MODELS["openai"]] = reply(OPENAI_MODELS)
    return Book(server)


@pytest.fixture
def pay(server: ProbeServer, book: Book, clock: Clock) -> Callable[..., ProviderStatus]:
    """Probes the server, which says no limits for nothing."""
    memory = Memory(paid=book)

    def once(timeout_s: float = 20, **more: Any) -> ProviderStatus:
        asked = {"id": "acme", "provider": "codex", "key": KEY, "base_url": f"{server.url}/v1/"}
        credential = Credential(**{**asked, "paid_probes_per_day": 2, **more})
        status = probe_sync(credential, timeout_s=timeout_s, clock=clock, memory=memory, force_refresh=True)
        hidden(status)
        return status

    return once


def test_leave_is_taken_before_the_call_and_what_it_took_is_told_after_it(
    pay: Callable[..., ProviderStatus], book: Book, server: ProbeServer, clock: Clock
) -> None:
    status = pay()
    paid = PaidProbe(
        credential="acme", provider="openai", base_url=server.url, at=clock(), number=1, model="gpt-4o-mini"
    )
    assert book.told == [("take", 1, paid, ()), ("spent", 2, paid, (9, 1, status.sample_latency_ms))]
    assert (paid.day.isoformat(), status.sample_latency_ms is not None) == ("2026-03-12", True)
    pay()
    assert [(what, entry and entry.number) for what, _, entry, _ in book.told[2:]] == [("take", 2), ("spent", 2)]
    status = pay()
    assert (status.sample_model, book.told[4:]) == (None, [("take", 5, None, ())])
    assert (status.error, status.warnings) == (None, ("paid probe: not made, because the day's 2 are used up",))


def test_without_leave_nobody_is_asked_for_it(pay: Callable[..., ProviderStatus], book: Book) -> None:
    assert pay(paid_probes_per_day=0).error is None
    assert book.told == []


@pytest.mark.parametrize(
    ("answer", "timeout_s", "kind"), [(None, 3, ProbeTimeout), (reply(b"", status=500), 20, UnexpectedAnswer)]
)
def test_a_call_that_failed_is_told_without_tokens(
    pay: Callable[..., ProviderStatus], book: Book, server: ProbeServer, answer: Any, timeout_s: float, kind: type
) -> None:
    server.replies[SAMPLE] = answer or server.silent
    status = pay(timeout_s=timeout_s)
    assert type(status.error) is kind
    assert [what for what, *_ in book.told] == ["take", "spent"]
    assert book.told[1][3] == (None, None, status.sample_latency_ms)
    assert (status.sample_latency_ms is None) == (kind is ProbeTimeout)


def test_what_cannot_be_counted_is_not_paid_for(
    pay: Callable[..., ProviderStatus], book: Book, server: ProbeServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "metering")
    book.fails = {"take"}
    status = pay()
    assert (status.error, status.sample_model, server.bodies) == (None, None, [])
    assert status.models != ()
    assert status.warnings == ("paid probe: not made, because it cannot be counted (StoreUnavailable)",)
    book.fails = {"spent"}
    status = pay()
    assert (status.error, status.sample_input_tokens, len(server.bodies)) == (None, 9, 1)
    assert status.warnings == ("paid probe: what it spent cannot be recorded (StoreUnavailable)",)
    assert KEY not in caplog.text


def take(paid: PaidByProcess, credential: str, at: datetime, most: int = 1) -> PaidProbe | None:
    return paid.take(
        credential=credential, provider="openai", base_url="https://a.example", at=at, model="m", most=most
    )


def test_a_process_counts_by_day_and_not_for_ever_more_credentials(clock: Clock) -> None:
    paid = PaidByProcess()
    found = [take(paid, f"c{number}", clock()) for number in range(MAX_KEPT + 6)]
    assert sum(each is not None for each in found) == MAX_KEPT
    assert take(paid, "c0", clock()) is None
    assert take(paid, "c0", clock() - timedelta(days=1)) is None
    tomorrow = take(paid, "c0", clock.advance(days=1))
    assert tomorrow is not None
    assert (tomorrow.number, tomorrow.at) == (1, clock())


def test_fifty_threads_take_no_more_than_there_are(clock: Clock) -> None:
    paid, together, found = PaidByProcess(), threading.Barrier(50), []

    def one() -> None:
        together.wait()
        found.append(take(paid, "acme", clock(), most=7))

    threads = [threading.Thread(target=one) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(each.number for each in found if each is not None) == [1, 2, 3, 4, 5, 6, 7]
