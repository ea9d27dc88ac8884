"""Asking a provider for its limits, over HTTP: the model list, and a call that costs only where that is allowed.

Needs httpx (extra `providers`). Nothing of the key is in a status, a log, an exception or a repr.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import ssl
from contextlib import asynccontextmanager
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING
from weakref import WeakSet

import msgspec

from metering.clock import utc_now
from metering.errors import (
    AddressRefused,
    ConnectionFailed,
    MeteringError,
    NoProviderKey,
    ProbeFailed,
    ProbeTimeout,
    TlsFailed,
    UnknownProvider,
)
from metering.providers.addresses import check_address, check_url
from metering.providers.paying import PaidByProcess, PaidProbes
from metering.providers.probe_answers import Answer, with_answer, with_models, with_sample
from metering.providers.probes import Credential, ProviderStatus
from metering.providers.registry import PROBE_RULES, limit_rule_named
from metering.providers.sharing import Shared

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from datetime import datetime

    import httpx

    from metering.providers.probes import ProbeRule, Sample

__all__ = ["Credential", "Memory", "ProviderStatus", "probe", "probe_sync"]

TIMEOUT_S = 8.0
"""For one question: looking the host up, asking, and the whole answer."""
TTL_S = 60.0
ERROR_TTL_S = 10.0
MAX_BODY = 1024 * 1024
"""Bytes of an answer that are read."""

logger = logging.getLogger("metering")


class Memory:
    """What probes share: statuses for a minute, failed ones for ten seconds, and what was paid for.

    `paid` counts the calls that cost; without one they are counted in this process alone.
    """

    def __init__(self, *, paid: PaidProbes | None = None) -> None:
        self.statuses: Shared[ProviderStatus] = Shared(ttl_s=lambda status: ERROR_TTL_S if status.error else TTL_S)
        self.paid: PaidProbes = PaidByProcess() if paid is None else paid
        _MEMORIES.add(self)

    def after_fork(self) -> None:
        """In a child nobody asks yet, and no lock is held."""
        self.statuses.after_fork()
        if isinstance(self.paid, PaidByProcess):
            self.paid.after_fork()


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
    A status is kept for 60 s, 10 s where it has an error; `force_refresh` asks all the same, but never twice at once.
    `client` serves many probes of one event loop; without one, each probe makes its own. Redirects are not followed.

    Whatever goes wrong with the provider is the status's `error`, and not raised: `UnknownProvider`, or one of
    `ProbeFailed`. Raises ImportError without httpx.
    """
    digest = hashlib.sha256((credential.key or "").encode()).digest()
    key = (credential.id, credential.provider, credential.base_url, digest)

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

    return await memory.statuses.get(key, ask, clock, force=force_refresh)


def probe_sync(
    credential: Credential,
    *,
    force_refresh: bool = False,
    timeout_s: float = TIMEOUT_S,
    clock: Callable[[], datetime] = utc_now,
    memory: Memory = _MEMORY,
) -> ProviderStatus:
    """The same for code without an event loop. Raises RuntimeError in a thread that runs one: await `probe` there."""
    return asyncio.run(probe(credential, force_refresh=force_refresh, timeout_s=timeout_s, clock=clock, memory=memory))


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
    status = ProviderStatus(provider=provider, account_key=credential.id, checked_at=clock())
    rule = PROBE_RULES[provider]
    if rule.needs_key and not credential.key:
        return replace(status, error=NoProviderKey(provider, f"no key is configured for {credential.id!r}"))
    async with _client(client) as asked:
        conversation = _Conversation(asked, credential, provider, rule, timeout_s)
        try:
            answer = await conversation.ask("GET", rule.models_path)
        except ProbeFailed as exc:
            return replace(status, error=_bare(exc), reachable=_was_asked(exc))
        status = with_answer(status, answer, clock())
        if status.error is None:
            status = with_models(status, rule, answer)
        sample = None if status.error or status.windows else rule.sample(status.models)
        if sample is None or credential.paid_probes_per_day == 0:
            return status
        return await _sampled(status, conversation, sample, clock, memory.paid)


async def _sampled(
    status: ProviderStatus,
    conversation: _Conversation,
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
        return status
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


@asynccontextmanager
async def _client(client: httpx.AsyncClient | None) -> AsyncIterator[httpx.AsyncClient]:
    import httpx

    if client is not None:
        yield client
        return
    async with httpx.AsyncClient() as own:
        yield own


class _Conversation:
    """The questions of one probe."""

    def __init__(
        self, client: httpx.AsyncClient, credential: Credential, provider: str, rule: ProbeRule, timeout_s: float
    ) -> None:
        self.credential = credential
        self.rule = rule
        self.url = (credential.base_url or rule.url).rstrip("/").removesuffix("/v1")
        self._client = client
        self._provider = provider
        self._timeout_s = timeout_s

    async def ask(self, method: str, path: str, body: bytes | None = None) -> Answer:
        """One answer, of any status. Raises `ProbeFailed`."""
        import httpx

        name = self._provider
        allowed = self.credential.allowed_hosts
        host, port = check_url(name, self.url, allowed)
        try:
            if httpx.URL(self.url).host != host:
                raise AddressRefused(name, f"the base URL of {host} can be read in two ways")
            async with asyncio.timeout(self._timeout_s):
                await check_address(name, host, port, allowed)
                return await self._answer(method, path, body)
        except (TimeoutError, httpx.TimeoutException):
            problem: ProbeFailed = ProbeTimeout(name, f"{host} did not answer within {self._timeout_s:g} s")
        except httpx.TransportError as exc:
            if _is_tls(exc):
                problem = TlsFailed(name, f"no TLS that can be trusted with {host}")
            else:
                problem = ConnectionFailed(name, f"no connection with {host}, or it broke ({type(exc).__name__})")
        except httpx.InvalidURL:
            problem = AddressRefused(name, f"the base URL of {host} is none that can be asked")
        raise problem

    async def _answer(self, method: str, path: str, body: bytes | None) -> Answer:
        headers = {
            **self.rule.headers(self.credential.key or ""),
            "accept": "application/json",
            "accept-encoding": "identity",  # or 1 MB may unpack to a thousand
            **({} if body is None else {"content-type": "application/json"}),
        }
        start = perf_counter()
        async with self._client.stream(
            method,
            self.url + path,
            headers=headers,
            content=body,
            auth=None,
            follow_redirects=False,
            timeout=self._timeout_s,
        ) as response:
            read, problem = bytearray(), None
            if response.headers.get("content-encoding", "identity").lower() != "identity":
                problem = "is packed, which was not asked for"
            else:
                problem = await _read(response, read)
            return Answer(
                status=response.status_code,
                headers=response.headers.raw,
                body=bytes(read),
                problem=problem,
                latency_ms=round((perf_counter() - start) * 1_000),
            )


async def _read(response: httpx.Response, into: bytearray) -> str | None:
    """Why the body is not whole: what came before it still tells the limits."""
    import httpx

    try:
        async for chunk in response.aiter_raw():
            into += chunk
            if len(into) > MAX_BODY:
                return f"is longer than {MAX_BODY} bytes"
    except httpx.TimeoutException:
        raise
    except httpx.TransportError as exc:
        return f"broke off ({type(exc).__name__})"
    return None


def _was_asked(problem: ProbeFailed) -> bool | None:
    return False if isinstance(problem, ConnectionFailed | ProbeTimeout) else None


def _is_tls(exc: BaseException | None) -> bool:
    while exc is not None:
        if isinstance(exc, ssl.SSLError):
            return True
        exc = exc.__cause__ or exc.__context__
    return False


def _bare(exc: MeteringError) -> MeteringError:
    """Without the frames it came through, which hold the key."""
    exc.__cause__ = exc.__context__ = None
    return exc.with_traceback(None)
