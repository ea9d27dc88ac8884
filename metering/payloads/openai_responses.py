"""OpenAI's Responses, of OpenAI, Azure, xAI, Groq and OpenRouter; images, transcriptions and realtime answers too, and
LangChain's `usage_metadata`, which means the same.

`input_tokens` includes what was read from and written to a cache, `output_tokens` includes reasoning
(https://platform.openai.com/docs/api-reference/responses/object).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from metering.events import TokenUsage
from metering.payloads.openai_chat import CHAT
from metering.payloads.rule import Rule

if TYPE_CHECKING:
    from metering.payloads.reading import Part

__all__ = ["ANTHROPICS_OWN", "RESPONSES", "RESPONSES_OWN", "has_input_and_output"]

RESPONSES_OWN = ("total_tokens", "input_tokens_details", "input_token_details", "output_token_details")
"""Names that tell this shape from Anthropic's, which has the same names for its two counts."""

ANTHROPICS_OWN = ("cache_creation_input_tokens", "cache_read_input_tokens", "cache_creation", "iterations")

_OF_NEITHER = ("cache_read_tokens", "cache_write_tokens", "tokens", "billed_units")


def has_input_and_output(part: Part) -> bool:
    """Whether the two counts that both shapes share are there, and nothing of a third one."""
    return part.has_any("input_tokens", "output_tokens") and not part.has_any(*_OF_NEITHER)


def _reads(part: Part) -> bool:
    return has_input_and_output(part) and (part.has_any(*RESPONSES_OWN) or not part.has_any(*ANTHROPICS_OWN))


def _usage(part: Part, _provider: str | None) -> TokenUsage:
    input_tokens, output_tokens = part.count("input_tokens"), part.count("output_tokens")
    read = part.block("input_tokens_details", "input_token_details")
    made = part.block("output_tokens_details", "output_token_details")
    return TokenUsage(
        input_tokens=input_tokens,
        cache_read_tokens=read.optional("cached_tokens", "cache_read"),
        cache_write_tokens=read.optional("cache_write_tokens", "cache_creation"),
        input_audio_tokens=read.optional("audio_tokens", "audio"),
        output_tokens=output_tokens,
        reasoning_tokens=made.optional("reasoning_tokens", "thinking_tokens", "reasoning"),
        output_audio_tokens=made.optional("audio_tokens", "audio"),
    )


RESPONSES = Rule(
    shape="OpenAI Responses",
    reads=_reads,
    usage=_usage,
    chunk_places=(("response", "usage"), ("usage",)),
    provider_of=CHAT.provider_of,
    preferred_by=frozenset({"openai", "azure", "x-ai", "groq", "openrouter"}),
)
