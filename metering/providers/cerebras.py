"""Cerebras: windows name their length, resets are seconds (https://inference-docs.cerebras.ai/support/rate-limits)."""

from __future__ import annotations

from metering.providers.openai_like import cheapest_of, in_seconds, openai_limits, openai_probe

__all__ = ["CEREBRAS_LIMITS", "CEREBRAS_PROBE"]

CEREBRAS_LIMITS = openai_limits("cerebras", reset=in_seconds)

CEREBRAS_PROBE = openai_probe(
    "https://api.cerebras.ai",
    sample=cheapest_of("llama3.1-8b", "gpt-oss-120b"),
    key_variable="CEREBRAS_API_KEY",
    url_variable="CEREBRAS_BASE_URL",
)
