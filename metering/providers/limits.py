"""What a provider's answer says of its rate limits, and how a provider's rule is read (pure)."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Context, Decimal
from fractions import Fraction
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec

from metering.providers.header_values import (
    MAX_DAYS,
    MAX_VALUE,
    amount,
    count,
    duration,
    fields,
    fraction,
    http_date,
    named_items,
    seconds,
)

if TYPE_CHECKING:
    import re
    from collections.abc import Callable, Mapping

    from metering.providers.header_values import HeaderMap

__all__ = ["BodySays", "Field", "LimitRule", "LimitWindow", "Limits", "read_limits"]

MAX_HEADERS = 64
"""Rate-limit headers of one answer that are read and kept."""
MAX_WINDOWS = 256
"""Of a body. OpenAI tells a project's limits for each of its models."""
MAX_NAME = 100
"""Characters of a header's name."""
MAX_BODY = 64 * 1024
"""Bytes of a body that is looked at: a refusal is short."""
MAX_SHOWN = 60
MAX_NUMBER = 10**30
"""What is larger is no number of a body: its digits might never end."""
MAX_PERCENT = 10**6
"""What is more is no use of the limit that stands beside it."""
MONEY = "credits_"
"""What the names of windows in money begin with."""

ONE_MS = timedelta(milliseconds=1)
FARTHEST = timedelta(days=MAX_DAYS)
RETRY = ("retry-after", "retry-after-ms")

_decode = msgspec.json.Decoder(float_hook=Decimal).decode
_EXACT = Context(prec=60)
"""More digits than a difference of amounts has."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitWindow:
    """One limit of a provider. None is what it does not say. How long a window lasts is never said."""

    limit: int | Decimal | None = None
    """Decimal in windows of money (`credits_usd`), int in all others. So are `remaining` and `used`."""
    remaining: int | Decimal | None = None
    """Anthropic rounds tokens to thousands."""
    reset_at: datetime | None = None
    """When the limit is whole again; aware, in UTC, by the provider's clock."""
    used: int | Decimal | None = None
    """The limit without what remains, else what a provider says; None where more remains than the limit."""
    percent_used: float | None = None
    """Above 100 where a provider says so, and never above 10^6."""
    reset_in_ms: int | None = None
    """From `Limits.at`, rounded up; 0 for a reset that lies before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one answer says of the limits of the key that asked."""

    provider: str
    at: datetime
    """The provider's `Date`, to the second; our clock where it says none within ten years of it. Aware, in UTC."""
    windows: Mapping[str, LimitWindow] = field(default_factory=dict)
    """By the provider's own name for what is limited, with underscores: `input_tokens`. What limits one model alone
    says which: `requests_minute/gpt-4o`."""
    retry_after_s: float | None = None
    """What `Retry-After` asks for. It may stand in an answer that was not refused."""
    rate_limited: bool = False
    """Whether the answer refuses: a 429, or a body that says so."""
    waiting_helps: bool | None = None
    """False for what no waiting ends: a 402, or a refusal such as `insufficient_quota`; None where none is named."""
    warnings: tuple[str, ...] = ()
    """What could not be read, or cannot be. Each names its header, or the field of the body."""
    raw: Mapping[str, str] = field(default_factory=dict)
    """The rate-limit headers, names in lower case, and no other ones."""


Field = tuple[str, object]
"""Where something stands in a body, such as `data.limit`, and what stands there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BodySays:
    """What a body says, before it is read."""

    windows: Mapping[str, Mapping[str, Field]] = field(default_factory=dict)
    """By name, and of each its parts: limit, remaining, used and reset."""
    retry_after: Field | None = None
    """How long to wait, as a duration."""


class _Said(NamedTuple):
    """One part of a window: its place, its text where it is one, and how it is shown where it cannot be read."""

    place: str
    text: str | None
    shown: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LimitRule:
    """Where a provider says its limits."""

    provider: str
    """As genai-prices names it, where it does."""
    aliases: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    """Of the headers that are kept, besides Retry-After."""
    header: re.Pattern[str] | None = None
    """The name of a header, with the groups `window` and `part`: limit, remaining, reset or utilization."""
    windows: Mapping[str, str] = field(default_factory=dict)
    """Other names for windows than what the pattern finds."""
    unknown: str | None = None
    """A value that stands for one that is not known."""
    structured: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Headers with items such as `"api";r=999;t=295`, each of them a window: which part each parameter is."""
    body: Callable[[Mapping[str, Any]], BodySays] | None = None
    """What a JSON object says of limits, if anything. Raises for none."""
    reset: Callable[[str, datetime, Mapping[str, str]], datetime | None] | None = None
    """Reads a reset, given the provider's clock and the texts of the window's parts. Raises `ValueError` saying what is
    expected."""
    refusals: Mapping[str, bool] = field(default_factory=dict)
    """`error.type`, `error.code` or `error.status` of a body that refuses for a rate limit: whether waiting helps."""


def read_limits(rule: LimitRule, headers: HeaderMap, *, now: datetime, status: int, body: object) -> Limits:
    """Read an answer by a provider's rule. Nothing in an answer makes it raise."""
    return _Reading(rule, headers, now).limits(status, body)


class _Reading:
    """One answer being read. Whatever cannot be is None, and a warning."""

    def __init__(self, rule: LimitRule, headers: HeaderMap, now: datetime) -> None:
        self._rule = rule
        self._warnings: list[str] = []
        self._all = fields(headers)
        self._raw: dict[str, str] = {}
        ours = now.astimezone(UTC)
        date = self._said("date", self._one("date"))
        self._at = self._read(date, lambda text: _near(http_date(text), ours)) or ours

    def limits(self, status: int, body: object) -> Limits:
        for name in self._all:
            if name not in RETRY and not (self._rule.prefixes and name.startswith(self._rule.prefixes)):
                continue
            if len(self._raw) == MAX_HEADERS:
                self._warnings.append(f"{_shown(name)}: not read, as any rate-limit header after {MAX_HEADERS}")
                break
            if not name.isascii() or not name.isprintable() or len(name) > MAX_NAME:
                self._warnings.append(f"{_shown(name)}: not the name of a header")
                continue
            value = self._one(name)
            if value is not None:
                self._raw[name] = value
        windows = self._windows()
        decoded = self._decoded(status, body)
        says = BodySays() if self._rule.body is None or decoded is None else self._rule.body(decoded)
        for window, parts in self._of_body(says).items():
            windows.setdefault(window, self._window(window, parts))
        refusal = self._refusal(decoded)
        return Limits(
            provider=self._rule.provider,
            at=self._at,
            windows=windows,
            retry_after_s=self._retry_after_s(says.retry_after),
            rate_limited=status == HTTPStatus.TOO_MANY_REQUESTS or refusal is not None,
            waiting_helps=False if status == HTTPStatus.PAYMENT_REQUIRED else refusal,
            warnings=tuple(self._warnings),
            raw=self._raw,
        )

    def _windows(self) -> dict[str, LimitWindow]:
        said: dict[str, dict[str, _Said]] = {}
        rule = self._rule
        for name in () if rule.header is None else self._all:
            match = rule.header and rule.header.fullmatch(name)
            if match and len(said) < MAX_HEADERS:
                window = match["window"].replace("-", "_")
                parts = said.setdefault(rule.windows.get(window, window), {})
                parts.setdefault(match["part"], self._said(name, self._raw.get(name)))
        for name, parameters in rule.structured.items():
            for item, values in (self._header(name, named_items) or {}).items():
                parts = said.setdefault(item.lower().replace(" ", "_").replace("-", "_"), {})
                for parameter, value in values.items():
                    if parameter in parameters:
                        parts[parameters[parameter]] = self._said(name, value)
        return {window: self._window(window, parts) for window, parts in said.items()}

    def _said(self, name: str, text: str | None) -> _Said:
        return _Said(name, None if text == self._rule.unknown else text, repr(text))

    def _of_body(self, says: BodySays) -> dict[str, dict[str, _Said]]:
        found: dict[str, dict[str, _Said]] = {}
        for window, fields_of in says.windows.items():
            if len(found) == MAX_WINDOWS:
                self._warnings.append(f"body: no window after the first {MAX_WINDOWS} is read")
                break
            if window.isprintable() and len(window) <= MAX_NAME:
                found[window] = {part: self._field(each) for part, each in fields_of.items()}
            else:
                self._warnings.append(f"body: {_shown(window)} is not the name of a window")
        return found

    def _field(self, field: Field) -> _Said:
        """A text or a number of a body. Its texts are not shown: nobody knows what stands in them."""
        place, value = field
        if isinstance(value, str):
            return _Said(place, value, "a text")
        text = _number_text(value)
        if text is None:
            self._warnings.append(f"{_shown(place)}: got {_shown(type(value).__name__)}, expected a number or a text")
        return _Said(place, text, str(text))

    def _window(self, name: str, parts: Mapping[str, _Said]) -> LimitWindow:
        number: Callable[[str], int | Decimal] = amount if name.startswith(MONEY) else count
        limit = self._part(parts, "limit", number)
        remaining = self._part(parts, "remaining", number)
        used = self._part(parts, "used", number)
        utilization = self._part(parts, "utilization", fraction)
        if limit is not None and remaining is not None:
            if remaining <= limit:
                used = _difference(limit, remaining)
            else:
                used = None
                self._warnings.append(f"{_shown(parts['remaining'].place)}: {remaining} of a limit of {limit}")
        percent = None if utilization is None else utilization * 100
        if percent is None and used is not None and limit:
            percent = Fraction(used) * 100 / Fraction(limit)
            if percent > MAX_PERCENT:
                percent = None
                self._warnings.append(f"{_shown(parts['used'].place)}: {used} of a limit of {limit}")
        reset_at = self._reset_at(parts)
        return LimitWindow(
            limit=limit,
            remaining=remaining,
            reset_at=reset_at,
            used=used,
            percent_used=None if percent is None else float(percent),
            reset_in_ms=None if reset_at is None else max(0, -((self._at - reset_at) // ONE_MS)),
        )

    def _reset_at(self, parts: Mapping[str, _Said]) -> datetime | None:
        reset = self._rule.reset
        texts = {part: said.text for part, said in parts.items() if said.text is not None}
        if reset is None:
            return None

        def read(text: str) -> datetime | None:
            found = reset(text, self._at, texts)
            if found is not None and found - self._at > FARTHEST:
                raise ValueError("a time within ten years")
            return found

        return self._part(parts, "reset", read)

    def _part(self, parts: Mapping[str, _Said], part: str, reader: Callable[[str], _T]) -> _T | None:
        said = parts.get(part)
        return None if said is None else self._read(said, reader)

    def _retry_after_s(self, of_body: Field | None) -> float | None:
        exact = self._header("retry-after-ms", seconds)
        if exact is not None:
            return float(exact / 1_000)
        said = self._header("retry-after", self._until)
        if said is not None:
            return float(said)
        waited = None if of_body is None else self._read(self._field(of_body), duration)
        return None if waited is None else waited.total_seconds()

    def _header(self, name: str, reader: Callable[[str], _T]) -> _T | None:
        return self._read(self._said(name, self._raw.get(name)), reader)

    def _until(self, text: str) -> Fraction:
        """Seconds, or a date (RFC 9110, 10.2.3)."""
        try:
            return seconds(text)
        except ValueError:
            try:
                then = _near(http_date(text), self._at)
            except ValueError:
                raise ValueError("seconds, or a date as in RFC 9110, of ten years at most") from None
        return Fraction(max(0, int((then - self._at).total_seconds())))

    def _decoded(self, status: int, body: object) -> dict[str, Any] | None:
        """The JSON object of a body; None where it is none, or too long for a refusal."""
        if isinstance(body, bytes | bytearray | str):
            if len(body) > MAX_BODY:
                return None
            try:
                body = _decode(body)
            except (msgspec.DecodeError, RecursionError, UnicodeError, ArithmeticError):
                if status >= HTTPStatus.BAD_REQUEST:
                    self._warnings.append("body: not JSON")
                return None
        if isinstance(body, list) and len(body) == 1:
            body = body[0]  # as Gemini wraps its errors
        return body if isinstance(body, dict) else None

    def _refusal(self, body: dict[str, Any] | None) -> bool | None:
        """Whether waiting helps, where the body names a refusal."""
        error = None if body is None else body.get("error", body)
        named = [error.get(name) for name in ("type", "code", "status")] if isinstance(error, dict) else []
        helps = [self._rule.refusals[name] for name in named if isinstance(name, str) and name in self._rule.refusals]
        return all(helps) if helps else None

    def _one(self, name: str) -> str | None:
        """The value of a header; None where it is not there, no text, or said twice and not the same."""
        values = self._all.get(name, [])
        if len(values) > 1:
            self._warnings.append(f"{_shown(name)}: said {len(values)} times, each time something else")
        elif values and (values[0] is None or len(values[0]) > MAX_VALUE or not values[0].isprintable()):
            self._warnings.append(f"{_shown(name)}: not a text of at most {MAX_VALUE} printable characters")
        elif values and values[0]:
            pieces = values[0].split(", ")  # how a mapping joins what came twice
            return pieces[0] if len(set(pieces)) == 1 else values[0]
        return None

    def _read(self, said: _Said, reader: Callable[[str], _T]) -> _T | None:
        if said.text is None:
            return None
        try:
            return reader(said.text)
        except ValueError as expected:
            self._warnings.append(f"{_shown(said.place)}: got {_shown(said.shown)}, expected {expected}")
            return None


def _near(date: datetime, now: datetime) -> datetime:
    if abs(date - now) > FARTHEST:
        raise ValueError("a date within ten years of our clock")
    return date


def _number_text(value: object) -> str | None:
    if isinstance(value, Decimal) and not value.is_finite():
        return None
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool) and -MAX_NUMBER < value < MAX_NUMBER:
        return str(value)
    return None


def _difference(limit: int | Decimal, remaining: int | Decimal) -> int | Decimal:
    if isinstance(limit, int) and isinstance(remaining, int):
        return limit - remaining
    return _EXACT.subtract(Decimal(limit), Decimal(remaining))


def _shown(text: str) -> str:
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."
