"""Ollama's own API (https://docs.ollama.com/api): counts beside the answer, in a stream in its last chunk.

`prompt_eval_count` includes `prompt_eval_cached_count`. Some versions leave it out where the prompt was cached
(https://github.com/ollama/ollama/issues/2068): it is unknown then, not 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from metering.events import TokenUsage
from metering.payloads.rule import Rule

if TYPE_CHECKING:
    from metering.payloads.reading import Part

__all__ = ["OLLAMA"]


def _reads(part: Part) -> bool:
    return part.has_any("prompt_eval_count", "eval_count", "eval_duration")


def _usage(part: Part, _provider: str | None) -> TokenUsage:
    if "prompt_eval_count" not in part:
        raise part.refused(
            "prompt_eval_count",
            None,
            "a count. Ollama leaves it out where the prompt was cached: count the prompt, and settle with a TokenUsage",
        )
    made_nothing = "embeddings" in part and "eval_count" not in part
    return TokenUsage(
        input_tokens=part.count("prompt_eval_count"),
        cache_read_tokens=part.optional("prompt_eval_cached_count"),
        output_tokens=0 if made_nothing else part.count("eval_count"),
    )


OLLAMA = Rule(
    shape="Ollama",
    reads=_reads,
    usage=_usage,
    places=(),
    chunk_places=((),),
    provider_of=lambda _answer, _part: "ollama",
)
