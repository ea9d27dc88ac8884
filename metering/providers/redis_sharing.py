"""What several processes share through a Redis: statuses for a while, and a question under way.

A Redis that is away, slow or holds something else never fails a probe, which then goes on without it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import msgspec

from metering.admission.redis.aio_link import AsyncLink
from metering.admission.redis.keys import shard_key, shard_of
from metering.providers.probes import MAX_MODELS, ProviderStatus

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["RedisStatuses"]

PAUSE_S = 0.05
"""Between two looks at a question that another process asks: nothing tells when it has its answer."""
WARNING_EVERY_S = 60.0
TOKEN_LENGTH = 32

logger = logging.getLogger("metering")


class RedisStatuses:
    """Statuses in one Redis, by URL as `METERING_QUOTA_URL` has it. Raises `InvalidSetting` for another one.

    Serves any number of event loops; `aclose` closes the connections of the one it is called on.
    """

    def __init__(self, url: str, *, ttl_s: Callable[[ProviderStatus], float], timeout_s: float) -> None:
        self._link = AsyncLink(url, timeout_s=timeout_s, allow_eviction=True)
        self._ttl_s = ttl_s
        self._warned_at: float | None = None

    async def get(
        self, name: str, ask: Callable[[], Awaitable[ProviderStatus]], *, force: bool, lease_s: float
    ) -> tuple[ProviderStatus, float]:
        """A status and its age in seconds: the one that is kept, else what somebody asks for just now, else `ask`'s.

        `force` takes none that is kept already. Who asks and does not come back is waited for `lease_s` seconds.
        """
        token = uuid4().hex
        found = status = None
        try:
            found = await self._found(name, token, force=force, lease_s=lease_s)
            if found is None:
                status = await ask()
                return status, 0.0
            return found
        finally:
            if found is None:
                await self._leave(name, token, status)

    async def aclose(self) -> None:
        """Close the connections of the running loop. The next call connects again."""
        await self._link.aclose()

    async def _found(
        self, name: str, token: str, *, force: bool, lease_s: float
    ) -> tuple[ProviderStatus, float] | None:
        """None where it is on the caller to ask."""
        give_up = time.monotonic() + lease_s
        wanted = "none" if force else "any"
        try:
            while time.monotonic() < give_up:
                kept, left_ms, asking = await self._run("join", name, token, max(1, round(lease_s * 1_000)), wanted)
                if not asking:
                    status = _read(kept) if left_ms > 0 else None
                    if status is not None:
                        return status, max(0.0, self._ttl_s(status) - left_ms / 1_000)
                    self._warn("what it holds is no status")
                    wanted = "none"
                elif asking.decode() == token:
                    return None
                else:
                    wanted = "any" if wanted == "any" else asking.decode()
                    await asyncio.sleep(PAUSE_S)
        except Exception as exc:  # noqa: BLE001  whatever it is, the provider can be asked without
            self._warn(f"{type(exc).__name__}: {exc}")
        return None

    async def _leave(self, name: str, token: str, status: ProviderStatus | None) -> None:
        # Also after a `join` without an answer: it may have been done all the same, and then others wait.
        said, ttl_ms = b"", 0
        if status is not None:
            said, ttl_ms = msgspec.json.encode(status.to_dict(models=MAX_MODELS)), round(self._ttl_s(status) * 1_000)
        try:
            await self._run("leave", name, token, said, ttl_ms)
        except Exception as exc:  # noqa: BLE001  as above
            self._warn(f"{type(exc).__name__}: {exc}")

    async def _run(self, script: str, name: str, *arguments: Any) -> Any:
        shard = shard_of(name)
        keys = [shard_key(shard, f"{what}:{name}") for what in ("status", "asking")]
        return await self._link.call(
            shard, "EVAL", _script(script), len(keys), *keys, *arguments, timeout_s=self._link.timeout_s
        )

    def _warn(self, problem: str) -> None:
        now = time.monotonic()
        if self._warned_at is None or now - self._warned_at >= WARNING_EVERY_S:
            self._warned_at = now
            logger.warning("statuses of probes are not shared through Redis: %s", problem)


def _read(kept: bytes) -> ProviderStatus | None:
    try:
        return ProviderStatus.from_dict(msgspec.json.decode(kept[TOKEN_LENGTH:], type=dict[str, Any]))
    except (ValueError, RecursionError):
        return None


@cache
def _script(name: str) -> str:
    return (files(__package__) / f"status_{name}.lua").read_text(encoding="utf-8")
