"""Admissions on Redis, beside the script they are made of: sent by redis-py (the floor), and by as little as can be."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import ExitStack
from dataclasses import replace
from decimal import Decimal
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import hiredis
import redis
import redis.asyncio

from benchmarks.measure import Contender, Target, compare, in_tasks, in_threads
from benchmarks.peer import Peer
from metering import AsyncMeter, Meter, TokenUsage
from metering.admission.redis.keys import shard_of
from metering.admission.redis.scripts import script
from metering.admission.redis.stream import events_key
from metering.plans import Limit, Plan

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from benchmarks.measure import Rate, Table
    from tests.servers import RedisServer

__all__ = ["async_table", "threads_table"]

THREADS = 8
TASKS = 64
MOST = Decimal(10) ** 12
PLAN = Plan(
    name="bench",
    retention_days=30,
    limits=(
        Limit(metric="requests", per="month", max=MOST),
        Limit(metric="tokens", per="day", max=MOST),
        Limit(metric="requests", per="hour", max=MOST),
    ),
)
USAGE = TokenUsage(input_tokens=812, output_tokens=120)
SAID: dict[str, Any] = {"line": "application", "usage": USAGE, "provider": "openai", "model": "gpt-4.1-mini"}
TIMEOUT_S = 3600.0
"""Far more than the default: a busy machine slows a turn and does not fail it, and a recorded call stays in time."""

_ID = "5" * 32
"""Stands in a recorded call for the id of the call."""


def threads_table(
    folder: Path, server: RedisServer, peer: Path | None, *, keyed: bool, rounds: int, turn_s: float
) -> Table:
    """`Meter.consume`, called by threads."""
    with ExitStack() as stack:
        place = _Place(folder, server, stack, keyed=keyed)
        client = stack.enter_context(redis.Redis.from_url(server.url))
        floor = _Recorded(place, "floor")
        meter = stack.enter_context(place.meter())
        secret, said = place.secret("meter"), place.said

        def evalsha() -> None:
            floor.check(client.evalsha(*floor.fresh()))

        def consume() -> None:
            assert meter.consume(secret, **said()).allowed

        def threads(call: Callable[[], None], seconds: float) -> Rate:
            return in_threads(call, threads=THREADS, seconds=seconds)

        contenders = [
            Contender(
                name="redis-py, the same script",
                does="EVALSHA with the keys and arguments that Meter sends, a fresh id each; nothing else",
                turn=place.counted("floor", partial(threads, evalsha)),
            ),
            Contender(
                name="Meter.consume",
                does="three limits and the event in one script; checks and encodes the call, answers a Decision",
                turn=place.counted("meter", partial(threads, consume)),
            ),
        ]
        if peer is not None:
            contenders.append(_limits(stack.enter_context(Peer(peer, server.url, "threads", THREADS)), "redis-py"))
        targets = [Target(name="Meter.consume", beside=contenders[0].name, least=1 / 1.3)]
        title = f"Redis, {THREADS} threads ({place.variant})"
        table = compare(title, contenders, targets, rounds=rounds, turn_s=turn_s)
        return replace(table, notes=[place.server_time()])


def async_table(
    folder: Path, server: RedisServer, peer: Path | None, *, keyed: bool, rounds: int, turn_s: float
) -> Table:
    """`AsyncMeter.consume`, awaited by tasks."""
    with ExitStack() as stack:
        runner = stack.enter_context(asyncio.Runner())
        place = _Place(folder, server, stack, keyed=keyed)
        floor, ceiling = _Recorded(place, "floor"), _Recorded(place, "ceiling")
        client = redis.asyncio.Redis.from_url(server.url)
        stack.callback(lambda: runner.run(client.aclose()))
        pipe = runner.run(_Pipe.opened(server))
        stack.callback(pipe.close)
        meter = place.meter(AsyncMeter)
        stack.callback(lambda: runner.run(meter.aclose()))
        secret, said = place.secret("meter"), place.said

        async def evalsha() -> None:
            floor.check(await client.evalsha(*floor.fresh()))

        async def pipelined() -> None:
            ceiling.check(await pipe.ask("EVALSHA", *ceiling.fresh()))

        async def consume() -> None:
            assert (await meter.consume(secret, **said())).allowed

        def tasks(call: Any, seconds: float) -> Rate:
            return runner.run(in_tasks(call, tasks=TASKS, seconds=seconds))

        contenders = [
            Contender(
                name="redis.asyncio, the same script",
                does="EVALSHA with the keys and arguments that AsyncMeter sends, a fresh id each; nothing else",
                turn=place.counted("floor", partial(tasks, evalsha)),
            ),
            Contender(
                name="ceiling: bare hiredis, pipelined",
                does="the same again on one bare connection, all that the tasks ask in one go; no timeouts, no errors",
                turn=place.counted("ceiling", partial(tasks, pipelined)),
            ),
            Contender(
                name="AsyncMeter.consume",
                does="three limits and the event in one script; checks and encodes the call, answers a Decision",
                turn=place.counted("meter", partial(tasks, consume)),
            ),
        ]
        targets = [Target(name="AsyncMeter.consume", beside=contenders[1].name, least=1 / 2)]
        for kind, library in (("redispy", "redis-py"), ("coredis", "coredis")) if peer is not None else ():
            contenders.append(_limits(stack.enter_context(Peer(peer, server.url, kind, TASKS)), library))
            targets.append(Target(name="AsyncMeter.consume", beside=contenders[-1].name, least=2))
        title = f"Redis, {TASKS} asyncio tasks ({place.variant})"
        table = compare(title, contenders, targets, rounds=rounds, turn_s=turn_s)
        return replace(table, notes=[place.server_time()])


def _limits(peer: Peer, client: str) -> Contender:
    return Contender(
        name=f"peer: limits on {client}",
        does=f"{peer.name}, in a process of its own: one limit, a fixed window; records nothing, knows no replays",
        turn=peer.turn,
    )


class _Place:
    """A Redis and a ledger with accounts on the plan, one for each contender."""

    def __init__(self, folder: Path, server: RedisServer, stack: ExitStack, *, keyed: bool) -> None:
        self.variant = f"{'with' if keyed else 'without'} idempotency keys"
        self._ledger_url = f"sqlite:///{folder}/ledger.db"
        self._url = server.url
        self._keys = (f"key-{number}" for number in count()) if keyed else None
        self._server_us = self._scripts = 0
        self._client = stack.enter_context(redis.Redis.from_url(server.url))
        self.office = stack.enter_context(self.meter())
        """Another meter, for what is not measured."""
        self.office.apply_plans([PLAN])

    def meter(self, kind: Any = Meter) -> Any:
        """A meter of a kind."""
        return kind(self._ledger_url, quota_url=self._url, quota_timeout_s=TIMEOUT_S)

    def secret(self, account: str) -> str:
        """A new account's key."""
        return self.office.keys.create(account, plan=PLAN.name).secret

    def said(self) -> dict[str, Any]:
        """What a call says."""
        return SAID if self._keys is None else {**SAID, "idempotency_key": next(self._keys)}

    def counted(self, account: str, turn: Callable[[float], Rate]) -> Callable[[float], Rate]:
        """The turn; afterwards every call of it must be an event of the account's shard, and in all its counters."""
        events = events_key(shard_of(account))

        def checked(seconds: float) -> Rate:
            self._client.xtrim(events, maxlen=0, approximate=False)  # what was looked at before: nobody drains here
            before = self._used(account)
            server_before = self._server()
            rate = turn(seconds)
            self._server_us += self._server()["usec"] - server_before["usec"]
            self._scripts += self._server()["calls"] - server_before["calls"]
            calls = rate.calls
            kept = [now - then for now, then in zip(self._used(account), before, strict=True)]
            assert kept == [calls, calls * USAGE.total_tokens, calls], (account, calls, kept)
            there = self._client.xlen(events)
            assert there == calls, (account, calls, there)
            return rate

        return checked

    def server_time(self) -> str:
        """How long the server took for a script, by its own account."""
        us = self._server_us / self._scripts
        return (
            f"the server itself takes {us:.1f} us for the script, which it could answer {1e6 / us:,.0f} times a second"
        )

    def _server(self) -> dict[str, Any]:
        return self._client.info("commandstats")["cmdstat_evalsha"]

    def _used(self, account: str) -> list[Any]:
        return [status.used for status in self.office.quota(account)]


class _Recorded:
    """The question of one real `consume` of an account, recorded on its way to Redis, and asked again with new ids."""

    def __init__(self, place: _Place, account: str) -> None:
        meter, secret = place.office, place.secret(account)
        link = meter._redis.link
        send, sent = link.script, []

        def recorded(*question: Any, **more: Any) -> list[Any]:
            sent.append(question)
            return send(*question, **more)

        link.script = recorded
        for _ in range(2):  # the first call also brings the account to Redis
            admission = meter._calls.consume(secret, **place.said())
            decision = meter._store.admit(admission)
        del link.script
        _, name, keys, args, _ = sent[-1]
        question = [script(name).sha, len(keys), *keys, *args]
        ids = {admission.event_id.hex, decision.event_id.hex}
        self._question = [_marked(part, ids) for part in question]
        self._with_id = [place for place, part in enumerate(self._question) if part not in question]
        self._ids = count()

    def fresh(self) -> list[Any]:
        """The arguments of EVALSHA."""
        event_id = f"{next(self._ids):032x}"
        question = self._question.copy()
        for place in self._with_id:
            part = question[place]
            question[place] = (
                part.replace(_ID, event_id) if isinstance(part, str) else part.replace(_ID.encode(), event_id.encode())
            )
        return question

    def check(self, reply: list[Any]) -> None:
        """It must have been admitted."""
        assert reply[0] == b"admitted", reply


def _marked(part: Any, ids: set[str]) -> Any:
    for event_id in ids:
        if isinstance(part, str):
            part = part.replace(event_id, _ID)
        elif isinstance(part, bytes):
            part = part.replace(event_id.encode(), _ID.encode())
    return part


class _Pipe(asyncio.Protocol):
    """As little as can be: one connection, what is asked in one round of the loop is sent at once, replies in order."""

    def __init__(self) -> None:
        self._reader = hiredis.Reader()
        self._to_send: list[bytes] = []
        self._asked: deque[asyncio.Future[Any]] = deque()
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def opened(cls, server: RedisServer) -> _Pipe:
        """One that is connected."""
        _, pipe = await asyncio.get_running_loop().create_connection(cls, "127.0.0.1", server.port)
        return pipe

    def ask(self, *command: Any) -> asyncio.Future[Any]:
        """The reply to a command."""
        if not self._to_send:
            self._loop.call_soon(self._flush)
        self._to_send.append(hiredis.pack_command(command))
        answer = self._loop.create_future()
        self._asked.append(answer)
        return answer

    def close(self) -> None:
        """Close the connection."""
        self._transport.abort()

    def connection_made(self, transport: Any) -> None:
        """See `asyncio.Protocol`."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self._reader.feed(data)
        while (reply := self._reader.gets()) is not False:
            self._asked.popleft().set_result(reply)

    def _flush(self) -> None:
        self._transport.write(b"".join(self._to_send))
        self._to_send.clear()
