"""What a provider's answer says of its rate limits, and how a provider's rule is read (pure)."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from metering.providers.header_values import MAX_VALUE, count, fields, fraction, http_date, seconds

if TYPE_CHECKING:
    import re
    from collections.abc import Callable, Mapping

    from metering.providers.header_values import HeaderMap

__all__ = ["LimitRule", "LimitWindow", "Limits", "read_limits"]

MAX_HEADERS = 64
"""Rate-limit headers of one answer that are read and kept."""
MAX_NAME = 100
"""Characters of a header's name."""
MAX_BODY = 64 * 1024
"""Bytes of a body that is looked at: a refusal is short."""
MAX_SHOWN = 60

ONE_MS = timedelta(milliseconds=1)
RETRY = ("retry-after", "retry-after-ms")

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitWindow:
    """One limit of a provider. None is what it does not say. How long a window lasts is never said."""

    limit: int | None = None
    remaining: int | None = None
    """Anthropic rounds tokens to thousands."""
    reset_at: datetime | None = None
    """When the limit is whole again; aware, in UTC, by the provider's clock."""
    used: int | None = None
    """The limit without what remains; None where more remains than the limit."""
    percent_used: float | None = None
    """Above 100 where a provider says so."""
    reset_in_ms: int | None = None
    """From `Limits.at`, rounded up; 0 for a reset that lies before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one answer says of the limits of the key that asked."""

    provider: str
    at: datetime
    """The provider's `Date`, to the second; our clock where it says none. Aware, in UTC."""
    windows: Mapping[str, LimitWindow] = field(default_factory=dict)
    """By the provider's own name for what is limited, with underscores: `input_tokens`."""
    retry_after_s: float | None = None
    """What `Retry-After` asks for. It may stand in an answer that was not refused."""
    rate_limited: bool = False
    """Whether the answer refuses: a 429, or a body that says so."""
    waiting_helps: bool | None = None
    """False for a refusal that no waiting ends, such as OpenAI's `insufficient_quota`; None where none is named."""
    warnings: tuple[str, ...] = ()
    """What could not be read, or cannot be. Each names its header."""
    raw: Mapping[str, str] = field(default_factory=dict)
    """The rate-limit headers, names in lower case, and no other ones."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LimitRule:
    """Where a provider says its limits."""

    provider: str
    """As genai-prices names it."""
    aliases: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    """Of the headers that are kept, besides Retry-After."""
    header: re.Pattern[str] | None = None
    """The name of a header, with the groups `window` and `part`: limit, remaining, reset or utilization."""
    reset: Callable[[str, datetime], datetime] | None = None
    """Reads a reset, given the provider's clock. Raises `ValueError` saying what was expected."""
    refusals: Mapping[str, bool] = field(default_factory=dict)
    """`error.type` or `error.code` of a body that refuses for a rate limit: whether waiting helps."""


def read_limits(rule: LimitRule, headers: HeaderMap, *, now: datetime, status: int, body: object) -> Limits:
    """Read an answer by a provider's rule. Nothing in an answer makes it raise."""
    return _Reading(rule, headers, now).limits(status, body)


class _Reading:
    """One answer being read. Whatever cannot be is None, and a warning."""

    def __init__(self, rule: LimitRule, headers: HeaderMap, now: datetime) -> None:
        self._rule = rule
        self._warnings: list[str] = []
        self._all = fields(headers)
        date = self._read("date", http_date, self._one("date"))
        self._at = date or now.astimezone(UTC)
        self._raw: dict[str, str] = {}

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
        refusal = self._refusal(status, body)
        return Limits(
            provider=self._rule.provider,
            at=self._at,
            windows=windows,
            retry_after_s=self._retry_after_s(),
            rate_limited=status == HTTPStatus.TOO_MANY_REQUESTS or refusal is not None,
            waiting_helps=refusal,
            warnings=tuple(self._warnings),
            raw=self._raw,
        )

    def _windows(self) -> dict[str, LimitWindow]:
        said: dict[str, dict[str, str]] = {}
        header = self._rule.header
        for name in () if header is None else self._all:
            match = header and header.fullmatch(name)
            if match and len(said) < MAX_HEADERS:
                said.setdefault(match["window"].replace("-", "_"), {})[match["part"]] = name
        return {window: self._window(names) for window, names in said.items()}

    def _window(self, names: Mapping[str, str]) -> LimitWindow:
        limit = self._part(names, "limit", count)
        remaining = self._part(names, "remaining", count)
        utilization = self._part(names, "utilization", fraction)
        reset = self._rule.reset
        reset_at = None if reset is None else self._part(names, "reset", lambda text: reset(text, self._at))
        used = None
        if limit is not None and remaining is not None:
            if remaining <= limit:
                used = limit - remaining
            else:
                self._warnings.append(f"{names['remaining']}: {remaining} of a limit of {limit}")
        percent = None if utilization is None else float(utilization * 100)
        if percent is None and used is not None and limit:
            percent = used * 100 / limit
        return LimitWindow(
            limit=limit,
            remaining=remaining,
            reset_at=reset_at,
            used=used,
            percent_used=percent,
            reset_in_ms=None if reset_at is None else max(0, -((self._at - reset_at) // ONE_MS)),
        )

    def _part(self, names: Mapping[str, str], part: str, reader: Callable[[str], _T]) -> _T | None:
        name = names.get(part, "")
        return self._read(name, reader, self._raw.get(name))

    def _retry_after_s(self) -> float | None:
        exact = self._read("retry-after-ms", seconds, self._raw.get("retry-after-ms"))
        if exact is not None:
            return float(exact / 1_000)
        said = self._read("retry-after", self._until, self._raw.get("retry-after"))
        return None if said is None else float(said)

    def _until(self, text: str) -> Fraction:
        """Seconds, or a date (RFC 9110, 10.2.3)."""
        try:
            return seconds(text)
        except ValueError:
            try:
                then = http_date(text)
            except ValueError:
                raise ValueError("seconds, or a date as in RFC 9110") from None
        return Fraction(max(0, int((then - self._at).total_seconds())))

    def _refusal(self, status: int, body: object) -> bool | None:
        """Whether waiting helps, where the body names a refusal."""
        if isinstance(body, bytes | bytearray | str):
            if len(body) > MAX_BODY:
                return None
            try:
                body = msgspec.json.decode(body)
            except (msgspec.DecodeError, RecursionError, UnicodeError):
                if status >= HTTPStatus.BAD_REQUEST:
                    self._warnings.append("body: not JSON")
                return None
        error: Any = body.get("error", body) if isinstance(body, dict) else None
        named = [error.get(name) for name in ("type", "code")] if isinstance(error, dict) else []
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

    def _read(self, name: str, reader: Callable[[str], _T], text: str | None) -> _T | None:
        if text is None:
            return None
        try:
            return reader(text)
        except ValueError as expected:
            self._warnings.append(f"{_shown(name)}: got {_shown(repr(text))}, expected {expected}")
            return None


def _shown(text: str) -> str:
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."
