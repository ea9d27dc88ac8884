"""What a caller is answered where its call may not run: problem+json (RFC 9457) and the RateLimit fields. Pure.

The fields are those of draft-ietf-httpapi-ratelimit-headers, which also names the problem type of a 429.
"""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import msgspec

from metering.errors import (
    IdempotencyConflict,
    IdempotencyInProgress,
    LimitExceeded,
    Replayed,
    RevokedKey,
    StoreUnavailable,
    UnknownKey,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
    from datetime import datetime
    from decimal import Decimal

    from metering.admission.protocol import LimitStatus
    from metering.plans import Limit

    Message = MutableMapping[str, Any]

__all__ = [
    "Answer",
    "Refused",
    "answer_to",
    "invalid_idempotency_key",
    "invalid_request",
    "no_key",
    "no_meter",
    "rate_limit_headers",
    "stored_reply",
]

REPLAYED_HEADERS = (b"content-type", b"content-encoding", b"content-language", b"etag", b"last-modified", b"location")

QUOTA_EXCEEDED = "https://iana.org/assignments/http-problem-types#quota-exceeded"
ASK_AGAIN_S = 1
"""How soon a caller may ask again where nobody knows better: when a call in progress ends, or a store comes back."""

NO_CONTENT = 204
"""Says no length (RFC 9110, 8.6)."""

_WINDOW_S = {"minute": 60, "hour": 3_600, "day": 86_400, "week": 604_800}
_MOST_OF_A_FIELD = 10**15 - 1
"""The largest integer of a structured field (RFC 9651)."""
_IN_A_STRING = "".join(map(chr, range(0x20, 0x7F))).translate({ord(char): None for char in '"%\\'})


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A whole response, and the ASGI application that sends it."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes

    async def __call__(
        self,
        scope: object,  # noqa: ARG002
        receive: object,  # noqa: ARG002
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        headers = list(self.headers)
        if self.status != NO_CONTENT:
            headers.append((b"content-length", str(len(self.body)).encode()))
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self.body})


class Refused(Exception):
    """A request that is answered before its endpoint runs, for a reason that the meter was not asked about."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.status)
        self.answer = answer


def no_key() -> Answer:
    """401: nobody said who calls."""
    return _problem(
        401,
        "no-api-key",
        "No API key",
        "Send the API key as 'Authorization: Bearer KEY' or as 'x-api-key: KEY'.",
        headers={"www-authenticate": "Bearer"},
    )


def no_meter() -> Answer:
    """503: the app has no meter yet."""
    return _unavailable("The app is not ready to meter calls yet.")


def invalid_idempotency_key(expected: str) -> Answer:
    """400: the header Idempotency-Key is not one."""
    return _problem(
        400,
        "invalid-idempotency-key",
        "Invalid Idempotency-Key",
        f"The header Idempotency-Key has to be {expected}.",
        field="Idempotency-Key",
        expected=expected,
    )


def invalid_request(field: str, expected: str) -> Answer:
    """422: what the request asks for cannot be billed."""
    return _problem(
        422,
        "invalid-request",
        "Invalid request",
        f"{field} has to be {expected}.",
        field=field,
        expected=expected,
    )


def answer_to(error: Exception, now: datetime) -> Answer | None:
    """What one of the package's errors means to the caller. None: it is the app's own fault, which is a 500."""
    answer: Answer | None
    match error:
        case Refused():
            answer = error.answer
        case Replayed():
            answer = _replay(error)
        case LimitExceeded():
            answer = _too_many(error, now)
        case UnknownKey():
            answer = _problem(403, "unknown-api-key", "Unknown API key", "The API key presented is not known.")
        case RevokedKey():
            answer = _problem(
                403,
                "revoked-api-key",
                "Revoked API key",
                "The API key presented is no longer valid.",
                key_id=error.key_id,
            )
        case IdempotencyConflict():
            answer = _problem(
                409,
                "idempotency-conflict",
                "Idempotency-Key used before",
                "This Idempotency-Key was used before with another request. Send the request as it was, or a new key.",
                idempotency_key=error.idempotency_key,
            )
        case IdempotencyInProgress():
            answer = _problem(
                409,
                "idempotency-in-progress",
                "In progress",
                "A call with this Idempotency-Key is still running. Send the same request again to get its response.",
                headers={"retry-after": str(ASK_AGAIN_S)},
                idempotency_key=error.idempotency_key,
                retry_after_s=ASK_AGAIN_S,
                ends_within_s=math.ceil(error.retry_after_s),
            )
        case StoreUnavailable():
            answer = _unavailable("The call could not be metered now, so it did not run. Send it again.")
        case _:
            answer = None
    return answer


def own_fault() -> Answer:
    """500: the app has not metered the call as its plans want it; the log has the reason."""
    return _problem(500, "metering-failed", "Internal Server Error", "The app could not meter this call.")


def stored_reply(status: int, headers: Mapping[bytes, bytes], body: bytes) -> dict[str, Any]:
    """A response as it is kept for replays: of its headers those that say what the body is, and where."""
    try:
        text = {"body": body.decode()}
    except UnicodeDecodeError:
        text = {"base64": base64.b64encode(body).decode()}
    kept = {name.decode(): headers[name].decode("latin-1") for name in REPLAYED_HEADERS if name in headers}
    return {"status": status, "headers": kept, **text}


def rate_limit_headers(limits: Iterable[LimitStatus], now: datetime) -> list[tuple[bytes, bytes]]:
    """RateLimit-Policy and RateLimit; nothing where nothing is limited.

    Units other than requests are named by `qu`. A month and a billing period have no `w`, for want of one length.
    """
    statuses = list(limits)
    if not statuses:
        return []
    policies = ", ".join(_policy(status) for status in statuses)
    left = ", ".join(_left(status, now) for status in statuses)
    return [(b"ratelimit-policy", policies.encode()), (b"ratelimit", left.encode())]


def _policy(status: LimitStatus) -> str:
    limit = status.limit
    said = f'"{_name(limit)}";q={_whole(status.max)}'
    if limit.metric != "requests":
        said += f';qu="{limit.metric}"'
    window_s = _window_s(limit)
    return said if window_s is None else f"{said};w={window_s}"


def _left(status: LimitStatus, now: datetime) -> str:
    said = f'"{_name(status.limit)}";r={_whole(status.remaining)}'
    if status.reset_at is None:
        return said
    return f"{said};t={max(0, math.ceil((status.reset_at - now).total_seconds()))}"


def _window_s(limit: Limit) -> int | None:
    if limit.rate_count:
        return math.ceil(limit.rate_period_s * limit.burst / limit.rate_count)
    return _WINDOW_S.get(limit.per or "")


def _name(limit: Limit) -> str:
    return quote(limit.counter, safe=_IN_A_STRING)


def _whole(amount: int | Decimal) -> int:
    return min(int(amount), _MOST_OF_A_FIELD)


def _too_many(error: LimitExceeded, now: datetime) -> Answer:
    refused = error.decision.refused_by
    assert refused is not None
    retry_after_s = None if error.retry_after_s is None else math.ceil(error.retry_after_s)
    return _problem(
        429,
        QUOTA_EXCEEDED,
        "Quota exceeded",
        f"The limit of {error.limit} would be exceeded: asked {refused.asked}, used {error.used} of {error.max}."
        + (" It never fits." if retry_after_s is None else f" It fits in {retry_after_s} s."),
        headers={} if retry_after_s is None else {"retry-after": str(retry_after_s)},
        more_headers=rate_limit_headers(error.decision.limits, now),
        limit=error.limit.counter,
        metric=error.limit.metric,
        asked=_exact(refused.asked),
        used=_exact(error.used),
        max=_exact(error.max),
        remaining=_exact(error.remaining),
        retry_after_s=retry_after_s,
        reset_at=None if error.reset_at is None else error.reset_at.isoformat(),
        **{"violated-policies": [_name(error.limit)]},
    )


def _replay(error: Replayed) -> Answer:
    stored = error.response
    if not isinstance(stored, dict) or not stored.keys() >= {"status", "headers"}:
        return _problem(
            409,
            "response-not-kept",
            "Response not kept",
            "This call was made and billed before, and its response is no longer kept: streams and large responses "
            "never are. Use a new Idempotency-Key to make the call again.",
            event_id=str(error.decision.event_id),
            replayed=True,
        )
    body = base64.b64decode(stored["base64"]) if "base64" in stored else stored["body"].encode()
    headers = [(b"idempotent-replayed", b"true")]
    headers += [(name.encode(), value.encode("latin-1")) for name, value in stored["headers"].items()]
    return Answer(status=stored["status"], headers=headers, body=body)


def _unavailable(detail: str) -> Answer:
    return _problem(
        503,
        "metering-unavailable",
        "Service Unavailable",
        detail,
        headers={"retry-after": str(ASK_AGAIN_S)},
        retry_after_s=ASK_AGAIN_S,
    )


def _problem(
    status: int,
    kind: str,
    title: str,
    detail: str,
    *,
    headers: dict[str, str] | None = None,
    more_headers: Iterable[tuple[bytes, bytes]] = (),
    **fields: object,
) -> Answer:
    said = {
        "type": kind if ":" in kind else f"urn:tallystick:{kind}",
        "title": title,
        "status": status,
        "detail": detail,
        **fields,
    }
    fixed = {"content-type": "application/problem+json", "cache-control": "no-store", **(headers or {})}
    return Answer(
        status=status,
        headers=[*((name.encode(), value.encode()) for name, value in fixed.items()), *more_headers],
        body=msgspec.json.encode(said),
    )


def _exact(amount: int | Decimal) -> int | str:
    """A whole number as one, anything else as decimal text, since JSON readers make floats of it."""
    return int(amount) if amount == int(amount) else str(amount)
