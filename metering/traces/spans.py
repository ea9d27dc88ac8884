"""A span, whoever wrote it, as what is kept of it (pure)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from metering.errors import InvalidUsage
from metering.events import MAX_NAME, TokenUsage
from metering.traces.conventions import LANGFUSE_USAGE, usage_of

__all__ = ["TracedSpan", "read_span"]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MAX_NS = 4_102_444_800 * 10**9  # the year 2100: a later span was not written by a clock

_RUN = (
    "tallystick.run_id",
    "gen_ai.conversation.id",
    "session.id",
    "langfuse.session.id",
    "ai.telemetry.metadata.sessionId",
    "traceloop.association.properties.session_id",
)
_ACCOUNT = ("tallystick.account",)
_MODEL = (
    "gen_ai.response.model",
    "ai.response.model",
    "langfuse.observation.model.name",
    "llm.model_name",
    "embedding.model_name",
    "gen_ai.request.model",
    "ai.model.id",
)
_PROVIDER = ("gen_ai.provider.name", "gen_ai.system", "llm.provider", "llm.system", "ai.model.provider")
_NO_PROVIDERS = ("strands-agents",)
"""Frameworks that name themselves where the provider should be."""

_KNOWN = ("span_id", "spanId", "id", "context", "attributes", "parent_span_id", "parentSpanId", "trace_id", "traceId")


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedSpan:
    """What is kept of a span. No prompt, no answer and no other attribute is part of it."""

    trace_id: str | None = None
    """32 hex digits in OpenTelemetry; any text elsewhere."""
    span_id: str | None = None
    """Unique within its trace. None where the span had none: it counts for itself."""
    parent_span_id: str | None = None
    run_id: str | None = None
    """What the span says its run is: see `read_span`."""
    account: str | None = None
    name: str = ""
    convention: str | None = None
    """The convention its usage was written in; None for a span without usage."""
    usage: TokenUsage | None = None
    """None where it says nothing of tokens; zeros where it says zero."""
    provider: str | None = None
    model: str | None = None
    """The one that answered, else the one that was asked."""
    started_at: datetime | None = None
    ended_at: datetime | None = None
    flags: tuple[str, ...] = ()
    """What is odd about its usage: `invalid_count`, `mismatched_total`."""


def read_span(span: Any) -> TracedSpan:
    """What is kept of a span, which may be of many kinds.

    A mapping with `span_id`, `parent_span_id`, `trace_id`, `name` and `attributes` (also as OTLP JSON spells these, or
    `ReadableSpan.to_json`), an OpenTelemetry `ReadableSpan`, an observation of a Langfuse export, or a `TracedSpan`.
    The run is the first of the attributes `tallystick.run_id`, `gen_ai.conversation.id`, `session.id` and the session
    ids of Langfuse, Vercel and OpenLLMetry, on the span or else on its resource; the account is `tallystick.account`.
    Raises `InvalidUsage` for what is no span. What is odd about one is in its `flags`.
    """
    if isinstance(span, TracedSpan):
        return span
    if isinstance(span, Mapping):
        return _of_mapping(span)
    if hasattr(span, "attributes") and hasattr(span, "context"):
        return _of_readable(span)
    raise InvalidUsage("span", type(span).__name__, "a mapping with span_id and attributes, or a ReadableSpan")


def _of_mapping(span: Mapping[Any, Any]) -> TracedSpan:
    context = _mapping(span.get("context"))
    attributes = span.get("attributes")
    if not any(name in span for name in _KNOWN) or not isinstance(attributes, Mapping | list | tuple | None):
        keys = ", ".join(sorted(map(str, span))[:10])
        raise InvalidUsage("span", f"keys {keys}", "a mapping with span_id, parent_span_id, name and attributes")
    said = {**_attributes_of(attributes), **_of_observation(span)}
    resource = _attributes_of(_mapping(span.get("resource")).get("attributes"))
    read = _read(said, resource, _text(_mapping(span.get("scope")).get("name")) or "")
    return replace(
        read,
        trace_id=_id(_first(span, "trace_id", "traceId") or context.get("trace_id"), 32),
        span_id=_id(_first(span, "span_id", "spanId", "id") or context.get("span_id"), 16),
        parent_span_id=_id(_first(span, "parent_span_id", "parentSpanId", "parentObservationId", "parent_id"), 16),
        name=_text(span.get("name")) or "",
        started_at=_instant(_first(span, "startTimeUnixNano", "start_time_unix_nano", "start_time", "startTime")),
        ended_at=_instant(_first(span, "endTimeUnixNano", "end_time_unix_nano", "end_time", "endTime")),
    )


def _of_readable(span: Any) -> TracedSpan:
    resource = getattr(getattr(span, "resource", None), "attributes", None)
    scope = getattr(getattr(span, "instrumentation_scope", None), "name", None)
    read = _read(_attributes_of(span.attributes), _attributes_of(resource), _text(scope) or "")
    return replace(
        read,
        trace_id=_id(getattr(span.context, "trace_id", None), 32),
        span_id=_id(getattr(span.context, "span_id", None), 16),
        parent_span_id=_id(getattr(getattr(span, "parent", None), "span_id", None), 16),
        name=_text(getattr(span, "name", None)) or "",
        started_at=_instant(getattr(span, "start_time", None)),
        ended_at=_instant(getattr(span, "end_time", None)),
    )


def _read(attributes: Mapping[Any, Any], resource: Mapping[Any, Any], scope: str) -> TracedSpan:
    found = usage_of(attributes, scope)
    return TracedSpan(
        run_id=_named(attributes, _RUN) or _named(resource, _RUN),
        account=_named(attributes, _ACCOUNT) or _named(resource, _ACCOUNT),
        convention=found.convention,
        usage=found.usage,
        provider=_named(attributes, _PROVIDER, but=_NO_PROVIDERS),
        model=_named(attributes, _MODEL),
        flags=found.flags,
    )


_OF_MODELS = ("GENERATION", "EMBEDDING")


def _of_observation(span: Mapping[Any, Any]) -> dict[str, Any]:
    """What an observation of a Langfuse export says, as the attributes that Langfuse's own SDK would have written."""
    said: dict[str, Any] = {}
    usage = span.get("usage")
    if isinstance(span.get("usageDetails"), Mapping):
        said[LANGFUSE_USAGE] = span["usageDetails"]
    elif isinstance(usage, Mapping) and usage.get("unit") in (None, "TOKENS"):
        said[LANGFUSE_USAGE] = {side: usage.get(side) for side in ("input", "output", "total")}
    elif "promptTokens" in span or "completionTokens" in span:
        names = {"input": "promptTokens", "output": "completionTokens", "total": "totalTokens"}
        said[LANGFUSE_USAGE] = {side: span.get(name) for side, name in names.items()}
    if span.get("type", "GENERATION") not in _OF_MODELS and not any(said.get(LANGFUSE_USAGE, {}).values()):
        said.pop(LANGFUSE_USAGE, None)  # exports say zeros of what has called no model
    if LANGFUSE_USAGE in said or "traceId" in span:
        said |= {"langfuse.observation.model.name": span.get("model"), "langfuse.session.id": span.get("sessionId")}
    return {name: value for name, value in said.items() if value is not None}


def _attributes_of(attributes: Any) -> Mapping[Any, Any]:
    """Attributes as a mapping; OTLP has them as a list of keys and typed values."""
    if isinstance(attributes, Mapping):
        return attributes
    if not isinstance(attributes, list | tuple):
        return {}
    return {
        item["key"]: _value(item.get("value"))
        for item in attributes
        if isinstance(item, Mapping) and isinstance(item.get("key"), str)
    }


def _value(typed: Any) -> Any:
    """The text or number of a typed value; None for arrays and the like, which say nothing of tokens."""
    typed = _mapping(typed)
    for name in ("stringValue", "intValue", "doubleValue", "string_value", "int_value", "double_value"):
        value = typed.get(name)
        if isinstance(value, str | int | float):
            return value
    return None


def _named(attributes: Mapping[Any, Any], names: Iterable[str], but: tuple[str, ...] = ()) -> str | None:
    for name in names:
        found = _text(attributes.get(name))
        if found is not None and found not in but:
            return found
    return None


def _first(span: Mapping[Any, Any], *names: str) -> Any:
    return next((span[name] for name in names if span.get(name) is not None), None)


def _mapping(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}


def _text(value: Any) -> str | None:
    """A name that every database keeps; None for what is none."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
        value = str(value)
    if not isinstance(value, str) or not value:
        return None
    if not value.isprintable():
        value = "".join(letter if letter.isprintable() else "?" for letter in value)
    return str(value[:MAX_NAME])


def _id(value: Any, digits: int) -> str | None:
    """An id in one form, however it is written; None for none, which OpenTelemetry writes as zeros."""
    if isinstance(value, bytes):
        value = value.hex()
    elif isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 16**digits:
        value = format(value, f"0{digits}x")
    if not isinstance(value, str):
        return None
    bare = value[2:] if value[:2] in ("0x", "0X") else value
    if len(bare) == digits and not bare.lower().strip("0123456789abcdef"):
        value = bare.lower()
    return value if value.strip("0") else None


def _instant(value: Any) -> datetime | None:
    """A time from nanoseconds since 1970, ISO 8601 or a datetime; None for what is none."""
    if isinstance(value, str):
        if value.isascii() and value.isdigit() and len(value) <= len(str(_MAX_NS)):
            value = int(value)
        else:
            try:
                value = datetime.fromisoformat(value)
            except ValueError:
                return None
    if isinstance(value, int) and not isinstance(value, bool):
        return _EPOCH + timedelta(microseconds=value // 1000) if 0 < value < _MAX_NS else None
    if not isinstance(value, datetime):
        return None
    at = value.replace(tzinfo=UTC) if value.tzinfo is None else value
    try:
        at = at.astimezone(UTC)
    except (ValueError, OverflowError):
        return None
    return at if 1970 <= at.year < 2100 else None
