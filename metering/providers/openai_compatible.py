"""Whatever speaks as OpenAI does at a base URL: a vLLM, or a gateway. It may want no key, and say no limits.

vLLM says none (https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html).
"""

from __future__ import annotations

from metering.providers.openai_like import openai_limits, openai_probe

__all__ = ["OPENAI_COMPATIBLE_LIMITS", "OPENAI_COMPATIBLE_PROBE"]

OPENAI_COMPATIBLE_LIMITS = openai_limits(
    "openai-compatible",
    aliases=("vllm",),
    refusals={"rate_limit_exceeded": True, "insufficient_quota": False},
)

OPENAI_COMPATIBLE_PROBE = openai_probe("", needs_key=False)
