"""Statuses shared through a real Redis: one question for all processes, and no harm where it is away."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import metering
from metering.errors import InvalidSetting, KeyRefused
from metering.providers import probing
from metering.providers.probing import Credential, Memory, ProviderStatus, probe, probe_sync
from tests.metering.loops import on_a_loop, until
from tests.metering.providers import answers
from tests.metering.providers.conftest import hidden
from tests.metering.providers.probe_server import KEY, MODELS, OPENAI_MODELS, ProbeServer, Reply, reply
from tests.servers import DEADLINE_S, HOST, RedisCluster, RedisServer, free_port, wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    import redis

    from tests.conftest import Clock

OPENAI = MODELS["openai"]


def waiting(client: redis.Redis) -> int:
    """How many connections asked for a status."""
    return sum(each["cmd"] == "eval" for each in client.client_list())


@pytest.fixture(scope="module")
def running() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def redis_server(running: RedisServer) -> RedisServer:
    """Empty, and without the connections of the test before."""
    with running.client() as client:
        wait_until(lambda: waiting(client) == 0, "connections to end")
        client.flushall()
    return running


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[redis.Redis]:
    with redis_server.client() as connected:
        yield connected


@pytest.fixture
def memories(redis_server: RedisServer) -> Callable[[], Memory]:
    """Each is what another process would have."""
    return lambda: Memory(redis_url=redis_server.url, redis_timeout_s=DEADLINE_S)


@pytest.fixture
def ask(server: ProbeServer, memories: Callable[[], Memory]) -> Callable[..., ProviderStatus]:
    """Probes the server, each time as another process, or with a memory of its own."""

    def once(memory: Memory | None = None, *, force_refresh: bool = False, clock: Any = None, **more: Any) -> Any:
        credential = Credential(**{"id": "acme", "provider": "openai", "key": KEY, "base_url": server.url, **more})
        options = {} if clock is None else {"clock": clock}
        memory = memory or memories()
        status = probe_sync(credential, memory=memory, timeout_s=20, force_refresh=force_refresh, **options)
        hidden(status)
        return status

    return once


def kept(client: redis.Redis, kind: str = "status") -> list[bytes]:
    return list(client.scan_iter(f"tally:*:{kind}:*"))


def test_what_one_process_asked_the_others_know(
    ask: Callable[..., ProviderStatus], server: ProbeServer, client: redis.Redis
) -> None:
    first = ask()
    assert first.windows != {}
    assert ask() == first
    assert server.asked == [OPENAI]
    [key] = kept(client)
    assert 30_000 < client.pttl(key) <= 60_000
    assert kept(client, "asking") == []
    client.delete(key)
    ask()
    assert server.asked == [OPENAI] * 2
    ask(force_refresh=True)
    assert server.asked == [OPENAI] * 3


def test_an_error_is_shared_for_less_and_keeps_its_type(
    ask: Callable[..., ProviderStatus], server: ProbeServer, client: redis.Redis
) -> None:
    server.replies[OPENAI] = reply(b"", answers.OPENAI, status=401)
    first, second = ask(), ask()
    assert isinstance(second.error, KeyRefused)
    assert (str(second.error), second.error.status, second.windows) == (str(first.error), 401, first.windows)
    assert server.asked == [OPENAI]
    assert 0 < client.pttl(kept(client)[0]) <= 10_000


def test_every_model_is_shared(ask: Callable[..., ProviderStatus], server: ProbeServer) -> None:
    server.replies[OPENAI] = reply({"data": [{"id": f"m{number}"} for number in range(1_000)]}, answers.OPENAI)
    assert len(ask().models) == 1_000
    assert ask().models == ask().models
    assert (len(ask().models), server.asked) == (1_000, [OPENAI])


def test_what_changes_the_answer_is_another_entry(
    ask: Callable[..., ProviderStatus], server: ProbeServer, client: redis.Redis
) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"id": "other"},
        {"key": KEY + "2"},
        {"base_url": f"{server.url}/v1"},
        {"allowed_hosts": ("a.example",)},
        {"paid_probes_per_day": 1},
        {"provider": "codex"},
    ]
    for number, more in enumerate([*changes, *changes], start=1):
        ask(**more)
        assert len(server.asked) == min(number, len(changes))
    assert len(kept(client)) == len(changes)


def test_nothing_secret_is_in_it(ask: Callable[..., ProviderStatus], server: ProbeServer, client: redis.Redis) -> None:
    ask()
    server.replies[OPENAI] = reply({"error": {"message": f"Incorrect API key: {KEY}"}}, status=401)
    ask(force_refresh=True)
    [key] = kept(client)
    held = (key + client.get(key)).decode()  # type: ignore[operator]
    assert "invalid key" in held
    for secret in (KEY, KEY[3:], hashlib.sha256(KEY.encode()).hexdigest(), "acme-inc", "__cf_bm"):
        assert secret not in held


def test_what_is_shared_ages_while_it_is_shared(
    ask: Callable[..., ProviderStatus],
    server: ProbeServer,
    client: redis.Redis,
    memories: Callable[[], Memory],
    clock: Clock,
) -> None:
    ask()
    client.pexpire(kept(client)[0], 40_000)
    memory = memories()
    ask(memory, clock=clock)
    client.flushall()
    clock.advance(seconds=15)
    ask(memory, clock=clock)
    assert server.asked == [OPENAI]
    clock.advance(seconds=25)
    ask(memory, clock=clock)
    assert server.asked == [OPENAI] * 2


@asynccontextmanager
async def closing(*memories: Memory) -> AsyncIterator[None]:
    try:
        yield
    finally:
        for memory in memories:
            await memory.aclose()


def gate(server: ProbeServer, answer: Reply) -> Callable[[], None]:
    """Let the server answer when it is told to."""
    server.replies[OPENAI] = lambda handler: (server.ended.wait(DEADLINE_S), answer(handler))[1]
    return server.ended.set


@pytest.mark.parametrize("force", [False, True])
def test_fifty_at_once_in_five_processes_make_one_request(
    server: ProbeServer, memories: Callable[[], Memory], client: redis.Redis, ask: Callable[..., Any], force: bool
) -> None:
    before = [ask()] if force else []

    @on_a_loop
    async def run() -> None:
        await until(lambda: waiting(client) == 0)
        answer = gate(server, reply({"data": [{"id": "new"}]}, answers.OPENAI))
        credential = Credential(id="acme", provider="openai", key=KEY, base_url=server.url)
        all_of_them = [memories() for _ in range(5)]
        async with closing(*all_of_them):
            found = [
                asyncio.create_task(
                    probe(credential, memory=all_of_them[number % 5], timeout_s=20, force_refresh=force)
                )
                for number in range(50)
            ]
            await until(lambda: waiting(client) == 5)
            answer()
            statuses = await asyncio.gather(*found)
        assert {status.models for status in statuses} == {("new",)}
        assert server.asked == [OPENAI] * (len(before) + 1)

    run()


PROCESS = """
import sys
from metering.providers.probing import Credential, Memory, probe_sync
credential = Credential(id="acme", provider="openai", key=sys.argv[1], base_url=sys.argv[2])
status = probe_sync(credential, memory=Memory(redis_url=sys.argv[3], redis_timeout_s=20), timeout_s=20)
print(status.models, status.error)
"""


def test_two_processes_make_one_request(server: ProbeServer, redis_server: RedisServer, client: redis.Redis) -> None:
    answer = gate(server, server.replies[OPENAI])
    here = Path(metering.__file__).parents[1]
    both = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", PROCESS, KEY, server.url, redis_server.url],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=here,
        )
        for _ in range(2)
    ]
    on_a_loop(lambda: until(lambda: waiting(client) == 2))()
    answer()
    told = [each.communicate(timeout=60) for each in both]
    names = tuple(each["id"] for each in OPENAI_MODELS["data"])  # type: ignore[index]
    assert told == [(f"{names} None\n".encode(), b"")] * 2
    assert server.asked == [OPENAI]


@on_a_loop
async def test_when_who_asks_is_cancelled_another_process_asks() -> None:
    with ProbeServer() as server, RedisServer() as redis_server, redis_server.client() as client:
        good, server.replies[OPENAI] = server.replies[OPENAI], server.silent
        credential = Credential(id="acme", provider="openai", key=KEY, base_url=server.url)
        one, other = (Memory(redis_url=redis_server.url, redis_timeout_s=DEADLINE_S) for _ in range(2))
        async with closing(one, other):
            first = asyncio.create_task(probe(credential, memory=one, timeout_s=600))
            await until(lambda: server.open["silent"] == 1)
            second = asyncio.create_task(probe(credential, memory=other, timeout_s=600))
            await until(lambda: waiting(client) == 2)
            server.replies[OPENAI] = good
            first.cancel()
            assert (await second).error is None
        assert (server.asked, kept(client, "asking")) == ([OPENAI] * 2, [])


def asking_key(client: redis.Redis, ask: Callable[..., ProviderStatus]) -> bytes:
    """The key under which is kept who asks; nothing else is there."""
    ask()
    [key] = kept(client)
    client.flushall()
    return key.replace(b"status", b"asking")


def test_who_asked_and_died_is_waited_for_no_longer_than_a_probe_takes(
    ask: Callable[..., ProviderStatus], server: ProbeServer, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = asking_key(client, ask)
    client.set(key, "x" * 32, px=300)
    assert ask().error is None
    assert (server.asked, len(kept(client))) == ([OPENAI] * 2, 1)
    client.flushall()
    client.set(key, "x" * 32)  # and nothing ends it
    monkeypatch.setattr(probing, "QUESTIONS", 0.02)
    assert ask().error is None
    assert (server.asked, len(kept(client))) == ([OPENAI] * 3, 1)
    assert client.get(key) == b"x" * 32


GARBAGE: dict[str, Callable[[redis.Redis, bytes], Any]] = {
    "junk": lambda client, key: client.set(key, b"\xff\x00 junk", px=60_000),
    "nothing": lambda client, key: client.set(key, b"", px=60_000),
    "no object": lambda client, key: client.set(key, b"x" * 32 + b"[]", px=60_000),
    "no status": lambda client, key: client.set(key, b"x" * 32 + b"{}", px=60_000),
    "deep": lambda client, key: client.set(key, b"x" * 32 + b'{"a":' + b"[" * 100_000, px=60_000),
    "for ever": lambda client, key: client.persist(key),
    "a list": lambda client, key: (client.delete(key), client.rpush(key, "junk")),
}


@pytest.mark.parametrize("how", GARBAGE)
def test_garbage_is_asked_over_and_replaced(
    ask: Callable[..., ProviderStatus],
    server: ProbeServer,
    client: redis.Redis,
    caplog: pytest.LogCaptureFixture,
    how: str,
) -> None:
    first = ask()
    [key] = kept(client)
    GARBAGE[how](client, key)
    again = ask()
    assert (again.windows, again.error) == (first.windows, None)
    assert server.asked == [OPENAI] * 2
    assert ask() == again
    assert (server.asked, kept(client, "asking")) == ([OPENAI] * 2, [])
    assert 0 < client.pttl(key) <= 60_000
    warned = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 1


def test_a_frozen_server_fails_no_probe_and_is_warned_of_once(
    server: ProbeServer, caplog: pytest.LogCaptureFixture
) -> None:
    with RedisServer(password="p@ss/word") as redis_server:
        memory = Memory(redis_url=redis_server.url, redis_timeout_s=0.1)
        credential = Credential(id="acme", provider="openai", key=KEY, base_url=server.url)
        redis_server.freeze()
        for _ in range(3):
            assert probe_sync(credential, memory=memory, timeout_s=20, force_refresh=True).error is None
        assert probe_sync(credential, memory=memory, timeout_s=20).error is None  # it is kept in the process
        redis_server.thaw()
    assert server.asked == [OPENAI] * 3
    [warning] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "not shared through Redis" in warning
    assert "p@ss" not in caplog.text
    assert "p%40ss" not in caplog.text


@pytest.mark.parametrize("what", ["nobody", "no Redis", "a wrong password"])
def test_no_redis_there_fails_no_probe(server: ProbeServer, caplog: pytest.LogCaptureFixture, what: str) -> None:
    with RedisServer(password="right") as redis_server:
        port = {"nobody": free_port(), "no Redis": server.server_port, "a wrong password": redis_server.port}[what]
        memory = Memory(redis_url=f"redis://:secret@{HOST}:{port}", redis_timeout_s=2)
        credential = Credential(id="acme", provider="openai", key=KEY, base_url=server.url)
        assert probe_sync(credential, memory=memory, timeout_s=20).error is None
    assert sum(record.levelno == logging.WARNING for record in caplog.records) == 1
    assert "secret" not in caplog.text


def test_a_url_that_cannot_be_is_refused_without_its_password() -> None:
    with pytest.raises(InvalidSetting, match="METERING_QUOTA_URL") as refused:
        Memory(redis_url="postgres://user:secret@localhost")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("where", ["a login and a database", "a cluster"])
def test_other_places(server: ProbeServer, where: str) -> None:
    with RedisCluster() if where == "a cluster" else RedisServer(password="p@ss/word") as there:
        url = there.url if where == "a cluster" else f"{there.url}/3"
        for number in range(4):
            for _ in range(2):
                memory = Memory(redis_url=url, redis_timeout_s=DEADLINE_S)
                credential = Credential(id=f"c{number}", provider="openai", key=KEY, base_url=server.url)
                assert probe_sync(credential, memory=memory, timeout_s=20).error is None
            assert len(server.asked) == number + 1


def test_redis_is_loaded_where_it_is_used() -> None:
    script = (
        "import sys\n"
        "from metering.providers.probing import Memory\n"
        "Memory()\n"
        "print('redis' in sys.modules)\n"
        "Memory(redis_url='redis://localhost')\n"
        "print('redis' in sys.modules)\n"
    )
    here = Path(metering.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60, cwd=here
    )
    assert done.stdout.splitlines() == ["False", "True"]
