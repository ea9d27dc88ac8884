"""Request and response bodies as the ledger keeps them: JSON text, capped, without the API key that was presented."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import msgspec

from metering.admission.protocol import Bodies
from metering.errors import InvalidEvent

if TYPE_CHECKING:
    from metering.events import Call

__all__ = ["bodies_of", "masked_error", "refuse_secret"]

MAX_LOGGED_BYTES = 64 * 1024
MAX_REPLAYED_BYTES = 16 * 1024
MAX_ERROR = 2_000
_MASK = "[API key]"


def bodies_of(secret: str | None, request: Any, response: Any, *, replayable: bool) -> Bodies:
    """What the request log keeps of both, and what a replay answers. Never raises: it runs after the work is done."""
    response_text = _as_json(response, secret)
    return Bodies(
        request=_capped(_as_json(request, secret)),
        response=_capped(response_text),
        replay=(
            response_text
            if replayable and response_text is not None and len(response_text.encode()) <= MAX_REPLAYED_BYTES
            else None
        ),
    )


def masked_error(error: object, secret: str | None) -> str | None:
    """An error, text or exception, as one short text."""
    if error is None:
        return None
    text = f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else str(error)
    text = _without(text, secret)
    return text if len(text) <= MAX_ERROR else text[: MAX_ERROR - 3] + "..."


def refuse_secret(call: Call, secret: str) -> None:
    """Raise `InvalidEvent`, not showing it, where the API key was passed as something that is kept in plain."""
    for name in call.__dataclass_fields__:
        value = getattr(call, name)
        if name != "error" and value is not None and secret in str(value):
            raise InvalidEvent(name, "(not shown)", "a value without the API key in it")


def _as_json(value: Any, secret: str | None) -> str | None:
    if value is None:
        return None
    try:
        text = msgspec.json.encode(value, enc_hook=repr).decode()
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError):
        text = json.dumps(repr(value))
    return _without(text, secret)


def _without(text: str, secret: str | None) -> str:
    if not secret:
        return text
    return text.replace(json.dumps(secret)[1:-1], _MASK).replace(secret, _MASK)


def _capped(text: str | None) -> str | None:
    if text is None:
        return None
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= MAX_LOGGED_BYTES:
        return text
    whole = hashlib.sha256(encoded).hexdigest()
    start = encoded[: MAX_LOGGED_BYTES // 2 - 200].decode("utf-8", "ignore")
    return json.dumps({"cut": True, "bytes": len(encoded), "sha256": whole, "start": start}, ensure_ascii=False)
