"""Chat completions and embeddings, of OpenAI and of all who speak its API: Azure, Mistral, DeepSeek, Groq, OpenRouter,
xAI, Together, Cerebras, Hugging Face.

`prompt_tokens` includes what was read from and written to a cache. `completion_tokens` includes reasoning, but for xAI
(https://docs.x.ai/docs/key-information/consumption-and-rate-limits: "counted separately from completion_tokens") and
Gemini's endpoint of this shape, which does not even name it. `total_tokens` tells which it is.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from metering.events import TokenUsage
from metering.payloads.reading import text_in
from metering.payloads.rule import Rule

if TYPE_CHECKING:
    from collections.abc import Mapping

    from metering.payloads.reading import Part

__all__ = ["CHAT"]

_OF_OPENAI_ALONE = re.compile(r"(gpt-\d|o\d|chatgpt-|text-embedding-(3-|ada-))[^/]*")
"""Models that OpenAI and Azure serve, under names of OpenAI's."""


def _reads(part: Part) -> bool:
    return part.has_any("prompt_tokens", "completion_tokens")


def _usage(part: Part, provider: str | None) -> TokenUsage:
    prompt_tokens = part.count("prompt_tokens")
    completion_tokens = _completion_tokens(part, prompt_tokens)
    # Mistral has a name of its own for the block, too.
    read = part.block("prompt_tokens_details", "prompt_token_details")
    made = part.block("completion_tokens_details")
    reasoning_tokens = made.optional("reasoning_tokens") or part.optional("reasoning_tokens")
    outside = _outside_reasoning(part, prompt_tokens, completion_tokens, reasoning_tokens, _by_mark(part) or provider)
    return TokenUsage(
        input_tokens=prompt_tokens,
        # DeepSeek: prompt_cache_hit_tokens; xAI's own API: cached_prompt_text_tokens; Together: cached_tokens;
        # Mistral: num_cached_tokens.
        cache_read_tokens=read.optional("cached_tokens")
        or part.optional("prompt_cache_hit_tokens", "cached_prompt_text_tokens", "cached_tokens", "num_cached_tokens"),
        # litellm gives Anthropic's answers this shape, and leaves Anthropic's name beside it.
        cache_write_tokens=read.optional("cache_write_tokens") or part.optional("cache_creation_input_tokens"),
        input_audio_tokens=read.optional("audio_tokens"),
        output_tokens=completion_tokens + outside,
        reasoning_tokens=max(reasoning_tokens, outside),
        output_audio_tokens=made.optional("audio_tokens"),
    )


def _completion_tokens(part: Part, prompt_tokens: int) -> int:
    # Embeddings have none: https://platform.openai.com/docs/api-reference/embeddings/object
    is_embedding = "completion_tokens" not in part and "total_tokens" in part
    return 0 if is_embedding and part.count("total_tokens") == prompt_tokens else part.count("completion_tokens")


def _outside_reasoning(part: Part, read: int, made: int, reasoning_tokens: int, provider: str | None) -> int:
    """Reasoning that is part of the total and not of what was made: what `total_tokens` says, or else the provider.

    Raises `InvalidUsage` where neither tells.
    """
    total_tokens = part.count("total_tokens") if "total_tokens" in part else None
    if total_tokens is None and not reasoning_tokens:
        return 0
    if total_tokens == read + made:
        return 0
    if total_tokens == read + made + reasoning_tokens:
        return reasoning_tokens
    if provider == "x-ai":
        return reasoning_tokens
    if provider == "google" and total_tokens is not None:
        return max(0, total_tokens - read - made)
    if provider is not None and (total_tokens is None or total_tokens < read + made):
        return 0
    apart = f", or {read + made + reasoning_tokens} where reasoning is counted apart" if reasoning_tokens else ""
    raise part.refused("total_tokens", total_tokens, f"{read + made}{apart}; say whose rule holds with provider=")


def _by_mark(part: Part) -> str | None:
    """Whose counts these are, by names that nobody else has."""
    if "prompt_cache_hit_tokens" in part:
        return "deepseek"
    return "x-ai" if part.has_any("cached_prompt_text_tokens", "num_sources_used", "cost_in_usd_ticks") else None


_MARKS = {
    "prompt_filter_results": "azure",
    "content_filters": "azure",  # what Responses call it there
    "x_groq": "groq",
    "time_info": "cerebras",
}


def _provider_of(answer: Mapping[Any, object], part: Part) -> str | None:
    marked = _by_mark(part) or next((provider for mark, provider in _MARKS.items() if mark in answer), None)
    model = text_in(answer, "model") or ""
    return marked or ("openai" if _OF_OPENAI_ALONE.fullmatch(model) else None)


CHAT = Rule(
    shape="OpenAI chat completions or embeddings",
    reads=_reads,
    usage=_usage,
    places=(("usage",), ("x_groq", "usage")),
    chunk_places=(("usage",), ("x_groq", "usage")),
    provider_of=_provider_of,
)
