"""Together (https://docs.together.ai/docs/rate-limits): one window of requests and one of tokens.

They are those of a second, says the documentation, and not the answer.
"""

from __future__ import annotations

import re

from metering.providers.openai_like import in_seconds, openai_limits, openai_probe

__all__ = ["TOGETHER_LIMITS", "TOGETHER_PROBE"]

TOGETHER_LIMITS = openai_limits(
    "together",
    prefixes=("x-ratelimit-", "x-tokenlimit-"),
    header=re.compile(r"x-(?P<window>ratelimit|tokenlimit)-(?P<part>limit|remaining|reset)"),
    windows={"ratelimit": "requests", "tokenlimit": "tokens"},
    reset=in_seconds,
)

TOGETHER_PROBE = openai_probe(
    "https://api.together.xyz",
    models_in=("", "id"),
    key_variable="TOGETHER_API_KEY",
    url_variable="TOGETHER_BASE_URL",
)
