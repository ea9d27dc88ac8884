"""The facts that are billed: token usage, usage events, and the ids that make each of them count once."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields
from datetime import datetime  # noqa: TC003  of records that msgspec reads
from decimal import Decimal
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal, TypedDict
from uuid import UUID

import msgspec
import uuid_utils

from metering import checks
from metering.errors import InvalidEvent, InvalidUsage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = [
    "METRICS",
    "TOKEN_FIELDS",
    "Call",
    "CallDescription",
    "TokenUsage",
    "UsageEvent",
    "derive_event_id",
    "fingerprint_of",
    "metric_amounts",
    "new_event_id",
]

Kind = Literal["usage", "signal", "import", "correction"]
CallerType = Literal["production_agent", "dashboard", "internal"]

CALLER_TYPES = ("production_agent", "dashboard", "internal")
MAX_NAME = 255
MAX_LINE = 64
MAX_ATTRIBUTES_BYTES = 4096
MAX_LATENCY_MS = 2**31 - 1

_NAMESPACE = b"tallystick"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenUsage:
    """Tokens of one call. `input_tokens` includes cache reads and writes, `output_tokens` includes reasoning.

    The other fields are subsets of those two, so nothing is counted twice. Names are those of genai-prices; providers
    differ on what their own fields include. Raises `InvalidUsage` for counts that are negative, not whole, above 2^53,
    or larger than the total they are part of.
    """

    input_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    cache_write_1h_tokens: int = 0
    """Part of `cache_write_tokens`."""
    input_audio_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    output_audio_tokens: int = 0

    def __post_init__(self) -> None:
        for name in TOKEN_FIELDS:
            checks.tokens(name, getattr(self, name))
        for part, whole in _SUBSETS:
            if getattr(self, part) > getattr(self, whole):
                raise InvalidUsage(part, getattr(self, part), f"at most {whole}, which is {getattr(self, whole)}")
        if self.cache_read_tokens + self.cache_write_tokens > self.input_tokens:
            raise InvalidUsage(
                "cache_read_tokens + cache_write_tokens",
                self.cache_read_tokens + self.cache_write_tokens,
                f"at most input_tokens, which is {self.input_tokens}",
            )

    @classmethod
    def from_payload(cls, payload: object, provider: str | None = None) -> TokenUsage:
        """The usage that a provider's answer tells of, a dict or an SDK's object; see `metering.payloads`.

        `provider` is only needed where the counts themselves do not tell. Raises `InvalidUsage`.
        """
        from metering.payloads import usage_of  # noqa: PLC0415  which imports this

        return usage_of(payload, provider)

    @classmethod
    def from_stream(cls, events: Iterable[object], provider: str | None = None) -> TokenUsage:
        """The same from all chunks of one answer, in wire order. Raises `InvalidUsage`, and what iterating raises."""
        from metering.payloads import usage_of_stream  # noqa: PLC0415

        return usage_of_stream(events, provider)

    @property
    def total_tokens(self) -> int:
        """Everything read and generated."""
        return self.input_tokens + self.output_tokens

    @property
    def uncached_input_tokens(self) -> int:
        """Input that was neither read from nor written to a cache."""
        return self.input_tokens - self.cache_read_tokens - self.cache_write_tokens

    def to_dict(self) -> dict[str, int]:
        """All eight counts by name."""
        return dict(zip(TOKEN_FIELDS, self.counts(), strict=True))

    def counts(self) -> tuple[int, int, int, int, int, int, int, int]:
        """All eight counts, in the order of TOKEN_FIELDS."""
        return _counts_of(self)


TOKEN_FIELDS: tuple[str, ...] = tuple(f.name for f in fields(TokenUsage))
_counts_of: Callable[[TokenUsage], tuple[int, int, int, int, int, int, int, int]] = attrgetter(*TOKEN_FIELDS)
_SUBSETS = (
    ("cache_read_tokens", "input_tokens"),
    ("cache_write_tokens", "input_tokens"),
    ("cache_write_1h_tokens", "cache_write_tokens"),
    ("input_audio_tokens", "input_tokens"),
    ("reasoning_tokens", "output_tokens"),
    ("output_audio_tokens", "output_tokens"),
)

METRICS: tuple[str, ...] = ("requests", "quantity", "tokens", "uncached_input_tokens", *TOKEN_FIELDS)
"""What a limit or a rate may count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What is said of a call besides its size: which line it is sold on, who served it, what it belongs to."""

    line: str
    """What is sold, at most 64 characters."""
    operation: str | None = None
    provider: str | None = None
    model: str | None = None
    service_tier: str | None = None
    run_id: str | None = None
    request_id: str | None = None
    session_id: str | None = None
    attributes: dict[str, Any] | None = None
    """At most 4 KB as JSON."""
    platform_paid: bool = True
    """False where the call ran on the customer's own provider key."""
    error: str | None = None
    latency_ms: int | None = None
    idempotency_key: str | None = None

    def __post_init__(self) -> None:
        checks.text("line", self.line, MAX_LINE)
        for name, value in zip(_NAMES_OF_A_CALL, _names_of(self), strict=True):
            if value is not None:
                checks.text(name, value, MAX_NAME)
        if self.latency_ms is not None and (
            type(self.latency_ms) is not int or not 0 <= self.latency_ms <= MAX_LATENCY_MS
        ):
            raise InvalidEvent("latency_ms", self.latency_ms, f"a whole number of milliseconds, 0 to {MAX_LATENCY_MS}")
        if type(self.platform_paid) is not bool:
            raise InvalidEvent("platform_paid", self.platform_paid, "True or False")
        encode_attributes(self.attributes)


class CallDescription(TypedDict, total=False):
    """What `consume`, `reserve` and `record` all take of a call, by keyword; the meaning is `Call`'s."""

    operation: str | None
    provider: str | None
    model: str | None
    service_tier: str | None
    run_id: str | None
    request_id: str | None
    session_id: str | None
    attributes: dict[str, Any] | None
    platform_paid: bool


_NAMES_OF_A_CALL = (
    "operation",
    "provider",
    "model",
    "service_tier",
    "run_id",
    "request_id",
    "session_id",
    "idempotency_key",
)
_names_of = attrgetter(*_NAMES_OF_A_CALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageEvent(Call):
    """One immutable billed fact. A correction is a new event that names the one it corrects."""

    event_id: UUID
    account: str
    occurred_at: datetime
    """Decides the window and the period. 1970 or later."""
    kind: Kind = "usage"
    requests: int = 1
    """1; -1 for a reversal, which takes `usage` and `quantity` back."""
    usage: TokenUsage = field(default_factory=TokenUsage)
    quantity: Decimal = Decimal(0)
    corrects: UUID | None = None
    key_id: str | None = None
    caller_type: CallerType = "production_agent"
    billable: bool = True
    estimated: bool = False
    counted: bool = False
    """Asked the limits, so it is part of their counters."""
    late: bool = False
    """Settled after its hold was gone."""
    fingerprint: str | None = None
    source: str | None = None
    """Where an imported event came from."""

    def __post_init__(self) -> None:
        Call.__post_init__(self)
        checks.text("account", self.account, MAX_NAME)
        checks.quantity("quantity", self.quantity)
        if checks.instant("occurred_at", self.occurred_at).year < 1970:
            raise InvalidEvent("occurred_at", self.occurred_at, "1970 or later")
        if self.requests not in (1, -1):
            raise InvalidEvent("requests", self.requests, "1, or -1 for a reversal")
        if self.caller_type not in CALLER_TYPES:
            raise InvalidEvent("caller_type", self.caller_type, f"one of {', '.join(CALLER_TYPES)}")
        if not isinstance(self.usage, TokenUsage):
            raise InvalidEvent("usage", self.usage, "a TokenUsage")
        if self.source is not None:
            checks.text("source", self.source, MAX_NAME)


def metric_amounts(tokens: Mapping[str, int], *, requests: int, quantity: Decimal) -> dict[str, int | Decimal]:
    """Every metric of METRICS for the given token fields, which may be one call's or sums over many."""
    return {
        **tokens,
        "requests": requests,
        "quantity": quantity,
        "tokens": tokens["input_tokens"] + tokens["output_tokens"],
        "uncached_input_tokens": tokens["input_tokens"] - tokens["cache_read_tokens"] - tokens["cache_write_tokens"],
    }


def encode_attributes(attributes: dict[str, Any] | None) -> str | None:
    """Attributes as JSON text. Raises `InvalidEvent` for what JSON cannot say or what is above 4 KB."""
    if attributes is None:
        return None
    if not isinstance(attributes, dict):
        raise InvalidEvent("attributes", attributes, "a mapping that JSON can say")
    try:
        encoded = msgspec.json.encode(attributes, order="sorted")
    except (TypeError, ValueError, RecursionError) as exc:
        raise InvalidEvent("attributes", attributes, "a mapping that JSON can say") from exc
    if len(encoded) > MAX_ATTRIBUTES_BYTES:
        raise InvalidEvent(
            "attributes", attributes, f"at most {MAX_ATTRIBUTES_BYTES} bytes of JSON, not {len(encoded)}"
        )
    return encoded.decode()


def new_event_id() -> UUID:
    """An id for a fact that has no key of its own: a UUIDv7, so that ids of one day lie together."""
    return UUID(bytes=uuid_utils.uuid7().bytes)


def derive_event_id(kind: str, *parts: str) -> UUID:
    """The id that `parts` always give, so the same fact sent twice has one id.

    Each part is preceded by its length: ("ab", "c") and ("a", "bc") differ.
    """
    digest = hashlib.blake2b(_NAMESPACE, digest_size=16)
    for part in (kind, *parts):
        encoded = part.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "big"))
        digest.update(encoded)
    return UUID(bytes=digest.digest())


def fingerprint_of(line: str, operation: str | None, request: object) -> str:
    """A digest that tells one request from another under the same idempotency key.

    Never of the API key, usage, response or time: a client's retry has other values there.
    """
    try:
        canonical = msgspec.json.encode([line, operation, request], order="sorted")
    except (TypeError, ValueError, RecursionError) as exc:
        raise InvalidEvent("request", request, "a value that JSON can say, or pass fingerprint=") from exc
    return hashlib.blake2b(canonical, digest_size=16).hexdigest()
