"""One provider being asked over HTTP: what is sent, how long an answer is waited for, and what can go wrong."""

from __future__ import annotations

import asyncio
import os
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
from metering.providers.hiding import pattern_of, without
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
    """The client, or one for a while, with at most so many connections.

    One of our own uses no proxy of the environment: to one for http, a key would go as it is.
    """
    import httpx

    if client is not None:
        yield client
        return
    limits = httpx.Limits(max_connections=connections)
    verify, _ = _authorities()
    async with httpx.AsyncClient(verify=verify, cookies=_no_cookies(), limits=limits, trust_env=False) as own:
        yield own


def _authorities() -> tuple[ssl.SSLContext, str]:
    """Who is trusted; where they cannot be read nobody, and why."""
    try:
        return _trusted(), ""
    except OSError as exc:
        file = os.environ.get("SSL_CERT_FILE")
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), f": SSL_CERT_FILE, {file}, cannot be read ({exc.strerror})"


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
        self._secrets = pattern_of((credential.key, credential.admin_key))
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
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        try:
            if httpx.URL(self.url).raw_host.decode() != host:
                raise AddressRefused(name, f"the base URL of {host} can be read in two ways")
            async with asyncio.timeout_at(deadline):
                await check_address(name, host, port, allowed)
            if method == "GET":
                return await self._attempts(path, key, deadline, passing)
            return await self._answer(method, path, body, key, deadline)
        except (TimeoutError, httpx.TimeoutException):
            problem: ProbeFailed = ProbeTimeout(name, f"{host} did not answer within {self._timeout_s:g} s")
        except (httpx.TransportError, OSError) as exc:
            if _is_tls(exc):
                problem = TlsFailed(name, f"no TLS that can be trusted with {host}{_authorities()[1]}")
            else:
                problem = ConnectionFailed(name, f"no connection with {host}, or it broke ({type(exc).__name__})")
        except (httpx.InvalidURL, UnicodeError):
            problem = AddressRefused(name, f"the base URL of {host} is none that can be asked")
        if passing:
            return passing[-1]
        raise problem

    async def _attempts(self, path: str, key: str, deadline: float, passing: list[Answer]) -> Answer:
        """The last answer to a GET, or its error. Into `passing` goes what may be better a moment later."""
        import httpx

        attempt = 0
        while True:
            attempt += 1
            try:
                answer = await self._answer("GET", path, None, key, deadline)
                if answer.status not in PASSING and not (answer.broke_off and answer.status == HTTPStatus.OK):
                    return answer
                passing.append(answer)
                retry_after_s = self._retry_after_s(answer)
                pause = pause_s(attempt, left_s=_left_s(deadline), drawn=_drawn(), retry_after_s=retry_after_s)
                if pause is None:
                    return answer
            except (httpx.NetworkError, httpx.RemoteProtocolError) as exc:
                pause = None if _is_tls(exc) else pause_s(attempt, left_s=_left_s(deadline), drawn=_drawn())
                if pause is None:
                    raise
            await asyncio.sleep(pause)

    def _retry_after_s(self, answer: Answer) -> float | None:
        if answer.status not in PASSING:
            return None  # it comes with a 200 as a matter of course
        return parse_limits(self._provider, answer.headers, now=self._clock(), status=answer.status).retry_after_s

    async def _answer(self, method: str, path: str, body: bytes | None, key: str, deadline: float) -> Answer:
        """Raises TimeoutError where no headers came in time. A body that did not is a problem: they tell the limits."""
        import httpx

        headers = {
            **self.rule.headers(key),
            "accept": "application/json",
            "accept-encoding": "identity",  # or 1 MB may unpack to a thousand
            **({} if body is None else {"content-type": "application/json"}),
        }
        question = self._client.build_request(
            method, url_of(self.url, path), headers=headers, content=body, timeout=self._timeout_s
        )
        start = perf_counter()
        async with asyncio.timeout_at(deadline):
            response = await self._client.send(question, stream=True, auth=None, follow_redirects=False)
        read, problem, broke_off, timed_out = bytearray(), None, False, False
        try:
            if response.headers.get("content-encoding", "identity").lower() != "identity":
                problem = "is packed, which was not asked for"
            else:
                async with asyncio.timeout_at(deadline):
                    problem = await _read(response, read)
        except (TimeoutError, httpx.TimeoutException):
            problem, timed_out = "did not end in time", True
        except (httpx.NetworkError, httpx.RemoteProtocolError) as exc:
            problem, broke_off = f"broke off ({type(exc).__name__})", True
        finally:
            await response.aclose()
        said, text = without(self._secrets, response.headers.raw, bytes(read))
        return Answer(
            status=response.status_code,
            headers=said,
            body=text,
            problem=problem,
            broke_off=broke_off,
            timed_out=timed_out,
            latency_ms=round((perf_counter() - start) * 1_000),
        )


def _left_s(deadline: float) -> float:
    return deadline - asyncio.get_running_loop().time()


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
