"""One provider being asked over HTTP: what is sent, how long an answer is waited for, and what can go wrong."""

from __future__ import annotations

import asyncio
import random
import ssl
from contextlib import asynccontextmanager
from functools import cache
from http import HTTPStatus
from http.cookiejar import CookieJar, DefaultCookiePolicy
from time import perf_counter
from typing import TYPE_CHECKING

from metering.errors import AddressRefused, ConnectionFailed, ProbeFailed, ProbeTimeout, TlsFailed
from metering.providers.addresses import check_address, check_url
from metering.providers.observing import parse_limits
from metering.providers.probe_answers import Answer
from metering.providers.probes import url_of
from metering.providers.retrying import PASSING, pause_s

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from datetime import datetime

    import httpx

    from metering.providers.probes import Credential, ProbeRule

__all__ = ["Conversation", "client_or_own"]

MAX_BODY = 1024 * 1024
"""Bytes of an answer that are read."""

_drawn = random.random  # how long pauses are is no secret


@asynccontextmanager
async def client_or_own(client: httpx.AsyncClient | None, connections: int = 1) -> AsyncIterator[httpx.AsyncClient]:
    """The client, or one for a while, with at most so many connections."""
    import httpx

    if client is not None:
        yield client
        return
    limits = httpx.Limits(max_connections=connections)
    async with httpx.AsyncClient(verify=_trusted(), cookies=_no_cookies(), limits=limits) as own:
        yield own


@cache
def _trusted() -> ssl.SSLContext:
    """To read the authorities takes 20 ms, more than all else of a probe."""
    import httpx

    return httpx.create_ssl_context()


def _no_cookies() -> CookieJar:
    """What one credential is given is not sent with the next one's."""
    return CookieJar(DefaultCookiePolicy(allowed_domains=()))


class Conversation:
    """The questions of one probe."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        credential: Credential,
        provider: str,
        rule: ProbeRule,
        timeout_s: float,
        clock: Callable[[], datetime],
    ) -> None:
        self.credential = credential
        self.rule = rule
        self.url = (credential.base_url or rule.url).rstrip("/").removesuffix("/v1")
        self._client = client
        self._provider = provider
        self._timeout_s = timeout_s
        self._clock = clock

    async def ask(self, method: str, path: str, body: bytes | None = None, *, key: str | None = None) -> Answer:
        """One answer, of any status; to a GET the last of a few, in the same time. Raises `ProbeFailed`.

        `key` is another one than the credential's.
        """
        import httpx

        key = self.credential.key or "" if key is None else key

        name = self._provider
        allowed = self.credential.allowed_hosts
        host, port = check_url(name, self.url, allowed)
        passing: list[Answer] = []
        try:
            if httpx.URL(self.url).host != host:
                raise AddressRefused(name, f"the base URL of {host} can be read in two ways")
            async with asyncio.timeout(self._timeout_s) as within:
                await check_address(name, host, port, allowed)
                if method == "GET":
                    return await self._attempts(path, key, within, passing)
                return await self._answer(method, path, body, key)
        except (TimeoutError, httpx.TimeoutException):
            problem: ProbeFailed = ProbeTimeout(name, f"{host} did not answer within {self._timeout_s:g} s")
        except httpx.TransportError as exc:
            if _is_tls(exc):
                problem = TlsFailed(name, f"no TLS that can be trusted with {host}")
            else:
                problem = ConnectionFailed(name, f"no connection with {host}, or it broke ({type(exc).__name__})")
        except httpx.InvalidURL:
            problem = AddressRefused(name, f"the base URL of {host} is none that can be asked")
        if passing:
            return passing[-1]
        raise problem

    async def _attempts(self, path: str, key: str, within: asyncio.Timeout, passing: list[Answer]) -> Answer:
        """The last answer to a GET, or its error. Into `passing` goes what may be better a moment later."""
        import httpx

        attempt = 0
        while True:
            attempt += 1
            try:
                answer = await self._answer("GET", path, None, key)
                if answer.status not in PASSING and not (answer.broke_off and answer.status == HTTPStatus.OK):
                    return answer
                passing.append(answer)
                pause = pause_s(
                    attempt, left_s=_left_s(within), drawn=_drawn(), retry_after_s=self._retry_after_s(answer)
                )
                if pause is None:
                    return answer
            except (httpx.NetworkError, httpx.RemoteProtocolError) as exc:
                pause = None if _is_tls(exc) else pause_s(attempt, left_s=_left_s(within), drawn=_drawn())
                if pause is None:
                    raise
            await asyncio.sleep(pause)

    def _retry_after_s(self, answer: Answer) -> float | None:
        if answer.status not in PASSING:
            return None  # it comes with a 200 as a matter of course
        return parse_limits(self._provider, answer.headers, now=self._clock(), status=answer.status).retry_after_s

    async def _answer(self, method: str, path: str, body: bytes | None, key: str) -> Answer:
        import httpx

        headers = {
            **self.rule.headers(key),
            "accept": "application/json",
            "accept-encoding": "identity",  # or 1 MB may unpack to a thousand
            **({} if body is None else {"content-type": "application/json"}),
        }
        start = perf_counter()
        async with self._client.stream(
            method,
            url_of(self.url, path),
            headers=headers,
            content=body,
            auth=None,
            follow_redirects=False,
            timeout=self._timeout_s,
        ) as response:
            read, problem, broke_off = bytearray(), None, False
            if response.headers.get("content-encoding", "identity").lower() != "identity":
                problem = "is packed, which was not asked for"
            else:
                try:
                    problem = await _read(response, read)
                except (httpx.NetworkError, httpx.RemoteProtocolError) as exc:
                    # What came before it still tells the limits.
                    problem, broke_off = f"broke off ({type(exc).__name__})", True
            return Answer(
                status=response.status_code,
                headers=response.headers.raw,
                body=bytes(read),
                problem=problem,
                broke_off=broke_off,
                latency_ms=round((perf_counter() - start) * 1_000),
            )


def _left_s(within: asyncio.Timeout) -> float:
    end = within.when()
    assert end is not None
    return end - asyncio.get_running_loop().time()


async def _read(response: httpx.Response, into: bytearray) -> str | None:
    """Why the body is not read to its end."""
    async for chunk in response.aiter_raw():
        into += chunk
        if len(into) > MAX_BODY:
            return f"is longer than {MAX_BODY} bytes"
    return None


def _is_tls(exc: BaseException | None) -> bool:
    while exc is not None:
        if isinstance(exc, ssl.SSLError):
            return True
        exc = exc.__cause__ or exc.__context__
    return False
