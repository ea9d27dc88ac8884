"""Gemini and Vertex AI, with REST's names or the SDK's.

`promptTokenCount` includes what was cached, but not `toolUsePromptTokenCount`; `candidatesTokenCount` is without
`thoughtsTokenCount` (https://ai.google.dev/api/generate-content#UsageMetadata). Zeros are left out, as proto3's JSON
does. Some answers count thoughts among the candidates: then `totalTokenCount` has no room for them
(https://github.com/BerriAI/litellm/pull/10141).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from metering.events import TokenUsage
from metering.payloads.rule import Rule

if TYPE_CHECKING:
    from metering.payloads.reading import Part

__all__ = ["GEMINI"]


def _names(name: str) -> tuple[str, str]:
    return name, re.sub("([A-Z])", lambda capital: f"_{capital[1].lower()}", name)


_PROMPT = _names("promptTokenCount")
_TOOLS = _names("toolUsePromptTokenCount")
_CACHED = _names("cachedContentTokenCount")
_CANDIDATES = (*_names("candidatesTokenCount"), *_names("responseTokenCount"))
_THOUGHTS = _names("thoughtsTokenCount")
_TOTAL = _names("totalTokenCount")
_READ_BY_KIND = (_names("promptTokensDetails"), _names("toolUsePromptTokensDetails"))
_MADE_BY_KIND = (*_names("candidatesTokensDetails"), *_names("responseTokensDetails"))


def _reads(part: Part) -> bool:
    return part.has_any(*_PROMPT, *_TOTAL)


def _usage(part: Part, _provider: str | None) -> TokenUsage:
    read = part.optional(*_PROMPT) + part.optional(*_TOOLS)
    candidates, thoughts = part.optional(*_CANDIDATES), part.optional(*_THOUGHTS)
    total = part.optional(*_TOTAL)
    if not (part.has_any(*_PROMPT) and part.has_any(*_CANDIDATES)):
        _check_zeros(part, read + candidates + thoughts)
    thoughts_are_inside = total == read + candidates and thoughts <= candidates
    made = candidates if thoughts_are_inside else candidates + thoughts
    return TokenUsage(
        input_tokens=read,
        cache_read_tokens=part.optional(*_CACHED),
        input_audio_tokens=sum(_audio(part, names) for names in _READ_BY_KIND),
        output_tokens=made,
        reasoning_tokens=thoughts,
        output_audio_tokens=_audio(part, _MADE_BY_KIND),
    )


def _check_zeros(part: Part, counted: int) -> None:
    """What is left out is 0 only where the total says so too."""
    total = part.count(_TOTAL[1] if _TOTAL[1] in part else _TOTAL[0])
    if total > counted:
        raise part.refused(_TOTAL[0], total, f"at most the {counted} tokens that are counted one by one")


def _audio(part: Part, names: tuple[str, ...]) -> int:
    return sum(
        kind.optional("tokenCount", "token_count") for kind in part.blocks(*names) if kind.word("modality") == "AUDIO"
    )


GEMINI = Rule(
    shape="Gemini",
    reads=_reads,
    usage=_usage,
    places=(("usageMetadata",), ("usage_metadata",)),
    chunk_places=(("usageMetadata",), ("usage_metadata",)),
    provider_of=lambda _answer, _part: "google",
)
