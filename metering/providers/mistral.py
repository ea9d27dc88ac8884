"""Mistral (https://docs.mistral.ai/deployment/laplateforme/tier/): limits of requests and of tokens, and no resets.

The headers are not documented; they name the length of each window.
"""

from __future__ import annotations

from metering.providers.openai_like import cheapest_of, openai_limits, openai_probe

__all__ = ["MISTRAL_LIMITS", "MISTRAL_PROBE"]

MISTRAL_LIMITS = openai_limits(
    "mistral",
    windows={
        "req_10_second": "requests_10s",
        "req_second": "requests_second",
        "req_minute": "requests_minute",
    },
)

MISTRAL_PROBE = openai_probe(
    "https://api.mistral.ai",
    sample=cheapest_of("ministral-3b-latest", "mistral-small-latest"),
    key_variable="MISTRAL_API_KEY",
)
