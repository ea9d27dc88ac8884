"""Anthropic's messages, also through Bedrock's InvokeModel, Vertex AI and Azure.

`input_tokens` is without what was read from and written to a cache; `output_tokens` includes thinking
(https://platform.claude.com/docs/en/build-with-claude/prompt-caching#tracking-cache-performance).

`iterations` lists the model's runs within one answer. Those of kind `message` are in the counts above them; all others,
such as `compaction` and `advisor_message`, are not, and are billed: they are added. Where a fallback model answered
(`fallback_message`) the counts above are its own, and each declined `message` that produced output is billed too
(https://platform.claude.com/docs/en/build-with-claude/compaction-threshold,
https://platform.claude.com/docs/en/build-with-claude/refusals-and-fallback).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from metering.events import TokenUsage
from metering.payloads.openai_responses import ANTHROPICS_OWN, RESPONSES_OWN, has_input_and_output
from metering.payloads.reading import text_in
from metering.payloads.rule import Rule

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from metering.payloads.reading import Part

__all__ = ["ANTHROPIC"]


class _Run(NamedTuple):
    """Counts as Anthropic has them, each apart from the others but for the last."""

    input_tokens: int
    cache_read_tokens: int
    cache_write_tokens: int
    output_tokens: int
    cache_write_1h_tokens: int


def _reads(part: Part) -> bool:
    return has_input_and_output(part) and (part.has_any(*ANTHROPICS_OWN) or not part.has_any(*RESPONSES_OWN))


def _usage(part: Part, _provider: str | None) -> TokenUsage:
    answer = _run(part)
    runs = [(run.word("type"), _run(run)) for run in part.blocks("iterations")]
    whole = _sum([answer, *_beside(answer, runs)])
    return TokenUsage(
        input_tokens=whole.input_tokens + whole.cache_read_tokens + whole.cache_write_tokens,
        cache_read_tokens=whole.cache_read_tokens,
        cache_write_tokens=whole.cache_write_tokens,
        cache_write_1h_tokens=whole.cache_write_1h_tokens,
        output_tokens=whole.output_tokens,
        reasoning_tokens=part.block("output_tokens_details").optional("thinking_tokens", "reasoning_tokens"),
    )


def _run(part: Part) -> _Run:
    split = part.block("cache_creation")
    write_1h = split.optional("ephemeral_1h_input_tokens")
    has_write = "cache_creation_input_tokens" in part
    return _Run(
        input_tokens=part.count("input_tokens"),
        cache_read_tokens=part.optional("cache_read_input_tokens"),
        cache_write_tokens=part.count("cache_creation_input_tokens")
        if has_write
        else split.optional("ephemeral_5m_input_tokens") + write_1h,
        output_tokens=part.count("output_tokens"),
        cache_write_1h_tokens=write_1h,
    )


def _beside(answer: _Run, runs: list[tuple[str | None, _Run]]) -> Iterable[_Run]:
    """The runs that are not in the answer's own counts."""
    if _sum(run for _, run in runs)[:4] == answer[:4]:
        return []
    fell_back = any(kind == "fallback_message" for kind, _ in runs)
    return [
        run
        for kind, run in runs
        if kind not in ("message", "fallback_message", None) or (kind == "message" and fell_back and run.output_tokens)
    ]


def _sum(runs: Iterable[_Run]) -> _Run:
    return _Run(*map(sum, zip(_NOTHING, *runs, strict=True)))


_NOTHING = _Run(0, 0, 0, 0, 0)


def _provider_of(answer: Mapping[Any, object], _part: Part) -> str | None:
    message = text_in(answer, "id") or ""
    if "amazon-bedrock-invocationMetrics" in answer or message.startswith("msg_bdrk_"):
        return "aws"
    if message.startswith("msg_vrtx_"):
        return "google"
    return "anthropic" if (text_in(answer, "model") or "").startswith("claude-") else None


ANTHROPIC = Rule(
    shape="Anthropic messages",
    reads=_reads,
    usage=_usage,
    chunk_places=(("message", "usage"), ("usage",)),
    provider_of=_provider_of,
    preferred_by=frozenset({"anthropic", "aws"}),
)
