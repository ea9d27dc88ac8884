"""What the attributes of a span say of tokens. Of several conventions on one span a single one counts (pure).

`opentelemetry` are the GenAI attributes, current and deprecated, with the further names that OpenLLMetry and
pydantic-ai give them; `strands` the same from Strands, which leaves the cache out of the input. In `langfuse` the parts
are beside `input` and `output`, not within. pydantic-ai's `gen_ai.aggregated_usage.*` repeats what other spans say, and
is never read.

Sources: opentelemetry.io/docs/specs/semconv/gen-ai, github.com/Arize-ai/openinference (spec/semantic_conventions.md),
github.com/traceloop/openllmetry, ai-sdk.dev (telemetry), github.com/strands-agents/sdk-python (telemetry/tracer.py),
langfuse.com (token and cost tracking).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from metering.checks import MAX_TOKENS
from metering.events import TokenUsage

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["INVALID_COUNT", "MISMATCHED_TOTAL", "NOTHING_SAID", "SpanUsage", "usage_of"]

INVALID_COUNT = "invalid_count"
"""A count that is none: negative, not whole, above 2^53, or a part that is larger than its whole."""

MISMATCHED_TOTAL = "mismatched_total"
"""The total is not input + output, however these are read."""

LANGFUSE_USAGE = "langfuse.observation.usage_details"

_GEN_AI = "gen_ai.usage."
_STRANDS = "strands-agents"
_MOST_DIGITS = len(str(MAX_TOKENS))
_NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "openinference": {
        "input": ("llm.token_count.prompt",),
        "output": ("llm.token_count.completion",),
        "total": ("llm.token_count.total",),
        "cache_read": ("llm.token_count.prompt_details.cache_read",),
        "cache_write": ("llm.token_count.prompt_details.cache_write",),
        "input_audio": ("llm.token_count.prompt_details.audio",),
        "reasoning": ("llm.token_count.completion_details.reasoning",),
        "output_audio": ("llm.token_count.completion_details.audio",),
    },
    "opentelemetry": {
        "input": (f"{_GEN_AI}input_tokens", f"{_GEN_AI}prompt_tokens"),
        "output": (f"{_GEN_AI}output_tokens", f"{_GEN_AI}completion_tokens"),
        "total": (f"{_GEN_AI}total_tokens", "llm.usage.total_tokens"),
        "cache_read": (
            f"{_GEN_AI}cache_read.input_tokens",
            f"{_GEN_AI}cache_read_input_tokens",
            f"{_GEN_AI}details.cache_read_tokens",
        ),
        "cache_write": (
            f"{_GEN_AI}cache_creation.input_tokens",
            f"{_GEN_AI}cache_creation_input_tokens",
            f"{_GEN_AI}cache_write_input_tokens",
            f"{_GEN_AI}details.cache_write_tokens",
        ),
        "input_audio": (f"{_GEN_AI}details.input_audio_tokens",),
        "reasoning": (
            f"{_GEN_AI}reasoning.output_tokens",
            f"{_GEN_AI}reasoning_tokens",
            f"{_GEN_AI}details.reasoning_tokens",
        ),
        "output_audio": (f"{_GEN_AI}details.output_audio_tokens",),
    },
    "vercel": {
        "input": ("ai.usage.inputTokens", "ai.usage.promptTokens", "ai.usage.tokens"),
        "output": ("ai.usage.outputTokens", "ai.usage.completionTokens"),
        "total": ("ai.usage.totalTokens",),
        "cache_read": ("ai.usage.cachedInputTokens", "ai.usage.inputTokenDetails.cacheReadTokens"),
        "cache_write": ("ai.usage.inputTokenDetails.cacheWriteTokens",),
        "reasoning": ("ai.usage.reasoningTokens", "ai.usage.outputTokenDetails.reasoningTokens"),
    },
}
_KNOWN = frozenset(name for fields in _NAMES.values() for known in fields.values() for name in known) | {LANGFUSE_USAGE}
_SIDES = {
    "cache_read": "input",
    "cache_write": "input",
    "cache_write_1h": "input",
    "cache_write_5m": "input",
    "input_audio": "input",
    "reasoning": "output",
    "output_audio": "output",
}
_WHOLES = frozenset(
    name.lower()
    for side, other in (("input", "prompt"), ("output", "completion"), ("total", "total"))
    for name in (side, other, f"{side}_tokens", f"{other}_tokens", f"{side}Tokens", f"{other}Tokens")
)
"""Buckets of Langfuse that are a whole side; any other is a part of one."""


@dataclass(frozen=True, slots=True)
class SpanUsage:
    """What a span says of its own tokens. `usage` is None where it says nothing."""

    convention: str | None = None
    usage: TokenUsage | None = None
    flags: tuple[str, ...] = ()


NOTHING_SAID = SpanUsage()


@dataclass(slots=True)
class _Said:
    """The counts of one convention."""

    convention: str
    counts: dict[str, int]
    has_invalid: bool = False
    excludes_cache: bool = False

    @property
    def is_usage(self) -> bool:
        return "input" in self.counts or "output" in self.counts


def usage_of(attributes: Mapping[Any, Any], scope: str = "") -> SpanUsage:
    """The usage in a span's attributes, by the convention that says most; `scope` is who wrote the span.

    Never raises: what cannot be is left out, and flagged.
    """
    if _KNOWN.isdisjoint(attributes):
        return NOTHING_SAID
    said = [_read(convention, names, attributes) for convention, names in _NAMES.items()]
    if _is_of_strands(attributes, scope):
        said[1].convention, said[1].excludes_cache = "strands", True
    said.append(_read_langfuse(attributes.get(LANGFUSE_USAGE)))
    # Zeros say nothing where another convention says how much.
    best = max(said, key=lambda one: (one.is_usage, any(one.counts.values()), len(one.counts)))
    if best.is_usage:
        return _resolved(best)
    flags = [INVALID_COUNT] if any(one.has_invalid for one in said) else []
    if any("total" in one.counts for one in said):
        flags.append(MISMATCHED_TOTAL)
    return SpanUsage(flags=tuple(flags)) if flags else NOTHING_SAID


def _read(convention: str, names: Mapping[str, tuple[str, ...]], attributes: Mapping[Any, Any]) -> _Said:
    said = _Said(convention, {})
    for field, known in names.items():
        for name in known:
            value = attributes.get(name)
            if value is None:
                continue
            count = _count(value)
            if count is not None:
                said.counts[field] = count
                break
            said.has_invalid = True
    return said


def _read_langfuse(details: Any) -> _Said:
    said = _Said("langfuse", {})
    if isinstance(details, str):
        details = _decoded(details)
    if not isinstance(details, Mapping):
        said.has_invalid = details is not None
        return said
    wholes: Counter[str] = Counter()
    beside: Counter[str] = Counter()
    parts: Counter[str] = Counter()
    for key, value in _buckets(details):
        count = _count(value)
        if count is None:
            said.has_invalid |= value is not None
            continue
        part = _part(key)
        side = _side(key) if part is None else _SIDES[part]
        if part is not None:
            parts[part] += count
        if key.lower() in _WHOLES:
            wholes[side] += count
        elif side:
            beside[side] += count
    is_within = any(_holds_parts(key, value) for key, value in details.items()) or (
        "total" in wholes and wholes["total"] == wholes["input"] + wholes["output"]
    )
    beside.subtract(_said_twice(parts))
    if not is_within:
        wholes.update(beside)
    said.counts = {**wholes, **parts}
    return said


def _said_twice(parts: Counter[str]) -> dict[str, int]:
    """Make cache writes one count with one part, and tell how much input is said as a whole and as parts."""
    split = parts.pop("cache_write_5m", 0) + parts["cache_write_1h"]
    if split and "cache_write" in parts:
        return {"input": split}
    if split:
        parts["cache_write"] = split
    return {}


def _decoded(text: str) -> Any:
    """What JSON says; the text itself where it is none."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return text


def _buckets(details: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Names and counts, also of the parts that OpenAI nests."""
    for key, value in details.items():
        if _holds_parts(key, value):
            yield from ((f"{key}.{name}", inner) for name, inner in value.items())
        elif not isinstance(value, Mapping):
            yield str(key), value


def _holds_parts(key: Any, value: Any) -> bool:
    """Whether it is one such as `prompt_tokens_details`, whose counts are within their wholes."""
    return isinstance(value, Mapping) and str(key).lower().endswith("details")


def _part(key: str) -> str | None:
    name = key.lower()
    if "cache" in name or "ephemeral" in name:
        if "1h" in name or "5m" in name:
            return "cache_write_1h" if "1h" in name else "cache_write_5m"
        return "cache_write" if "creat" in name or "write" in name else "cache_read"
    if "reasoning" in name or "thought" in name:
        return "reasoning"
    if "audio" in name:
        return "output_audio" if _side(key) == "output" else "input_audio"
    return None


def _side(key: str) -> str:
    """`input`, `output` or `total`; empty for what is no side's. As Langfuse itself tells them: by their names."""
    name = key.lower()
    if "output" in name or "completion" in name:
        return "output"
    if "input" in name or "prompt" in name:
        return "input"
    return "total" if "total" in name else ""


def _is_of_strands(attributes: Mapping[Any, Any], scope: str) -> bool:
    return scope.startswith("strands.") or _STRANDS in (
        attributes.get("gen_ai.provider.name"),
        attributes.get("gen_ai.system"),
    )


def _count(value: Any) -> int | None:
    """A count as exporters write it: 12, 12.0, or its digits. None for what is none."""
    if isinstance(value, str):
        value = int(value) if value.isascii() and value.isdigit() and len(value) <= _MOST_DIGITS else None
    elif isinstance(value, float):
        value = int(value) if math.isfinite(value) and value.is_integer() else None
    if type(value) is not int or not 0 <= value <= MAX_TOKENS:
        return None
    return value


def _resolved(said: _Said) -> SpanUsage:
    """The counts as this project has them: parts within their wholes.

    Where the total is not input + output, perhaps the cache was left out of the input, or the reasoning out of the
    output: what the total then agrees with is what was meant. So it is where a part is larger than its whole.
    """
    counts = Counter(said.counts)
    flags = [INVALID_COUNT] if said.has_invalid else []
    cache_write = max(counts["cache_write"], counts["cache_write_1h"])
    cached = counts["cache_read"] + cache_write
    plain = (counts["input"], counts["output"])
    inputs = (plain[0] + cached,) if said.excludes_cache else (plain[0], plain[0] + cached)
    readings = [
        (whole_input, whole_output)
        for whole_output in (plain[1], plain[1] + counts["reasoning"])
        for whole_input in inputs
        if cached <= whole_input and counts["reasoning"] <= whole_output
    ]
    meant = readings[0]
    if "total" in said.counts and counts["total"] != sum(plain):
        agreeing = [reading for reading in readings if sum(reading) == counts["total"]]
        if agreeing:
            meant = agreeing[0]
        else:
            flags.append(MISMATCHED_TOTAL)
    input_tokens, output_tokens = meant
    if max(meant) > MAX_TOKENS:
        return SpanUsage(flags=(INVALID_COUNT,))
    if counts["input_audio"] > input_tokens or counts["output_audio"] > output_tokens:
        flags.append(INVALID_COUNT)
    usage = TokenUsage(
        input_tokens=input_tokens,
        cache_read_tokens=counts["cache_read"],
        cache_write_tokens=cache_write,
        cache_write_1h_tokens=counts["cache_write_1h"],
        input_audio_tokens=min(counts["input_audio"], input_tokens),
        output_tokens=output_tokens,
        reasoning_tokens=counts["reasoning"],
        output_audio_tokens=min(counts["output_audio"], output_tokens),
    )
    return SpanUsage(said.convention, usage, tuple(sorted(set(flags))))
