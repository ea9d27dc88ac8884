"""xAI documents no headers (https://docs.x.ai/developers/rate-limits); those that are named as OpenAI's are read."""

from __future__ import annotations

from metering.providers.openai_like import openai_limits, openai_probe

__all__ = ["XAI_LIMITS", "XAI_PROBE"]

XAI_LIMITS = openai_limits("x-ai", aliases=("xai", "grok"))

XAI_PROBE = openai_probe("https://api.x.ai", key_variable="XAI_API_KEY")
