"""A provider's rate limits, from an answer that is there already: no request is made."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from metering.clock import utc_now
from metering.errors import InvalidSetting, MeteringError
from metering.providers.limits import Limits, read_limits
from metering.providers.registry import limit_rule_named

if TYPE_CHECKING:
    from metering.providers.header_values import HeaderMap

__all__ = ["observe", "parse_limits"]


def parse_limits(provider: str, headers: HeaderMap, *, now: datetime, status: int = 200, body: object = None) -> Limits:
    """The limits that an answer carries.

    `headers` is a mapping, `httpx.Headers` or pairs; names in any case, names and values str or bytes. `now` counts
    where the answer has no `Date`. `body`, as bytes, text or decoded JSON, tells a refusal; it is not kept.

    What a provider does not say is None, and what cannot be read is None with a warning that names the header: nothing
    in an answer raises. Raises `UnknownProvider`, and `InvalidSetting` for a `now` without a time zone, a `status` that
    is no int, and `headers` that are none at all.
    """
    rule = limit_rule_named(provider)
    if not isinstance(now, datetime) or now.utcoffset() is None:
        raise InvalidSetting("now", now, "an aware datetime")
    if not isinstance(status, int) or isinstance(status, bool):
        raise InvalidSetting("status", status, "an HTTP status as an int, such as 429")
    if not isinstance(headers, Iterable) and not callable(getattr(headers, "items", None)):
        raise InvalidSetting("headers", type(headers).__name__, "a mapping, or pairs of names and values")
    return read_limits(rule, headers, now=now, status=status, body=body)


def observe(provider: str, response: object, *, body: object = None, now: datetime | None = None) -> Limits:
    """The limits that an answer to the app's own call carries.

    `response` is anything with headers and a status: of httpx, requests, aiohttp or urllib, an SDK's raw response, or
    the error that an SDK raised. Its body is never read, because it may be a stream that is the app's; where it was
    read already (httpx, an SDK's error) it is looked at, and `body` gives any other one.

    Never raises: a response without headers, or a provider that is not known, gives `Limits` without windows, and a
    warning.
    """
    moment = utc_now()
    try:
        moment = (now or moment).astimezone(UTC)
        status, headers, read = _parts_of(response)
        return parse_limits(provider, headers, now=moment, status=status, body=read if body is None else body)
    except Exception as exc:  # noqa: BLE001  whatever an app's own object raises
        problem = str(exc) if isinstance(exc, MeteringError) else type(exc).__name__
        return Limits(provider=provider, at=moment, warnings=(f"response: cannot be read ({problem})",))


def _parts_of(response: Any) -> tuple[int, HeaderMap, object]:
    """Status, headers and the body where it was read. An SDK's error, and its raw response, hold httpx's own one."""
    held = _first(response, "http_response", "response")  # which may be false: a refusal is, in requests
    held = response if held is None else held
    status = _first(held, "status_code", "status")
    if not isinstance(status, int):
        raise TypeError("status")
    body = held.content if getattr(held, "is_stream_consumed", False) is True else None
    return status, held.headers, body


def _first(of: Any, *names: str) -> Any:
    found = (getattr(of, name, None) for name in names)
    return next((each for each in found if each is not None), None)
