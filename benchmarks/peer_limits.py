"""The package `limits`, in a process and an environment of its own: see `peer`.

    python -m benchmarks.peer_limits REDIS_URL threads|redispy|coredis CALLERS

Called by threads, or by tasks through the one or the other client. Says what it is on the first line of its output.
Then, for each line it reads, a number of seconds, it hits one limit for so long and says `[calls, seconds, cpu_s]`.
It ends with its input.
"""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import AsyncExitStack
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from limits import RateLimitItemPerMonth
from limits.aio.storage import RedisStorage as AsyncRedisStorage
from limits.aio.strategies import FixedWindowRateLimiter as AsyncFixedWindowRateLimiter
from limits.storage import RedisStorage
from limits.strategies import FixedWindowRateLimiter

from benchmarks.measure import in_tasks, in_threads

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from benchmarks.measure import Rate

LIMIT = RateLimitItemPerMonth(10**12)
_PACKAGES = {"threads": "redis", "redispy": "redis", "coredis": "coredis"}


async def main() -> None:
    """Answer until there is nothing more to read."""
    url, kind, callers = sys.argv[1], sys.argv[2], int(sys.argv[3])
    package = _PACKAGES[kind]
    print(f"limits {version('limits')}, {package} {version(package)}", flush=True)
    if kind == "threads":
        await _serve_threads(url, callers)
    else:
        await _serve_tasks(url, kind, callers)


async def _serve_threads(url: str, threads: int) -> None:
    storage = RedisStorage(url)
    limiter = FixedWindowRateLimiter(storage)

    def hit() -> None:
        assert limiter.hit(LIMIT, "threads")

    async def turn(seconds: float) -> Rate:
        return in_threads(hit, threads=threads, seconds=seconds)

    async def counted() -> int:
        return storage.get(LIMIT.key_for("threads"))

    await _serve(turn, counted)


async def _serve_tasks(url: str, client: str, tasks: int) -> None:
    storage = AsyncRedisStorage(f"async+{url}", implementation=client)
    limiter = AsyncFixedWindowRateLimiter(storage)

    async def hit() -> None:
        assert await limiter.hit(LIMIT, client)

    async with AsyncExitStack() as stack:
        if client == "coredis":
            await stack.enter_async_context(storage.bridge.storage)
        await _serve(
            lambda seconds: in_tasks(hit, tasks=tasks, seconds=seconds), lambda: storage.get(LIMIT.key_for(client))
        )


async def _serve(turn: Callable[[float], Awaitable[Rate]], counted: Callable[[], Awaitable[Any]]) -> None:
    sent = 0
    while line := await asyncio.to_thread(sys.stdin.readline):
        done = await turn(float(line))
        sent += done.calls
        assert await counted() == sent, f"sent {sent}, counted {await counted()}"
        print(json.dumps(done), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
