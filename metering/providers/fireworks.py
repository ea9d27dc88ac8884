"""Fireworks limits tokens, and says no resets (https://docs.fireworks.ai/serverless/rate-limits)."""

from __future__ import annotations

from metering.providers.openai_like import openai_limits, openai_probe

__all__ = ["FIREWORKS_LIMITS", "FIREWORKS_PROBE"]

FIREWORKS_LIMITS = openai_limits(
    "fireworks",
    windows={
        "tokens_prompt": "input_tokens",
        "tokens_cache_adjusted_prompt": "uncached_input_tokens",
        "tokens_generated": "output_tokens",
    },
)

FIREWORKS_PROBE = openai_probe(
    "https://api.fireworks.ai", models_path="/inference/v1/models", key_variable="FIREWORKS_API_KEY"
)
