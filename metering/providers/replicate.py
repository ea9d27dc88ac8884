"""Replicate (https://replicate.com/docs/topics/predictions/rate-limits): what remains and when it is whole, no limit.

Its list of models is anybody's, and long; the account is the key's.
"""

from __future__ import annotations

import re

from metering.providers.limits import LimitRule
from metering.providers.openai_like import bearer, in_seconds
from metering.providers.probes import ProbeRule

__all__ = ["REPLICATE_LIMITS", "REPLICATE_PROBE"]

REPLICATE_LIMITS = LimitRule(
    provider="replicate",
    prefixes=("ratelimit-", "x-ratelimit-"),
    header=re.compile(r"(?:x-)?(?P<window>ratelimit)-(?P<part>limit|remaining|reset)"),
    windows={"ratelimit": "requests"},
    reset=in_seconds,
)

REPLICATE_PROBE = ProbeRule(
    url="https://api.replicate.com",
    headers=bearer,
    models_path="/v1/account",
    models_in=None,
    key_variable="REPLICATE_API_TOKEN",
)
