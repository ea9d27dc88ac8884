"""Questions that cost nothing are asked again where a moment later may be better, and only where there is time."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metering.errors import ConnectionFailed, ProbeTimeout, ProviderLimited, TlsFailed, UnexpectedAnswer
from metering.providers import conversation
from metering.providers.retrying import ATTEMPTS, pause_s
from tests.metering.providers import answers
from tests.metering.providers.probe_server import MODELS, OPENAI_MODELS, ProbeServer, broken, in_turn, reply
from tests.servers import HOST

if TYPE_CHECKING:
    from collections.abc import Callable

    from metering.providers.probing import ProviderStatus

GET, POST = MODELS["openai"], "POST /v1/chat/completions"
WHOLE = reply(OPENAI_MODELS, answers.OPENAI)

seconds = st.floats(0, 1e6)


@given(st.integers(1, 9), seconds, st.floats(0, 1), st.none() | seconds)
def test_a_pause_fits_and_is_never_shorter_than_asked_for(
    attempt: int, left_s: float, drawn: float, retry_after_s: float | None
) -> None:
    pause = pause_s(attempt, left_s=left_s, drawn=drawn, retry_after_s=retry_after_s)
    if pause is None:
        assert attempt >= ATTEMPTS or (retry_after_s or 0) + 0.25 * 2 ** (attempt - 1) >= left_s
    else:
        assert attempt < ATTEMPTS
        assert (retry_after_s or 0) <= pause < left_s
        assert pause <= (retry_after_s or 0) + 0.5


def test_pauses_are_drawn_and_their_bound_doubles() -> None:
    assert [pause_s(attempt, left_s=9, drawn=drawn) for attempt in (1, 2, 3) for drawn in (0.0, 0.5, 1.0)] == [
        *(0.0, 0.125, 0.25),
        *(0.0, 0.25, 0.5),
        *(None, None, None),
    ]


@pytest.mark.parametrize("status", [502, 503, 504])
@pytest.mark.parametrize("times", [1, 2, 3])
def test_what_passes_is_asked_again_twice(
    ask: Callable[..., ProviderStatus], server: ProbeServer, status: int, times: int
) -> None:
    server.replies[GET] = in_turn(*[reply(b"", answers.OPENAI, status=status)] * times, WHOLE)
    found = ask()
    assert len(server.asked) == min(times + 1, 3)
    assert set(found.windows) == {"requests", "tokens"}
    if times < 3:
        assert (found.error, len(found.models)) == (None, 4)
    else:
        assert isinstance(found.error, UnexpectedAnswer)
        assert found.error.status == status


def test_a_connection_that_breaks_is_made_again(ask: Callable[..., ProviderStatus], server: ProbeServer) -> None:
    server.replies[GET] = in_turn(broken, broken, WHOLE)
    assert ask().error is None
    server.replies[GET] = in_turn(broken, broken, broken, WHOLE)
    assert type(ask(force_refresh=True).error) is ConnectionFailed
    assert server.asked == [GET] * 6


def test_a_body_that_broke_off_is_asked_for_again(ask: Callable[..., ProviderStatus], server: ProbeServer) -> None:
    cut = reply(b'{"data": [', {**answers.OPENAI, "retry-after": "43"}, length=1_000)
    server.replies[GET] = in_turn(cut, WHOLE)
    found = ask()
    assert (found.error, len(found.models), server.asked) == (None, 4, [GET] * 2)
    server.replies[GET] = in_turn(cut, broken)
    found = ask(force_refresh=True)
    assert isinstance(found.error, UnexpectedAnswer)
    assert (set(found.windows), server.asked) == ({"requests", "tokens"}, [GET] * 5)


def test_an_answer_counts_more_than_what_came_after_it(ask: Callable[..., ProviderStatus], server: ProbeServer) -> None:
    busy = reply(b"", answers.OPENAI, status=503)
    for then in (broken, server.silent):
        server.replies[GET] = in_turn(busy, then)
        found = ask(force_refresh=True, timeout_s=3)
        assert isinstance(found.error, UnexpectedAnswer)
        assert (found.error.status, found.reachable, set(found.windows)) == (503, True, {"requests", "tokens"})


@pytest.mark.parametrize("length", [None, 1_000])
@pytest.mark.parametrize(("status", "kind"), [(500, UnexpectedAnswer), (529, UnexpectedAnswer), (429, ProviderLimited)])
def test_other_answers_are_answers_though_they_break_off(
    ask: Callable[..., ProviderStatus], server: ProbeServer, status: int, kind: type, length: int | None
) -> None:
    server.replies[GET] = reply(b"{", {"retry-after": "0"}, status=status, length=length)
    assert type(ask().error) is kind
    assert server.asked == [GET]


@pytest.mark.parametrize("how", [reply(b"", status=503), broken])
def test_what_costs_is_never_asked_twice(ask: Callable[..., ProviderStatus], server: ProbeServer, how: Any) -> None:
    server.replies.update({GET: reply(OPENAI_MODELS), POST: how})
    assert ask(paid_probes_per_day=9).error is not None
    assert server.asked == [GET, POST]


@pytest.mark.parametrize("headers", [{"retry-after": "30"}, {"retry-after-ms": "20001"}])
def test_who_asks_for_more_time_than_is_left_is_not_asked_again(
    ask: Callable[..., ProviderStatus], server: ProbeServer, headers: dict[str, str]
) -> None:
    server.replies[GET] = in_turn(reply(b"", headers, status=503), WHOLE)
    found = ask(timeout_s=20)
    assert isinstance(found.error, UnexpectedAnswer)
    assert (server.asked, found.retry_after_s) == ([GET], 30 if "retry-after" in headers else 20.001)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each pause was decided by; none is made."""
    seen: list[dict[str, Any]] = []

    def at_once(attempt: int, **by: Any) -> float | None:
        seen.append({"attempt": attempt, **by})
        return None if attempt == ATTEMPTS else 0

    monkeypatch.setattr(conversation, "pause_s", at_once)
    monkeypatch.setattr(conversation, "_drawn", iter((0.1, 0.2, 0.3)).__next__)
    return seen


def test_what_retry_after_says_and_what_is_left_decide(
    ask: Callable[..., ProviderStatus], server: ProbeServer, pauses: list[dict[str, Any]]
) -> None:
    date = "Thu, 12 Mar 2026 12:00:07 GMT"  # the clock of the test is at noon
    server.replies[GET] = in_turn(
        reply(b"", {"retry-after-ms": "1500"}, status=503), reply(b"", {"retry-after": date}, status=502), broken
    )
    ask(timeout_s=20)
    left = [by.pop("left_s") for by in pauses]
    assert 20 >= left[0] >= left[1] >= left[2] > 0
    assert pauses == [
        {"attempt": 1, "drawn": 0.1, "retry_after_s": 1.5},
        {"attempt": 2, "drawn": 0.2, "retry_after_s": 7.0},
        {"attempt": 3, "drawn": 0.3},
    ]


def test_nobody_there_is_asked_for_three_times_and_bad_tls_once(
    ask: Callable[..., ProviderStatus], server: ProbeServer, pauses: list[dict[str, Any]]
) -> None:
    with socket.socket() as unheard:
        unheard.bind((HOST, 0))
        assert type(ask(base_url=f"http://{HOST}:{unheard.getsockname()[1]}").error) is ConnectionFailed
    assert [by["attempt"] for by in pauses] == [1, 2, 3]
    pauses.clear()
    assert isinstance(ask(base_url=server.url.replace("http:", "https:")).error, TlsFailed)
    assert pauses == []


def test_silence_is_not_asked_again(ask: Callable[..., ProviderStatus], server: ProbeServer) -> None:
    server.replies[GET] = server.silent
    assert type(ask(timeout_s=3).error) is ProbeTimeout
    assert server.asked == [GET]
