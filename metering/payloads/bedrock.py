"""Bedrock's Converse, and InvokeModel of Amazon's own models.

`inputTokens` is without what was read from and written to a cache; reasoning is inside `outputTokens`, and not split
(https://docs.aws.amazon.com/bedrock/latest/userguide/prompt-caching.html). Some answers name the cache's counts twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from metering.events import TokenUsage
from metering.payloads.reading import data_of
from metering.payloads.rule import Rule

if TYPE_CHECKING:
    from collections.abc import Mapping

    from metering.payloads.reading import Part

__all__ = ["BEDROCK", "invoked_chunk"]


def invoked_chunk(event: Mapping[Any, object]) -> Mapping[Any, object] | None:
    """The chunk that an event of InvokeModelWithResponseStream holds as bytes; None for any other event."""
    chunk = data_of(event.get("chunk"))
    encoded = None if chunk is None else chunk.get("bytes")
    return data_of(msgspec.json.decode(encoded)) if type(encoded) is bytes else None


_OF_VERCEL = ("cachedInputTokens", "inputTokenDetails", "outputTokenDetails", "reasoningTokens")
"""Its SDK has the same names for totals that include the cache."""


def _reads(part: Part) -> bool:
    return part.has_any("inputTokens", "outputTokens") and not part.has_any(*_OF_VERCEL)


def _usage(part: Part, _provider: str | None) -> TokenUsage:
    read = part.optional("cacheReadInputTokens", "cacheReadInputTokenCount")
    write = part.optional("cacheWriteInputTokens", "cacheWriteInputTokenCount")
    return TokenUsage(
        input_tokens=part.count("inputTokens") + read + write,
        cache_read_tokens=read,
        cache_write_tokens=write,
        cache_write_1h_tokens=sum(
            kept.count("inputTokens") for kept in part.blocks("cacheDetails") if kept.word("ttl") == "1h"
        ),
        output_tokens=part.count("outputTokens"),
    )


BEDROCK = Rule(
    shape="Bedrock Converse",
    reads=_reads,
    usage=_usage,
    chunk_places=(("metadata", "usage"),),
    provider_of=lambda _answer, _part: "aws",
)
