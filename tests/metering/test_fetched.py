"""One text for the gate and the operation: fetched once, counted the same."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metering import TokenUsage
from metering.signals import (
    AsyncFetched,
    Fetched,
    Signal,
    extraction_tokens,
)
from metering.tokens import count_input_tokens
from tests.metering.test_runs import in_time
from tests.servers import DEADLINE_S


@given(st.text(max_size=300) | st.sampled_from(["", "a\r\nb\x00", "e\u0301", "\ufeffbom", "\ud800", "<|endoftext|>"]))
def test_the_count_is_the_same_whether_or_not_the_gate_ran(text: str) -> None:
    stored = text.encode("utf-8", "surrogatepass")
    fetches: list[int] = []

    def fetch() -> str:
        fetches.append(1)
        return stored.decode("utf-8", "surrogatepass")

    async def fetch_later() -> str:
        return fetch()

    async def asynchronous(gated: bool) -> tuple[int | None, Signal, bytes]:
        fetched = AsyncFetched(fetch_later)
        gate = count_input_tokens(await fetched.text()) if gated else None
        seen = await fetched.text()
        return gate, extraction_tokens(seen), seen.encode("utf-8", "surrogatepass")

    def blocking(gated: bool) -> tuple[int | None, Signal, bytes]:
        fetched = Fetched(fetch)
        gate = count_input_tokens(fetched.text()) if gated else None
        seen = fetched.text()
        return gate, extraction_tokens(seen), seen.encode("utf-8", "surrogatepass")

    tokens = count_input_tokens(text)
    signal = Signal(line="extraction_tokens", usage=TokenUsage(input_tokens=tokens))
    for gated in (True, False):
        expected = (tokens if gated else None, signal, stored)
        assert blocking(gated) == asyncio.run(asynchronous(gated)) == expected
    assert len(fetches) == 4, "each way fetched once, with or without the gate"


def test_many_who_need_a_text_fetch_it_once() -> None:
    fetches: list[int] = []
    begun = threading.Barrier(4)

    def fetch() -> str:
        fetches.append(1)
        return "text"

    def ask() -> str:
        begun.wait(DEADLINE_S)
        return fetched.text()

    fetched = Fetched(fetch)
    with ThreadPoolExecutor(4) as pool:
        assert [asked.result() for asked in [pool.submit(ask) for _ in range(4)]] == ["text"] * 4

    async def fetch_later() -> str:
        await asyncio.sleep(0)
        return fetch()

    async def test() -> list[str]:
        shared = AsyncFetched(fetch_later)
        return await asyncio.gather(*(shared.text() for _ in range(4)))

    assert in_time(test()) == ["text"] * 4
    assert len(fetches) == 2


def test_a_fetch_that_fails_or_is_cancelled_is_tried_again() -> None:
    answers = iter([ZeroDivisionError(), "text"])

    def fetch() -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    fetched = Fetched(fetch)
    with pytest.raises(ZeroDivisionError):
        fetched.text()
    assert fetched.text() == fetched.text() == "text"

    async def test() -> str:
        fetching = asyncio.Event()
        waits = iter([True, False])

        async def fetch_later() -> str:
            fetching.set()
            if next(waits):
                await asyncio.Event().wait()
            return "text"

        shared = AsyncFetched(fetch_later)
        first, second = (asyncio.create_task(shared.text()) for _ in range(2))
        await fetching.wait()
        first.cancel()
        return await second

    assert in_time(test()) == "text"
