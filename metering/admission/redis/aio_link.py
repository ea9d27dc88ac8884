"""Redis as an event loop asks it: one connection a server, on which calls under way share what is sent and read.

A call is written as soon as the loop comes round, together with all others made meanwhile. Replies come
in the order of the commands.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from hiredis import pack_command
from redis import exceptions as errors
from redis.asyncio.connection import Connection, SSLConnection, UnixDomainSocketConnection
from redis.connection import SSLConnection as SyncSSLConnection
from redis.connection import UnixDomainSocketConnection as SyncUnixDomainSocketConnection

from metering.admission.redis.scripts import script
from metering.admission.redis.wire import (
    GREETING,
    Address,
    Greeted,
    NotDone,
    OutcomeUnknown,
    Servers,
    Topology,
    meaning_of,
    read_greeting,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from metering.admission.redis.wire import Greeting

__all__ = ["AsyncLink"]

_CLASSES: dict[Any, Any] = {
    None: Connection,
    SyncSSLConnection: SSLConnection,
    SyncUnixDomainSocketConnection: UnixDomainSocketConnection,
}


class AsyncLink(Servers):
    """As `Link`, for any number of event loops. No call is ever sent twice from here."""

    def __init__(self, url: str, *, timeout_s: float, allow_eviction: bool = False) -> None:
        super().__init__(allow_eviction=allow_eviction)
        self.timeout_s = timeout_s
        self._topology = Topology(url)
        self._lanes: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Address, _Lane]] = WeakKeyDictionary()
        """Connections belong to the loop that made them."""
        self._pid = os.getpid()

    async def script(
        self,
        shard: int,
        name: str,
        keys: Sequence[str],
        args: Sequence[Any],
        timeout_s: float,
        *,
        era: int | None = None,
    ) -> list[Any]:
        """What a script answers. Raises `NotDone`, `OutcomeUnknown`, `StoreUnavailable`; `Greeted` in another era."""
        wanted = script(name)
        try:
            return await self.call(shard, "EVALSHA", wanted.sha, len(keys), *keys, *args, timeout_s=timeout_s, era=era)  # type: ignore[no-any-return]
        except errors.NoScriptError:
            return await self.call(shard, "EVAL", wanted.text, len(keys), *keys, *args, timeout_s=timeout_s, era=era)  # type: ignore[no-any-return]

    async def call(self, shard: int, *command: Any, timeout_s: float, era: int | None = None) -> Any:
        """The reply to a command, on the server that has the shard, as bytes, integers and lists."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        address = self._topology.node_of(shard)
        if address is None:
            seed = self._topology.seed
            self._topology.learn(await self._ask(seed, ("CLUSTER", "SLOTS"), deadline), seed)
            address = self._topology.node_of(shard)
            assert address is not None
        return await self._ask(address, command, deadline, era)

    async def aclose(self) -> None:
        """Close every connection of the running loop. The next call connects again."""
        for lane in self._lanes.pop(asyncio.get_running_loop(), {}).values():
            await lane.aclose()

    async def _ask(self, address: Address, command: Sequence[Any], deadline: float, era: int | None = None) -> Any:
        where = f"{address.host}:{address.port}"
        lane = self._lane(address)
        try:
            if not lane.is_open:
                await self._open(lane, address, deadline)
            if era is not None and era != self.era:
                raise Greeted(f"Redis at {where} is another server than before")
            return await lane.ask(command, deadline)
        except errors.NoScriptError:
            raise
        except errors.ResponseError as exc:
            self._topology.forget()
            if isinstance(exc, errors.ReadOnlyError):
                lane.break_off(exc)  # it was the master: whoever is now may answer at the same address
            raise meaning_of(exc, where) from exc
        except (errors.RedisError, OSError) as exc:
            self._topology.forget()
            raise meaning_of(exc, where) from exc

    def _lane(self, address: Address) -> _Lane:
        if self._pid != os.getpid():
            self._lanes, self._pid = WeakKeyDictionary(), os.getpid()  # the parent's connections are the parent's
        lanes = self._lanes.setdefault(asyncio.get_running_loop(), {})
        lane = lanes.get(address)
        if lane is None or lane.is_broken:
            # Deadlines are ours: redis-py would wrap everything it sends into a task that watches its own.
            options = {**self._topology.connection_options(self.timeout_s), "socket_timeout": None}
            connection = _CLASSES[self._topology.connection_class](host=address.host, port=address.port, **options)
            lane = lanes[address] = _Lane(connection, partial(self.greeted, address), self.timeout_s)
        return lane

    async def _open(self, lane: _Lane, address: Address, deadline: float) -> None:
        where = f"{address.host}:{address.port}"
        try:
            async with asyncio.timeout_at(deadline):
                await asyncio.shield(lane.opened())
        except TimeoutError as exc:
            raise NotDone(f"Redis at {where}: no connection within the timeout") from exc
        except (errors.RedisError, OSError) as exc:
            meaning = meaning_of(exc, where)
            raise NotDone(str(meaning)) if isinstance(meaning, OutcomeUnknown) else meaning from exc


class _Lane:
    """One connection. `opened` before the first `ask`; once broken it is thrown away.

    It is open once `greeted` has taken in what the server says of itself.
    """

    def __init__(self, connection: Connection, greeted: Callable[[Greeting], None], timeout_s: float) -> None:
        self.is_open = False
        self.is_broken = False
        self._connection = connection
        self._greeted = greeted
        self._timeout_s = timeout_s
        self._opening: asyncio.Task[None] | None = None
        self._reading: asyncio.Task[None] | None = None
        self._to_send: list[bytes] = []
        self._asked: deque[tuple[asyncio.Future[Any], float]] = deque()
        """Who waits, in the order of the commands, and until when."""
        self._sending: asyncio.Task[None] | None = None
        self._watch: asyncio.TimerHandle | None = None

    def opened(self) -> asyncio.Task[None]:
        """Ends when it is open. Raises what `greeted` raises."""
        if self._opening is None:
            self._opening = asyncio.create_task(self._open())
            # Whoever waits for it may give up first, and nobody be left to take its error.
            self._opening.add_done_callback(lambda opening: opening.cancelled() or opening.exception())
        return self._opening

    def ask(self, command: Sequence[Any], deadline: float) -> asyncio.Future[Any]:
        """The reply to a command, once it is there. Late is who has none by the deadline, of the loop's clock."""
        if self.is_broken:
            raise errors.ConnectionError("the connection was lost before this was sent")
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()
        self._to_send.append(pack_command(tuple(command)))
        self._asked.append((answer, deadline))
        if self._sending is None:
            self._sending = loop.create_task(self._send())
        if self._watch is None or self._watch.when() > deadline:
            self._watch_until(loop, deadline)
        return answer

    def break_off(self, error: Exception) -> None:
        """Fail everything that waits: its outcome is unknown."""
        if self.is_broken:
            return
        self.is_broken, self.is_open = True, False
        for task in (self._opening, self._reading, self._sending):
            if task is not None and task is not asyncio.current_task():
                task.cancel()
        self._connection._close()
        if self._watch is not None:
            self._watch.cancel()
        while self._asked:
            answer, _ = self._asked.popleft()
            if not answer.done():
                answer.set_exception(errors.ConnectionError(f"the connection was lost: {error}"))

    async def aclose(self) -> None:
        """Close the connection."""
        self.break_off(errors.ConnectionError("closed"))
        tasks = [task for task in (self._opening, self._reading, self._sending) if task is not None]
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._connection.disconnect(nowait=True)

    async def _open(self) -> None:
        connection = self._connection
        try:
            async with asyncio.timeout(self._timeout_s):
                await connection.connect()
                await connection.send_packed_command(connection.pack_commands(GREETING), check_health=False)
                greeting = read_greeting([await connection.read_response(disable_decoding=True) for _ in GREETING])
            self._greeted(greeting)
        except BaseException:
            self.is_broken = True
            await connection.disconnect(nowait=True)
            raise
        self.is_open = True
        self._reading = asyncio.create_task(self._read())

    async def _send(self) -> None:
        try:
            while self._to_send:
                packed, self._to_send = self._to_send, []
                await self._connection.send_packed_command(b"".join(packed), check_health=False)
        except (errors.RedisError, OSError) as exc:
            self.break_off(exc)
        finally:
            self._sending = None

    async def _read(self) -> None:
        connection, asked = self._connection, self._asked
        try:
            while True:
                try:
                    reply: Any = await connection.read_response(
                        disable_decoding=True, timeout=math.inf, disconnect_on_error=False
                    )
                except errors.ResponseError as exc:
                    reply = exc
                answer, _ = asked.popleft()
                if answer.done():
                    continue
                if isinstance(reply, Exception):
                    answer.set_exception(reply)
                else:
                    answer.set_result(reply)
        except (errors.RedisError, OSError) as exc:
            self.break_off(exc)

    def _watch_until(self, loop: asyncio.AbstractEventLoop, deadline: float) -> None:
        """One timer for all who wait: it looks again whenever the next of them could be late."""
        if self._watch is not None:
            self._watch.cancel()
        self._watch = loop.call_at(deadline, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._watch = None
        now = loop.time()
        waiting = [deadline for answer, deadline in self._asked if not answer.done()]
        if any(deadline <= now for deadline in waiting):
            # Replies come in order: who asked later waits for the late one too, on a dead connection for ever.
            self.break_off(errors.TimeoutError("no answer within the timeout"))
        elif waiting:
            self._watch_until(loop, min(waiting))
