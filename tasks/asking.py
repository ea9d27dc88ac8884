"""Asking a provider over HTTP: again while it is busy or away, and not for ever."""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import TYPE_CHECKING

import httpx

from tasks.errors import ProviderError

if TYPE_CHECKING:
    from collections.abc import Callable

    from metering.providers import Provider, Question

__all__ = ["ask", "client_for"]

ATTEMPTS = 6
FIRST_WAIT_S = 1.0
"""Doubled each time."""
PATIENCE_S = 120.0
"""All the waiting between the attempts of one question. A provider that wants more is asked again by the next run."""
TIMEOUT_S = 60.0
"""For a connection, and for any silence after it."""
MAX_SAID = 200


def client_for(provider: Provider, key: str, url: str) -> httpx.Client:
    """A client that sends the key, and to no other host: it follows no redirect. Raises `ProviderError`."""
    try:
        return httpx.Client(base_url=url, headers=dict(provider.headers(key)), timeout=TIMEOUT_S)
    except httpx.InvalidURL as exc:
        raise ProviderError(provider.name, f"cannot be asked at {url!r}: {exc}") from exc


def ask(
    client: httpx.Client, question: Question, provider: Provider, key: str, sleep: Callable[[float], None]
) -> bytes:
    """The body of the answer.

    429, 5xx and whatever happens to the connection are tried again, ATTEMPTS times and within PATIENCE_S, after a
    growing time, or the one that Retry-After says. Raises `ProviderError`; the key is in none of its messages.
    """
    left_s = PATIENCE_S
    for attempt in range(1, ATTEMPTS + 1):
        wait_s = FIRST_WAIT_S * 2 ** (attempt - 1)
        try:
            answer = client.get(question.path, params=question.params)
        except httpx.RequestError as exc:
            problem = f"did not answer ({type(exc).__name__}: {exc})"
        else:
            if answer.status_code == HTTPStatus.OK:
                return answer.content
            problem = _problem(answer, provider, key)
            wait_s = max(wait_s, _retry_after_s(answer))
        left_s -= wait_s
        if attempt == ATTEMPTS or left_s < 0:
            break
        sleep(wait_s)
    tries = "once" if attempt == 1 else f"{attempt} times"
    raise ProviderError(provider.name, f"{problem}, asked {tries}; it may be asked again in {wait_s:.0f} s")


def _problem(answer: httpx.Response, provider: Provider, key: str) -> str:
    """What to say of an answer that may be better next time. Raises `ProviderError` for one that will not."""
    status = answer.status_code
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        # Their message may show a part of the key.
        raise ProviderError(
            provider.name,
            f"refuses the key in {provider.key_variable} ({status}): its reports need {provider.key_kind}",
        )
    if status != HTTPStatus.TOO_MANY_REQUESTS and status < HTTPStatus.INTERNAL_SERVER_ERROR:
        said = " ".join(answer.text.replace(key, "...").split())[:MAX_SAID]
        raise ProviderError(provider.name, f"answered {status} at {answer.url.path}: {said or 'nothing'}")
    return f"answered {status}"


def _retry_after_s(answer: httpx.Response) -> float:
    """Seconds until Retry-After, a number or a date (RFC 9110, 10.2.3); 0 where it says neither."""
    said = answer.headers.get("retry-after", "").strip()
    if said.isascii() and said.isdigit():
        return float(said[:9])
    try:
        then = parsedate_to_datetime(said)
    except ValueError:
        return 0.0
    return max(0.0, (then.replace(tzinfo=then.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
