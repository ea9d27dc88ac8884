"""Request and response bodies as the ledger keeps them: JSON text, redacted, capped, without the API key presented."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import fields
from operator import attrgetter
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, quote_plus

import msgspec

from metering.admission.protocol import Bodies
from metering.errors import InvalidEvent
from metering.events import Call

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from metering.redaction import Redaction

__all__ = ["bodies_of", "hidden", "kept_in_plain", "masked_error", "refuse_secret", "replay_of"]

MAX_LOGGED_BYTES = 64 * 1024
MAX_REPLAYED_BYTES = 16 * 1024
MAX_ERROR = 2_000
_NOTHING = Bodies()
_MASK = "[API key]"
_NOT_SHOWN = "(not shown)"
_KEPT_IN_PLAIN = tuple(field.name for field in fields(Call) if field.name != "error")
_values_kept_in_plain = attrgetter(*_KEPT_IN_PLAIN)
_SAME_EVERYWHERE = re.compile(r"[A-Za-z0-9._~-]+")


def bodies_of(secret: str | None, request: Any, response: Any, *, replayable: bool, redact: Redaction) -> Bodies:
    """What the request log keeps of both, and what a replay answers. Never raises: it runs after the work is done.

    Only the log is redacted: a replay is the very response, for the caller who got it before.
    """
    if request is None and response is None:
        return _NOTHING
    response_text = _as_json(response, secret)
    return Bodies(
        request=_logged(_as_json(request, secret), redact),
        response=_logged(response_text, redact),
        replay=_replayed(response_text) if replayable else None,
    )


def replay_of(secret: str | None, response: Any) -> str | None:
    """What a replay answers: the response as it was, but for the API key; None for one that is too long."""
    return _replayed(_as_json(response, secret))


def _replayed(text: str | None) -> str | None:
    return text if text is not None and len(text.encode()) <= MAX_REPLAYED_BYTES else None


def masked_error(error: object, secret: str | None, redact: Redaction) -> str | None:
    """An error, text or exception, as one short text. Never raises: it runs after the work is done."""
    if error is None:
        return None
    text = _shown_by(str, error)
    if isinstance(error, BaseException):
        text = f"{type(error).__name__}: {text}"
    text = _without(text, secret).encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
    try:
        text = redact.text(text)
    except Exception as exc:  # noqa: BLE001  whatever an app's own patterns meet
        return _unredacted(exc)
    return text if len(text) <= MAX_ERROR else text[: MAX_ERROR - 3] + "..."


def refuse_secret(secret: str, said: Mapping[str, object]) -> None:
    """Raise `InvalidEvent`, not showing it, where the API key was passed as something that is kept in plain."""
    forms = _forms_of(secret)
    for name, value in said.items():
        if value is not None and _shows(value if isinstance(value, str) else str(value), forms):
            raise InvalidEvent(name, _NOT_SHOWN, "a value without the API key in it")


def kept_in_plain(call: Call) -> dict[str, object]:
    """What of a call is kept as the app said it."""
    return dict(zip(_KEPT_IN_PLAIN, _values_kept_in_plain(call), strict=True))


class hidden:  # noqa: N801  reads as a verb: with hidden(secret)
    """A block whose `InvalidEvent` does not show `secret` where it was given in the place of another value."""

    def __init__(self, secret: object) -> None:
        self._secret = secret if isinstance(secret, str) else ""

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, InvalidEvent) and _shows(_shown_by(repr, error.value), _forms_of(self._secret)):
            raise type(error)(error.field, _NOT_SHOWN, error.expected) from None


def _as_json(value: Any, secret: str | None) -> str | None:
    if value is None:
        return None
    try:
        plain = msgspec.to_builtins(value, builtin_types=(bytes, bytearray, memoryview), enc_hook=repr)
        text = msgspec.json.encode(_with_readable_bytes(plain)).decode()
    except Exception:  # noqa: BLE001  whatever an app's own object raises
        text = json.dumps(_shown_by(repr, value))
    return _without(text, secret)


def _with_readable_bytes(value: Any) -> Any:
    """Bytes as the text they are: as base64 a key inside them would not be seen."""
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).decode("utf-8", "replace")
    if isinstance(value, dict):
        return {_readable_key(name): _with_readable_bytes(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_readable_bytes(item) for item in value]
    return value


def _readable_key(name: object) -> object:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else name


def _shown_by(show: Callable[[object], str], value: object) -> str:
    try:
        return show(value)
    except Exception:  # noqa: BLE001  whatever an app's own object raises
        return f"<{type(value).__name__}>"


def _without(text: str, secret: str | None) -> str:
    for form in _forms_of(secret):
        text = text.replace(form, _MASK)
    return text


def _shows(text: str, forms: list[str]) -> bool:
    for form in forms:  # noqa: SIM110  any() would make a generator for each value of each call
        if form in text:
            return True
    return False


def _forms_of(secret: str | None) -> list[str]:
    """How a secret may be spelled in a text: as it is, and escaped up to twice as URLs, JSON and repr do."""
    if not secret:
        return []
    if _SAME_EVERYWHERE.fullmatch(secret):
        return [secret]
    forms = {secret}
    for _ in range(2):
        forms |= {escaped for form in forms for escaped in _escaped(form)}
    return sorted(forms, key=len, reverse=True)


def _escaped(text: str) -> list[str]:
    in_url = [quote(text, safe="", errors="replace"), quote_plus(text, errors="replace")]
    quoted = [repr(text), ascii(text), json.dumps(text), json.dumps(text, ensure_ascii=False)]
    return in_url + [form[1:-1] for form in quoted]


def _logged(text: str | None, redact: Redaction) -> str | None:
    if text is None:
        return None
    try:
        return _capped(redact.body(text))
    except Exception as exc:  # noqa: BLE001  whatever a body that nobody has seen brings about
        return json.dumps({"kept": False, "why": _unredacted(exc)})


def _unredacted(error: Exception) -> str:
    return f"not kept: it could not be redacted ({type(error).__name__})"


def _capped(text: str) -> str:
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= MAX_LOGGED_BYTES:
        return text
    whole = hashlib.sha256(encoded).hexdigest()
    start = encoded[: MAX_LOGGED_BYTES // 2 - 200].decode("utf-8", "ignore")
    return json.dumps({"cut": True, "bytes": len(encoded), "sha256": whole, "start": start}, ensure_ascii=False)
