"""Many who ask a provider at once: one request for all of them, kept for a while, and never for ever."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

import metering
from metering.clock import utc_now
from metering.errors import UnexpectedAnswer
from metering.providers import conversation
from metering.providers.paying import PaidByProcess
from metering.providers.probing import Credential, Memory, ProviderStatus, _after_fork, probe, probe_sync
from metering.providers.sharing import Shared
from tests.metering.loops import on_a_loop, until
from tests.metering.providers.probe_server import KEY, MODELS, ProbeServer, reply

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Clock


def test_a_status_is_kept_for_a_minute_and_an_error_for_less(
    ask: Callable[..., ProviderStatus], server: ProbeServer, clock: Clock
) -> None:
    first = ask()
    clock.advance(seconds=59)
    assert ask() is first
    assert len(server.asked) == 1
    clock.advance(seconds=1)
    server.replies[MODELS["openai"]] = reply(b"", status=500)
    failed = ask()
    assert (failed.reachable, len(server.asked)) == (True, 2)
    clock.advance(seconds=9)
    assert ask() is failed
    clock.advance(seconds=1)
    assert ask() is not failed
    assert len(server.asked) == 3
    ask(force_refresh=True)
    assert len(server.asked) == 4


def test_another_id_url_or_key_is_another_status(ask: Callable[..., ProviderStatus], server: ProbeServer) -> None:
    base_url = f"{server.url}/v1"
    others: list[dict[str, Any]] = [
        {"id": "b"},
        {"key": "o"},
        {"admin_key": "o"},
        {"project": "o"},
        {"base_url": base_url},
    ]
    for number, more in enumerate(({}, *others, {}), start=1):
        ask(**more)
        assert len(server.asked) == min(number, 6)


@pytest.mark.parametrize("own", [True, False])
@on_a_loop
async def test_fifty_at_once_make_one_request(own: bool) -> None:
    memory = Memory()
    with ProbeServer() as server:
        credential = Credential(id="acme", provider="openai", key=KEY, base_url=server.url)
        async with httpx.AsyncClient() as shared:
            found = await asyncio.gather(
                *(
                    probe(credential, client=None if own else shared, memory=memory, force_refresh=number % 2 == 0)
                    for number in range(50)
                )
            )
        assert server.asked == [MODELS["openai"]]
        assert {id(status) for status in found} == {id(found[0])}


def test_fifty_threads_make_one_request(server: ProbeServer) -> None:
    memory, together, found = Memory(), threading.Barrier(50), []
    answer, gate = server.replies[MODELS["openai"]], threading.Event()

    def gated(handler: Any) -> None:
        gate.wait()
        answer(handler)

    server.replies[MODELS["openai"]] = gated
    credential = Credential(id="acme", provider="openai", key=KEY, base_url=server.url)

    def ask_once() -> None:
        together.wait()
        found.append(probe_sync(credential, memory=memory, timeout_s=20))

    threads = [threading.Thread(target=ask_once) for _ in range(50)]
    for thread in threads:
        thread.start()
    gate.set()
    for thread in threads:
        thread.join()
    assert (len(found), len(set(map(id, found))), server.asked) == (50, 1, [MODELS["openai"]])


@on_a_loop
async def test_when_who_asks_is_cancelled_the_next_one_asks() -> None:
    memory = Memory()
    with ProbeServer() as server:
        good, server.replies[MODELS["openai"]] = server.replies[MODELS["openai"]], server.slow()
        credential = Credential(id="acme", provider="openai", key=KEY, base_url=server.url)
        first = asyncio.create_task(probe(credential, memory=memory, timeout_s=20))
        await until(lambda: bool(server.asked))
        waiting = [asyncio.create_task(probe(credential, memory=memory, timeout_s=20)) for _ in range(5)]
        await asyncio.sleep(0)
        server.replies[MODELS["openai"]] = good
        waiting[0].cancel()
        first.cancel()
        found = await asyncio.gather(*waiting[1:])
        assert {status.error for status in found} == {None}
        assert len(server.asked) == 2
        with pytest.raises(asyncio.CancelledError):
            await first


@on_a_loop
async def test_who_forces_takes_none_that_somebody_learnt_of_and_did_not_ask_for() -> None:
    shared: Shared[str] = Shared(ttl_s=lambda _: 60)
    gates, asked = {"old": asyncio.Event(), "new": asyncio.Event()}, []

    async def ask(found: str, age_s: float) -> tuple[str, float]:
        asked.append(found)
        await gates[found].wait()
        return found, age_s

    async def get(found: str, age_s: float, *, force: bool) -> str:
        return await shared.get("key", lambda: ask(found, age_s), utc_now, force=force)

    first = asyncio.create_task(get("old", 30, force=False))
    await until(lambda: asked == ["old"])
    others = [asyncio.create_task(get("new", 0, force=force)) for force in (True, True, False)]
    await asyncio.sleep(0)
    gates["old"].set()
    assert (await first, await others[2]) == ("old", "old")
    await until(lambda: asked == ["old", "new"])
    gates["new"].set()
    assert await asyncio.gather(*others) == ["new", "new", "old"]
    assert asked == ["old", "new"]


def test_what_is_kept_is_bounded(server: ProbeServer, clock: Clock) -> None:
    memory = Memory()
    credential = Credential(id="c", provider="nobody")
    for number in range(1_030):
        probe_sync(replace(credential, id=f"c{number}"), memory=memory, clock=clock)
    assert len(memory.statuses._kept) == 1_024


def test_a_clients_own_login_and_redirects_do_not_count(server: ProbeServer) -> None:
    async def ask() -> ProviderStatus:
        async with httpx.AsyncClient(auth=("user", "password"), follow_redirects=True) as client:
            credential = Credential(id="acme", provider="openai", key=KEY, base_url=server.url)
            return await probe(credential, client=client, memory=Memory())

    server.replies[MODELS["openai"]] = reply(b"", {"location": "/elsewhere"}, status=302)
    assert isinstance(asyncio.run(ask()).error, UnexpectedAnswer)
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"


def test_the_authorities_are_read_once(
    ask: Callable[..., ProviderStatus], server: ProbeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, real = [], httpx.create_ssl_context
    monkeypatch.setattr(httpx, "create_ssl_context", lambda: made.append(real()) or made[-1])
    conversation._trusted.cache_clear()
    for _ in range(3):
        assert ask(force_refresh=True).error is None
    assert len(made) == 1


def test_nothing_of_it_is_loaded_before_it_is_asked_for() -> None:
    script = (
        "import sys, metering.providers, metering.settings\n"
        "print([name for name in ('httpx', 'asyncio') if name in sys.modules])\n"
        "import metering.providers.probing\n"
        "print('httpx' in sys.modules)\n"
    )
    here = Path(metering.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60, cwd=here
    )
    assert done.stdout.splitlines() == ["[]", "False"]


def test_in_a_forked_child_nobody_is_waited_for(server: ProbeServer) -> None:
    memory = Memory()
    memory.statuses._flights["key"] = Future()
    memory.statuses._lock.acquire()
    assert isinstance(memory.paid, PaidByProcess)
    memory.paid._lock.acquire()
    _after_fork()
    credential = Credential(id="acme", provider="openai", key=KEY, base_url=server.url)
    assert probe_sync(credential, memory=memory, timeout_s=20).error is None
    assert memory.statuses._flights == {}
    assert memory.paid._lock.acquire(blocking=False)
