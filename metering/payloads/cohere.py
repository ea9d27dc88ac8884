"""Cohere.

`tokens` is what the model read and made, and what quotas count; `billed_units` leaves out what Cohere itself put into
the prompt, and is money (https://docs.cohere.com/reference/chat). Both are given: `tokens` is taken. Embeddings have
billed units alone. Both are documented as doubles, so that SDK objects hold 71.0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from metering.events import TokenUsage
from metering.payloads.rule import Rule

if TYPE_CHECKING:
    from metering.payloads.reading import Part

__all__ = ["COHERE"]


def _reads(part: Part) -> bool:
    return part.has_any("tokens", "billed_units")


def _usage(part: Part, _provider: str | None) -> TokenUsage:
    counts = part.block("tokens", "billed_units")
    made_nothing = "tokens" not in part and "output_tokens" not in counts
    return TokenUsage(
        input_tokens=counts.whole("input_tokens"),
        cache_read_tokens=part.whole("cached_tokens") if "cached_tokens" in part else 0,
        output_tokens=0 if made_nothing else counts.whole("output_tokens"),
    )


COHERE = Rule(
    shape="Cohere",
    reads=_reads,
    usage=_usage,
    places=(("usage",), ("meta",)),
    chunk_places=(("delta", "usage"), ("response", "meta")),
    provider_of=lambda _answer, _part: "cohere",
)
