"""Asking a provider for its limits, over HTTP: the model list, and a call that costs only where that is allowed.

Needs httpx (extra `providers`). Nothing of the key is in a status, a log, an exception or a repr.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections import Counter
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, TypeVar
from weakref import WeakSet

import msgspec

from metering.clock import utc_now
from metering.errors import (
    ConnectionFailed,
    InvalidSetting,
    MeteringError,
    NoProviderKey,
    ProbeFailed,
    ProbeTimeout,
    UnknownProvider,
)
from metering.providers.conversation import Conversation, client_or_own
from metering.providers.paying import PaidByProcess, PaidProbes
from metering.providers.probe_answers import with_answer, with_free_answer, with_models, with_sample
from metering.providers.probes import Credential, ProviderStatus, free_questions
from metering.providers.registry import PROBE_RULES, limit_rule_named
from metering.providers.sharing import Shared

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable
    from datetime import datetime

    import httpx

    from metering.providers.probes import Sample
    from metering.providers.redis_sharing import RedisStatuses

__all__ = ["Credential", "Memory", "ProviderStatus", "probe", "probe_all", "probe_all_sync", "probe_sync"]

TIMEOUT_S = 8.0
"""For one question: looking the host up, asking, and the whole answer."""
QUESTIONS = 4
"""So many time-outs a probe may take; then another process no longer waits for it."""
PARALLEL = 100
TTL_S = 60.0
ERROR_TTL_S = 10.0

logger = logging.getLogger("metering")

_T = TypeVar("_T")


class Memory:
    """What probes share: statuses for a minute, failed ones for ten seconds, and what was paid for.

    With `redis_url` (as METERING_QUOTA_URL) statuses are shared with all who use that Redis, which is waited for
    `redis_timeout_s` at most; end with `aclose` on the event loop that probed. `paid` counts the calls that cost;
    without one they are counted in this process alone. Raises `InvalidSetting`.
    """

    def __init__(
        self, *, redis_url: str | None = None, redis_timeout_s: float = 0.25, paid: PaidProbes | None = None
    ) -> None:
        self.statuses: Shared[ProviderStatus] = Shared(ttl_s=_ttl_s)
        self.elsewhere = None if redis_url is None else _in_redis(redis_url, redis_timeout_s)
        self.paid: PaidProbes = PaidByProcess() if paid is None else paid
        _MEMORIES.add(self)

    async def aclose(self) -> None:
        """Close the connections that this event loop has to Redis. What is remembered stays."""
        if self.elsewhere is not None:
            await self.elsewhere.aclose()

    def after_fork(self) -> None:
        """In a child nobody asks yet, and no lock is held."""
        self.statuses.after_fork()
        if isinstance(self.paid, PaidByProcess):
            self.paid.after_fork()


def _ttl_s(status: ProviderStatus) -> float:
    return ERROR_TTL_S if status.error else TTL_S


def _in_redis(url: str, timeout_s: float) -> RedisStatuses:
    try:
        from metering.providers.redis_sharing import RedisStatuses
    except ImportError as exc:
        raise InvalidSetting("METERING_QUOTA_URL", "a Redis URL", "pip install 'tallystick[redis]'") from exc
    return RedisStatuses(url, ttl_s=_ttl_s, timeout_s=timeout_s)


_MEMORIES: WeakSet[Memory] = WeakSet()
_MEMORY = Memory()


def _after_fork() -> None:
    for memory in list(_MEMORIES):
        memory.after_fork()


os.register_at_fork(after_in_child=_after_fork)


async def probe(
    credential: Credential,
    *,
    client: httpx.AsyncClient | None = None,
    force_refresh: bool = False,
    timeout_s: float = TIMEOUT_S,
    clock: Callable[[], datetime] = utc_now,
    memory: Memory = _MEMORY,
) -> ProviderStatus:
    """What the provider says of a credential's limits now.

    Gets the model list, and where that says no limits and `paid_probes_per_day` allows it, posts a call of one token.
    What else the provider tells for free, some of it to an `admin_key` alone, adds the windows that were not told yet.
    A status is kept for 60 s, 10 s where it has an error; `force_refresh` asks all the same, but never twice at once.
    `client` serves many probes of one event loop; without one, each probe makes its own, which uses no proxy of the
    environment. Redirects are not followed. A GET that finds no connection, or is answered 502, 503 or 504, is asked up
    to twice more, all within `timeout_s`.

    Whatever goes wrong with the provider, or on the way to it, is the status's `error`, and not raised:
    `UnknownProvider`, or one of `ProbeFailed`. Raises ImportError without httpx.
    """
    name = _name(credential)

    async def ask() -> ProviderStatus:
        status = await _probed(credential, client, timeout_s, clock, memory)
        found = status.error or f"{len(status.windows)} windows, {len(status.models)} models"
        logger.log(
            logging.WARNING if status.error else logging.INFO,
            "probe of %r (%s): %s",
            credential.id,
            status.provider,
            found,
        )
        return status

    async def ask_or_learn() -> tuple[ProviderStatus, float]:
        if memory.elsewhere is None:
            return await ask(), 0.0
        return await memory.elsewhere.get(name, ask, force=force_refresh, lease_s=QUESTIONS * timeout_s)

    return await memory.statuses.get(name, ask_or_learn, clock, force=force_refresh)


async def probe_all(
    credentials: Iterable[Credential],
    *,
    parallel: int = PARALLEL,
    client: httpx.AsyncClient | None = None,
    force_refresh: bool = False,
    timeout_s: float = TIMEOUT_S,
    clock: Callable[[], datetime] = utc_now,
    memory: Memory = _MEMORY,
    on_status: Callable[[ProviderStatus], None] | None = None,
) -> list[ProviderStatus]:
    """The status of each credential, in their order; `parallel` of them are asked at a time, on one client.

    `on_status` is called with each as it arrives. Raises `InvalidSetting` for ids that are there twice, since nothing
    else tells statuses apart, and what `on_status` raises, which ends the probes that are still under way.
    """
    asked = list(credentials)
    for id_, times in Counter(credential.id for credential in asked).items():
        if times > 1:
            raise InvalidSetting("credentials", id_, "ids that are there once")
    if type(parallel) is not int or parallel < 1:
        raise InvalidSetting("parallel", parallel, "a whole number, 1 or more")
    turns = asyncio.Semaphore(parallel)

    async def one(credential: Credential) -> ProviderStatus:
        async with turns:
            status = await probe(
                credential,
                client=shared,
                force_refresh=force_refresh,
                timeout_s=timeout_s,
                clock=clock,
                memory=memory,
            )
        if on_status is not None:
            on_status(status)
        return status

    async with client_or_own(client, parallel) as shared:
        tasks = [asyncio.create_task(one(credential)) for credential in asked]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def probe_sync(
    credential: Credential,
    *,
    force_refresh: bool = False,
    timeout_s: float = TIMEOUT_S,
    clock: Callable[[], datetime] = utc_now,
    memory: Memory = _MEMORY,
) -> ProviderStatus:
    """The same for code without an event loop. Raises RuntimeError in a thread that runs one: await `probe` there."""
    asked = probe(credential, force_refresh=force_refresh, timeout_s=timeout_s, clock=clock, memory=memory)
    return asyncio.run(_then_close(asked, memory))


def probe_all_sync(
    credentials: Iterable[Credential],
    *,
    parallel: int = PARALLEL,
    force_refresh: bool = False,
    timeout_s: float = TIMEOUT_S,
    clock: Callable[[], datetime] = utc_now,
    memory: Memory = _MEMORY,
    on_status: Callable[[ProviderStatus], None] | None = None,
) -> list[ProviderStatus]:
    """`probe_all` for code without an event loop, as `probe_sync` is."""
    asked = probe_all(
        credentials,
        parallel=parallel,
        force_refresh=force_refresh,
        timeout_s=timeout_s,
        clock=clock,
        memory=memory,
        on_status=on_status,
    )
    return asyncio.run(_then_close(asked, memory))


async def _then_close(asked: Awaitable[_T], memory: Memory) -> _T:
    try:
        return await asked
    finally:
        await memory.aclose()


def _name(credential: Credential) -> str:
    """A digest of whatever makes a difference to the status."""
    said = {**asdict(credential), "key": hashlib.sha256((credential.key or "").encode()).hexdigest()}
    return hashlib.sha256(msgspec.json.encode(said)).hexdigest()


async def _probed(
    credential: Credential,
    client: httpx.AsyncClient | None,
    timeout_s: float,
    clock: Callable[[], datetime],
    memory: Memory,
) -> ProviderStatus:
    try:
        provider = limit_rule_named(credential.provider).provider
    except UnknownProvider as exc:
        return ProviderStatus(
            provider=credential.provider, account_key=credential.id, checked_at=clock(), error=_bare(exc)
        )
    said = credential.warnings
    status = ProviderStatus(provider=provider, account_key=credential.id, checked_at=clock(), warnings=said)
    rule = PROBE_RULES[provider]
    if rule.needs_key and not credential.key:
        why = f" ({'; '.join(said)})" if said else ""
        return replace(status, error=NoProviderKey(provider, f"no key is configured for {credential.id!r}{why}"))
    async with client_or_own(client) as asked:
        conversation = Conversation(asked, credential, provider, rule, timeout_s, clock)
        status = await _with_limits(status, conversation, clock, memory.paid)
        return status if status.error else await _with_free_limits(status, conversation, clock)


async def _with_limits(
    status: ProviderStatus, conversation: Conversation, clock: Callable[[], datetime], payer: PaidProbes
) -> ProviderStatus:
    """What the first question tells, or the call that costs."""
    rule = conversation.rule
    try:
        answer = await conversation.ask("GET", rule.models_path)
    except ProbeFailed as exc:
        return replace(status, error=_bare(exc), reachable=_was_asked(exc))
    status = with_answer(status, answer, clock())
    if status.error is None:
        status = with_models(status, rule, answer)
    sample = None if status.error or status.windows else rule.sample(status.models)
    if sample is None or conversation.credential.paid_probes_per_day == 0:
        return status
    return await _sampled(status, conversation, sample, clock, payer)


async def _with_free_limits(
    status: ProviderStatus, conversation: Conversation, clock: Callable[[], datetime]
) -> ProviderStatus:
    """With what the further questions tell. None of them is an error."""
    for path, key in free_questions(conversation.rule, conversation.credential):
        try:
            answer = await conversation.ask("GET", path, key=key)
        except ProbeFailed as exc:
            status = _warned(status, f"{path}: {exc.problem}")
        else:
            status = with_free_answer(status, path, answer, clock())
    return status


async def _sampled(
    status: ProviderStatus,
    conversation: Conversation,
    sample: Sample,
    clock: Callable[[], datetime],
    payer: PaidProbes,
) -> ProviderStatus:
    """With the call that costs, where there is leave for one more."""
    credential = conversation.credential
    try:
        paid = await asyncio.to_thread(
            payer.take,
            credential=credential.id,
            provider=status.provider,
            base_url=conversation.url,
            at=clock(),
            model=sample.model,
            most=credential.paid_probes_per_day,
        )
    except Exception as exc:  # noqa: BLE001  what is not counted is not paid for, and the limits are known without it
        return _warned(status, f"paid probe: not made, because it cannot be counted ({type(exc).__name__})")
    if paid is None:
        most = credential.paid_probes_per_day
        return _warned(status, f"paid probe: not made, because the day's {most} are used up")
    try:
        answer = await conversation.ask("POST", sample.path, msgspec.json.encode(sample.body))
    except ProbeFailed as exc:
        status = replace(status, error=_bare(exc), sample_model=sample.model)
    else:
        status = with_sample(with_answer(status, answer, clock()), conversation.rule, sample, answer)
    try:
        await asyncio.to_thread(
            payer.spent,
            paid,
            input_tokens=status.sample_input_tokens,
            output_tokens=status.sample_output_tokens,
            latency_ms=status.sample_latency_ms,
        )
    except Exception as exc:  # noqa: BLE001  it is made, and counted
        return _warned(status, f"paid probe: what it spent cannot be recorded ({type(exc).__name__})")
    return status


def _warned(status: ProviderStatus, warning: str) -> ProviderStatus:
    return replace(status, warnings=(*status.warnings, warning))


def _was_asked(problem: ProbeFailed) -> bool | None:
    return False if isinstance(problem, ConnectionFailed | ProbeTimeout) else None


def _bare(exc: MeteringError) -> MeteringError:
    """Without the frames it came through, which hold the key."""
    exc.__cause__ = exc.__context__ = None
    return exc.with_traceback(None)
