"""Many credentials at once: side by side, so many at a time, and none in another's way."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from metering.errors import HostNotFound, InvalidSetting, ProbeTimeout
from metering.providers import addresses
from metering.providers.probing import Credential, Memory, ProviderStatus, probe_all, probe_all_sync
from tests.metering.loops import on_a_loop, until
from tests.metering.providers.conftest import hidden
from tests.metering.providers.probe_server import KEY, MODELS, ProbeServer
from tests.servers import DEADLINE_S, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SILENT = "GET /silent/v1/models"


def credentials(server: ProbeServer, count: int, *silent: int) -> list[Credential]:
    """Credentials of which those are never answered."""
    server.replies[SILENT] = server.silent
    return [
        Credential(
            id=f"c{number}",
            provider="openai",
            key=KEY,
            base_url=f"{server.url}/silent" if number in silent else server.url,
        )
        for number in range(count)
    ]


def test_two_hundred_are_probed_while_twenty_never_answer(server: ProbeServer) -> None:
    arrived: list[ProviderStatus] = []
    asked = credentials(server, 200, *range(0, 100, 5))
    found = probe_all_sync(asked, timeout_s=6, memory=Memory(), on_status=arrived.append)
    assert [status.account_key for status in found] == [credential.id for credential in asked]
    assert [number for number, status in enumerate(found) if status.error is not None] == list(range(0, 100, 5))
    assert {type(status.error) for status in found} == {type(None), ProbeTimeout}
    # One time-out after the other, no two would have been open at the same time.
    assert server.most_open["silent"] == 20
    assert server.most_open["any"] <= 100
    assert sorted(map(id, arrived)) == sorted(map(id, found))
    for status in found:
        hidden(status)


@pytest.mark.parametrize(
    ("own", "count", "most", "parallel"),
    [(True, 12, 3, {"parallel": 3}), (False, 12, 3, {"parallel": 3}), (True, 110, 100, {})],
)
@on_a_loop
async def test_so_many_are_asked_at_a_time(own: bool, count: int, most: int, parallel: dict[str, int]) -> None:
    gate = threading.Event()
    with ProbeServer() as server:
        answer = server.replies[MODELS["openai"]]

        def gated(handler: Any) -> None:
            gate.wait(DEADLINE_S)
            answer(handler)

        server.replies[MODELS["openai"]] = gated
        asked = credentials(server, count)
        async with httpx.AsyncClient() as client:
            given = None if own else client
            found = asyncio.create_task(probe_all(asked, client=given, timeout_s=60, memory=Memory(), **parallel))
            await until(lambda: server.open["any"] == most)
            await client.get(f"{server.url}/api/tags", timeout=DEADLINE_S)  # one more would have come before it
            gate.set()
            assert [status.error for status in await found] == [None] * count
        assert server.asked[most] == MODELS["ollama"]


def test_what_is_kept_is_not_asked_again_unless_it_is_forced(server: ProbeServer) -> None:
    memory, asked = Memory(), credentials(server, 5)
    found = probe_all_sync(asked, memory=memory, timeout_s=20)
    assert list(map(id, probe_all_sync(asked, memory=memory))) == list(map(id, found))
    assert len(server.asked) == 5
    probe_all_sync(asked, memory=memory, force_refresh=True, timeout_s=20)
    assert len(server.asked) == 10


@pytest.mark.parametrize("parallel", [0, -1, True, 1.5])
def test_a_number_at_a_time_that_cannot_be(server: ProbeServer, parallel: Any) -> None:
    with pytest.raises(InvalidSetting, match="parallel"):
        probe_all_sync(credentials(server, 1), parallel=parallel)


def test_an_id_that_is_there_twice_is_refused(server: ProbeServer) -> None:
    with pytest.raises(InvalidSetting, match="'c1'"):
        probe_all_sync([*credentials(server, 3), credentials(server, 2)[1]], memory=Memory())
    assert (server.asked, probe_all_sync([])) == ([], [])


@on_a_loop
async def test_what_takes_the_statuses_may_end_it() -> None:
    def stop(status: ProviderStatus) -> None:
        raise KeyError(status.account_key)

    with ProbeServer() as server:
        answer = server.replies[MODELS["openai"]]

        def after_the_silent(handler: Any) -> None:
            wait_until(lambda: server.open["silent"] == 3, "the silent ones")
            answer(handler)

        server.replies[MODELS["openai"]] = after_the_silent
        with pytest.raises(KeyError, match="c3"):
            await probe_all(credentials(server, 4, 0, 1, 2), timeout_s=600, memory=Memory(), on_status=stop)
        await until(lambda: server.open["silent"] == 0)


def test_what_one_credential_is_given_is_not_sent_with_the_next_one(server: ProbeServer) -> None:
    found = probe_all_sync(credentials(server, 3), parallel=1, timeout_s=20, memory=Memory())
    assert [status.error for status in found] == [None] * 3
    assert len(server.headers) == 3
    assert [headers for headers in server.headers if "cookie" in headers] == []


@on_a_loop
async def test_a_client_may_be_given() -> None:
    with ProbeServer() as server:
        async with httpx.AsyncClient(headers={"user-agent": "ours"}) as client:
            found = await probe_all(credentials(server, 3), client=client, timeout_s=20, memory=Memory())
            assert not client.is_closed
        assert [status.error for status in found] == [None] * 3
        assert [headers["user-agent"] for headers in server.headers] == ["ours"] * 3


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[str]]]:
    """Never answers for the hosts of dead.example before the test ends. Tells what it was asked of these."""
    asked: list[str] = []
    ended, real = threading.Event(), socket.getaddrinfo

    def look_up(host: Any, *more: Any, **named: Any) -> Any:
        if not str(host).endswith(".dead.example"):
            return real(host, *more, **named)
        asked.append(host)
        ended.wait()
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    yield lambda: asked
    ended.set()
    wait_until(lambda: not addresses._LOOK_UPS, "the look-ups")


def test_hosts_that_are_never_found_keep_no_others_waiting(
    server: ProbeServer, resolver: Callable[[], list[str]]
) -> None:
    # The loop's own threads are six on two cores. And the loop ends, though the look-ups do not.
    dead = [
        Credential(id=f"dead{number}", provider="openai", key=KEY, base_url=f"https://h{number % 30}.dead.example")
        for number in range(60)
    ]
    memory = Memory()
    found = probe_all_sync([*dead, *credentials(server, 10)], timeout_s=3, memory=memory)
    assert [type(status.error) for status in found] == [ProbeTimeout] * 60 + [type(None)] * 10
    found = probe_all_sync(dead, timeout_s=0.01, memory=memory, force_refresh=True)
    assert {type(status.error) for status in found} == {ProbeTimeout}
    assert sorted(resolver()) == sorted(f"h{number}.dead.example" for number in range(30))


@on_a_loop
async def test_a_look_up_serves_all_who_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, asked = threading.Event(), []

    def look_up(host: str, *_: Any, **__: Any) -> Any:
        asked.append(host)
        gate.wait(DEADLINE_S)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    first, *others = [asyncio.create_task(addresses.check_address("openai", "gone.example", 443, ())) for _ in range(5)]
    await until(lambda: asked != [])
    first.cancel()
    await asyncio.sleep(0)
    gate.set()
    found = await asyncio.gather(*others, return_exceptions=True)
    assert [type(each) for each in found] == [HostNotFound] * 4
    assert (asked, first.cancelled()) == (["gone.example"], True)
    assert ("gone.example", 443) not in addresses._LOOK_UPS
