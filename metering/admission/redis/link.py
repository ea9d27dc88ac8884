"""Redis as threads ask it: a connection for each call under way, by the server that has the shard."""

from __future__ import annotations

import os
import time
from collections import defaultdict, deque
from typing import TYPE_CHECKING, Any

from hiredis import pack_command
from redis import exceptions as errors
from redis.connection import Connection

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
    from collections.abc import Iterator, Sequence

__all__ = ["Link"]


class Link(Servers):
    """Connections to one Redis, by URL: `redis://`, `rediss://`, `unix://` or `redis+cluster://`.

    Raises `InvalidSetting` for a URL that cannot be used. No call is ever sent twice from here.
    """

    def __init__(self, url: str, *, timeout_s: float, allow_eviction: bool = False) -> None:
        super().__init__(allow_eviction=allow_eviction)
        self.timeout_s = timeout_s
        self._topology = Topology(url)
        self._idle: defaultdict[Address, deque[Connection]] = defaultdict(deque)
        self._pid = os.getpid()

    def script(
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
            return self.call(shard, "EVALSHA", wanted.sha, len(keys), *keys, *args, timeout_s=timeout_s, era=era)  # type: ignore[no-any-return]
        except errors.NoScriptError:
            return self.call(shard, "EVAL", wanted.text, len(keys), *keys, *args, timeout_s=timeout_s, era=era)  # type: ignore[no-any-return]

    def call(self, shard: int, *command: Any, timeout_s: float, era: int | None = None) -> Any:
        """The reply to a command, on the server that has the shard, as bytes, integers and lists."""
        deadline = time.monotonic() + timeout_s
        return self._ask(self._node_of(shard, deadline), command, deadline, era)

    def scan(self, pattern: str, timeout_s: float) -> Iterator[str]:
        """Every key that matches, on every server."""
        self._node_of(0, time.monotonic() + timeout_s)
        for address in self._topology.nodes():
            cursor = 0
            while True:
                cursor, found = self._ask(
                    address, ("SCAN", cursor, "MATCH", pattern, "COUNT", 1000), time.monotonic() + timeout_s
                )
                yield from (key.decode() for key in found)
                cursor = int(cursor)
                if not cursor:
                    break

    def close(self) -> None:
        """Close what is idle. The next call connects again."""
        for connections in self._idle.values():
            while connections:
                connections.pop().disconnect()

    def _node_of(self, shard: int, deadline: float) -> Address:
        address = self._topology.node_of(shard)
        if address is None:
            seed = self._topology.seed
            self._topology.learn(self._ask(seed, ("CLUSTER", "SLOTS"), deadline), seed)
            address = self._topology.node_of(shard)
            assert address is not None
        return address

    def _ask(self, address: Address, command: Sequence[Any], deadline: float, era: int | None = None) -> Any:
        connection = self._take(address, deadline)
        if era is not None and era != self.era:
            self._idle[address].append(connection)
            raise Greeted(f"Redis at {address.host}:{address.port} is another server than before")
        try:
            connection.send_packed_command((pack_command(tuple(command)),), check_health=False)
            left_s = deadline - time.monotonic()
            # To set another timeout for one read costs two system calls more than the read.
            if left_s > (connection.socket_timeout or 0):
                reply = connection.read_response(disable_decoding=True)
            else:
                reply = connection.read_response(disable_decoding=True, timeout=max(left_s, 0.001))
        except errors.NoScriptError:
            self._idle[address].append(connection)
            raise
        except (errors.ResponseError, errors.ClusterDownError) as exc:
            self._topology.forget()
            connection.disconnect()
            raise meaning_of(exc, f"{address.host}:{address.port}") from exc
        except (errors.RedisError, OSError) as exc:
            self._lost(address, connection, exc)
            raise meaning_of(exc, f"{address.host}:{address.port}") from exc
        except BaseException:
            connection.disconnect()
            raise
        self._idle[address].append(connection)
        return reply

    def _take(self, address: Address, deadline: float) -> Connection:
        if self._pid != os.getpid():
            self._idle.clear()  # the parent's connections are the parent's
            self._pid = os.getpid()
        try:
            return self._idle[address].pop()
        except IndexError:
            pass
        options = self._topology.connection_options(self.timeout_s)
        connection = (self._topology.connection_class or Connection)(host=address.host, port=address.port, **options)
        try:
            connection.connect()
            connection.send_packed_command(connection.pack_commands(GREETING), check_health=False)
            left_s = max(deadline - time.monotonic(), 0.001)
            greeting = read_greeting(
                [connection.read_response(disable_decoding=True, timeout=left_s) for _ in GREETING]
            )
        except (errors.RedisError, OSError) as exc:
            self._lost(address, connection, exc)
            meaning = meaning_of(exc, f"{address.host}:{address.port}")
            raise NotDone(str(meaning)) if isinstance(meaning, OutcomeUnknown) else meaning from exc
        except BaseException:
            connection.disconnect()
            raise
        self.greeted(address, greeting)
        return connection

    def _lost(self, address: Address, connection: Connection, error: Exception) -> None:
        connection.disconnect()
        self._topology.forget()
        if isinstance(error, errors.TimeoutError):
            return
        # The others to the same server are most likely dead, too, and each would cost a call its answer.
        idle = self._idle[address]
        while idle:
            try:
                idle.pop().disconnect()
            except IndexError:
                break
