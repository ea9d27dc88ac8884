"""What of a body is not kept in the request log: headers by name, values by place, texts by how they look. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

from metering.errors import InvalidSetting
from metering.secret_shapes import likely, secrets_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["REDACTED", "SECRETS", "Redaction"]

_Steps: TypeAlias = tuple[str | int, ...]
"""Names, `*` for all of them; numbers of items, -1 for all of them."""

REDACTED = "[redacted]"
"""What stands where something was."""

_HEADERS = ("authorization", "proxy-authorization", "cookie", "set-cookie", "x-api-key", "api-key", "x-goog-api-key")
_KEY_ENDS = (
    "password",
    "passwd",
    "passphrase",
    "pwd",
    "secret",
    "apikey",
    "privatekey",
    "secretkey",
    "accesskey",
    "accesstoken",
    "refreshtoken",
    "authtoken",
    "authorization",
    "cookie",
)
"""How keys of secrets end, in lower case, without `_`, `-`, `.` and a plural's s: `DB_PASSWORD`, `clientSecrets`."""
_ONE_TOKEN = ("idtoken", "sessiontoken", "apitoken")
"""How others end; in the plural they count what a model read and wrote."""
_NAMED_VALUES = (("name", "value"), ("key", "value"), ("Name", "Value"), ("Key", "Value"))
"""How a mapping may say a name and its value, as headers in HAR files do (http://www.softwareishard.com/blog/har-12-spec/)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Redaction:
    """What of request and response bodies, and of errors, the request log does not keep: `[redacted]` stands for it.

    Well-known secrets are not kept, unless `secrets` is False; the rest comes on top. Raises `InvalidSetting`.
    """

    headers: tuple[str, ...] = ()
    """Names of headers, in any case: in a mapping whose own key ends in `headers`, and anywhere in a list of pairs and
    in mappings such as `{"name": "Cookie", "value": "..."}`."""
    paths: tuple[str, ...] = ()
    """Places in a body, such as `$.messages[*].content` or `user.email`: names after dots, `[3]` for an item counted
    from 0, `[*]` for all items of a list, `.*` for all values of a mapping. `$` for the body may be left out. No other
    JSONPath, and no names with one of `.[]*"'$` in them."""
    patterns: tuple[str, ...] = ()
    """Regular expressions of `re`: what they match in a text or a key is not kept."""
    secrets: bool = True
    """Whether secrets are told by the names of headers (`Authorization`, `Cookie`, `x-api-key`, ...) and of keys
    (`password`, `api_key`, `access_token`, `token`, ...), and by how they look (`sk-...`, `Bearer ...`, private keys,
    JWTs, passwords in URLs)."""
    _names: frozenset[str] = field(init=False, repr=False, compare=False)
    _places: tuple[_Steps, ...] = field(init=False, repr=False, compare=False)
    _own: tuple[re.Pattern[str], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("headers", "paths", "patterns"):
            object.__setattr__(self, name, _several(name, getattr(self, name)))
        known = _HEADERS if self.secrets else ()
        object.__setattr__(self, "_names", frozenset(map(_folded, (*known, *self.headers))))
        object.__setattr__(self, "_places", tuple(map(_steps, self.paths)))
        object.__setattr__(self, "_own", tuple(map(_compiled, self.patterns)))

    def body(self, text: str) -> str:
        """A body as JSON, without what is not to be kept. Raises RecursionError for one that is nested too deep."""
        whole = msgspec.json.decode(text)
        if isinstance(whole, str):
            return _encoded(self._inside(whole, self._places))
        _redact_at(whole, self._places)
        return _encoded(self._walked(whole, self._hider(text), in_headers=False))

    def text(self, text: str) -> str:
        """A text without what patterns tell."""
        return self._hider(text)(text)

    def _inside(self, text: str, places: Iterable[_Steps] = ()) -> str:
        """A text, which may be JSON itself: then what that says, and the text as it was where nothing is to hide."""
        said = _json_in(text)
        if said is None:
            return self.text(text)
        _redact_at(said, places)
        kept = self._walked(said, self._hider(_encoded(said)), in_headers=False)
        return text if kept == _json_in(text) else _encoded(kept)

    def _hider(self, whole: str) -> Callable[[str], str]:
        """What takes patterns out of the texts in `whole`: only of those that can be there, since few are."""
        words = likely(whole) if self.secrets else []
        own = self._own

        def hide(text: str) -> str:
            spans = secrets_in(text, words) if words else []
            for pattern in own:
                spans += [match.span() for match in pattern.finditer(text) if match[0]]
            return _without(text, spans) if spans else text

        return hide

    def _walked(self, value: Any, hide: Callable[[str], str], *, in_headers: bool) -> Any:
        if isinstance(value, str):
            return self._inside(value) if _may_be_json(value) else hide(value)
        if isinstance(value, dict):
            return self._mapping(value, hide, in_headers=in_headers)
        if isinstance(value, list):
            if _are_pairs(value):
                return [[hide(name), self._under(name, item, hide, in_headers=True)] for name, item in value]
            return [self._walked(item, hide, in_headers=in_headers) for item in value]
        return value

    def _mapping(self, value: dict[str, Any], hide: Callable[[str], str], *, in_headers: bool) -> dict[str, Any]:
        kept = {hide(name): self._under(name, item, hide, in_headers=in_headers) for name, item in value.items()}
        for named, valued in _NAMED_VALUES:
            name = value.get(named)
            if isinstance(name, str) and self._hides(name, value.get(valued), in_headers=True):
                kept[valued] = REDACTED
        if "logprob" in value and isinstance(value.get("token"), str):  # a token of a model's answer
            kept["token"] = hide(value["token"])
        return kept

    def _under(self, name: str, value: Any, hide: Callable[[str], str], *, in_headers: bool) -> Any:
        if self._hides(name, value, in_headers=in_headers):
            return REDACTED
        return self._walked(value, hide, in_headers=_squeezed(name).endswith("headers"))

    def _hides(self, name: str, value: object, *, in_headers: bool) -> bool:
        if value is None or isinstance(value, bool):  # `"secret": false` tells none
            return False
        if in_headers and _folded(name) in self._names:
            return True
        if not self.secrets:
            return False
        squeezed = _squeezed(name)
        return squeezed == "token" or squeezed.endswith(_ONE_TOKEN) or squeezed.removesuffix("s").endswith(_KEY_ENDS)


def _several(name: str, given: Iterable[str]) -> tuple[str, ...]:
    if isinstance(given, str) or not all(isinstance(value, str) for value in given):
        raise InvalidSetting(f"redact.{name}", given, "several texts, such as ('...',)")
    return tuple(given)


_STEP = re.compile(r"""\.(?P<name>\*|[^.\[\]*"'$]+)|\[(?:(?P<all>\*)|(?P<index>[0-9]{1,9}))\]""")


def _steps(path: str) -> _Steps:
    rest = path.removeprefix("$")
    if rest == path and not path.startswith("["):
        rest = f".{path}"
    steps: list[str | int] = []
    at = 0
    while found := _STEP.match(rest, at):
        at = found.end()
        steps.append(found["name"] or (-1 if found["all"] else int(found["index"])))
    if at < len(rest) or not steps:
        raise InvalidSetting(
            "redact.paths", path, "a path such as $.messages[*].content or user.email: names, [3], [*] and .* only"
        )
    return tuple(steps)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as exc:
        raise InvalidSetting("redact.patterns", pattern, f"a regular expression ({exc})") from None


def _redact_at(value: Any, places: Iterable[_Steps]) -> None:
    for steps in places:
        _redact_one(value, steps)


def _redact_one(value: Any, steps: _Steps) -> None:
    step, rest = steps[0], steps[1:]
    found: Iterable[Any] = ()
    if isinstance(value, dict) and isinstance(step, str):
        found = list(value) if step == "*" else [step] if step in value else []
    elif isinstance(value, list) and isinstance(step, int):
        found = range(len(value)) if step < 0 else [step] if step < len(value) else []
    for at in found:
        if rest:
            _redact_one(value[at], rest)
        else:
            value[at] = REDACTED


def _without(text: str, spans: list[tuple[int, int]]) -> str:
    kept, done = [], 0
    for start, end in sorted(spans):
        if start >= done:
            kept += [text[done:start], REDACTED]
        done = max(done, end)
    return "".join(kept) + text[done:]


def _may_be_json(text: str) -> bool:
    return text.lstrip().startswith(("{", "[", '"'))


def _json_in(text: str) -> Any:
    """What a text says that is JSON: an object, a list or a text in quotes; None for any other."""
    if not _may_be_json(text):
        return None
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return None


def _are_pairs(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in value)


def _folded(name: str) -> str:
    return name.lower().replace("_", "-")


_GLUE = str.maketrans("", "", "_-. ")


def _squeezed(name: str) -> str:
    return name.lower().translate(_GLUE)


def _encoded(value: Any) -> str:
    return msgspec.json.encode(value).decode()


SECRETS = Redaction()
"""What every meter does unless told: no well-known secret is kept."""
