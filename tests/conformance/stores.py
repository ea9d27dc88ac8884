"""The stores under test: how to open a meter that decides on each, and how to look at what it keeps.

A store joins the suite by an entry in `STORES`. One with `postgres` in its name has its ledger there, others in a file.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from functools import cache, partial
from itertools import count
from typing import TYPE_CHECKING, Any

import msgspec

from metering.admission.redis.keys import counter_parts
from metering.admission.verify import check_counters
from metering.aio import AsyncHold, AsyncMeter
from metering.drain import Drain
from metering.meter import Meter
from tests.servers import RedisServer, flavours

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from datetime import datetime

    from metering.admission.verify import CounterCheck

DEADLINE_S = 60
DATABASES = 512


class SqlPlace:
    """Decides in the ledger itself."""

    longest_reply = 16 * 1024

    def __init__(self, url: str, clock: Callable[[], datetime], *, awaited: bool) -> None:
        options: dict[str, Any] = {"clock": clock, "strict_signals": True}
        self.meter: Any = Awaited(AsyncMeter(url, **options), clock) if awaited else Meter(url, **options)

    def drain(self) -> None:
        """Everything is in the ledger at once."""

    def holds(self) -> dict[str, int]:
        """How many holds there are in each state."""
        with self.meter.ledger.read() as connection:
            return dict(connection.exec_driver_sql("SELECT state, count(*) FROM holds GROUP BY state").all())

    def kept(self) -> dict[str, int]:
        """How many replays, counters and rate counters."""
        with self.meter.ledger.read() as connection:
            tables = ("replays", "counters", "rate_counters")
            return {table: connection.exec_driver_sql(f"SELECT count(*) FROM {table}").scalar_one() for table in tables}

    def counters(self) -> list[Any]:
        """Every counter and rate counter, as kept."""
        with self.meter.ledger.read() as connection:
            rows = connection.exec_driver_sql("SELECT * FROM counters ORDER BY 1, 2, 3, 4, 5, 6").all()
            rows += connection.exec_driver_sql("SELECT * FROM rate_counters ORDER BY 1, 2, 3, 4, 5, 6").all()
            return [tuple(row) for row in rows]

    def checks(self) -> list[CounterCheck]:
        """Every counter beside a recount."""
        return check_counters(self.meter.ledger)

    def close(self) -> None:
        """Close the meter."""
        self.meter.close()


class RedisPlace:
    """Decides on a real Redis. Each place has a database of its own on the one server of its flavour."""

    longest_reply = 4 * 1024

    _numbers = count()

    def __init__(self, url: str, clock: Callable[[], datetime], *, flavour: str, awaited: bool) -> None:
        server = _server(flavour)
        number = next(self._numbers) % DATABASES
        self._client = server.client()
        self._client.select(number)
        self._client.flushdb()
        options: dict[str, Any] = {
            "clock": clock,
            "strict_signals": True,
            "quota_url": f"{server.url}/{number}",
            "quota_timeout_s": 10,
        }
        if awaited:
            meter = AsyncMeter(url, **options)
            self.meter: Any = Awaited(meter, clock)
            self._store = meter._blocking._redis
        else:
            self.meter = Meter(url, **options)
            self._store = self.meter._redis
        self._drain = Drain(self.meter.ledger, self._store.link, clock=clock)

    def drain(self) -> None:
        """Bring what Redis and the spool have into the ledger."""
        self.meter.flush()
        self._drain.run()

    def holds(self) -> dict[str, int]:
        """How many holds there are in each state."""
        states = [msgspec.msgpack.decode(self._client.get(key))["state"] for key in self._keys("hold")]
        return {state: states.count(state) for state in set(states)}

    def kept(self) -> dict[str, int]:
        """How many replays, counters and rate counters."""
        current = [key for key in self._keys("counter") if self._is_current(key)]
        return {
            "replays": len(self._keys("reply")),
            "counters": len(current),
            "rate_counters": len(self._keys("rate")),
        }

    def counters(self) -> list[Any]:
        """Every counter and rate counter, as kept."""
        return [(key, self._client.get(key)) for kind in ("counter", "rate") for key in self._keys(kind)]

    def checks(self) -> list[CounterCheck]:
        """Every counter beside a recount."""
        return self._store.check_counters()

    def close(self) -> None:
        """Close the meter."""
        self.meter.close()
        self._client.close()

    def _keys(self, kind: str) -> list[bytes]:
        return sorted(self._client.keys(f"tally:{{m*}}:{kind}:*"))

    def _is_current(self, key: bytes) -> bool:
        account, generation, *_ = counter_parts(key.decode())
        copy = f"{key.decode().split(':counter:')[0]}:account:{account}"
        epoch, gen = self._client.hmget(copy, "epoch", "gen")
        return generation == f"{int(epoch)}.{int(gen)}"


class Awaited:
    """An async object in the words of the blocking one: what it answers is awaited, on an event loop elsewhere."""

    _INNER = ("accounts", "keys", "_store")

    def __init__(self, target: Any, clock: Callable[[], datetime]) -> None:
        self._target = target
        self._clock = clock

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        if name in self._INNER:
            return Awaited(value, self._clock)
        return partial(self._call, value) if callable(value) else value

    def __enter__(self) -> Awaited:
        self._call(self._target.__aenter__)
        return self

    def __exit__(self, *raised: object) -> Any:
        return self._call(self._target.__aexit__, *raised)

    def close(self) -> None:
        self._call(self._target.aclose)

    def _call(self, method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        answer = method(*arguments, **options)
        if inspect.isawaitable(answer):
            answer = asyncio.run_coroutine_threadsafe(_value(answer), _loop()).result(DEADLINE_S)
        return Awaited(answer, self._clock) if isinstance(answer, AsyncHold) else answer


async def _value(answer: Awaitable[Any]) -> Any:
    return await answer


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


@cache
def _server(flavour: str) -> RedisServer:
    """One server of each flavour for the whole run; it ends with this process."""
    server = RedisServer(flavour, args=("--databases", str(DATABASES)))
    server.start()
    return server


_FIRST = next(iter(flavours()))
STORES: dict[str, Callable[..., SqlPlace | RedisPlace]] = {
    "sqlite": partial(SqlPlace, awaited=False),
    "sqlite-async": partial(SqlPlace, awaited=True),
    "postgres": partial(SqlPlace, awaited=False),
    "postgres-async": partial(SqlPlace, awaited=True),
    **{flavour: partial(RedisPlace, flavour=flavour, awaited=False) for flavour in flavours()},
    f"{_FIRST}-async": partial(RedisPlace, flavour=_FIRST, awaited=True),
    f"{_FIRST}-postgres": partial(RedisPlace, flavour=_FIRST, awaited=False),
}
