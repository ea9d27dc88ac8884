"""Cohere (https://docs.cohere.com/docs/rate-limits): a month's limit, and a trial key's of the endpoint.

The headers are not documented. How much of the month's calls remains is never said.
"""

from __future__ import annotations

import re

from metering.providers.limits import LimitRule
from metering.providers.openai_like import bearer
from metering.providers.probes import ProbeRule

__all__ = ["COHERE_LIMITS", "COHERE_PROBE"]

COHERE_LIMITS = LimitRule(
    provider="cohere",
    prefixes=("x-endpoint-monthly-call-", "x-trial-endpoint-call-"),
    header=re.compile(r"x-(?P<window>endpoint-monthly|trial-endpoint)-call-(?P<part>limit|remaining)"),
    windows={"endpoint_monthly": "requests_month", "trial_endpoint": "trial_requests"},
)

COHERE_PROBE = ProbeRule(
    url="https://api.cohere.com",
    headers=bearer,
    models_path="/v1/models?page_size=1000",
    models_in=("models", "name"),
    key_variable="CO_API_KEY",
    url_variable="CO_API_URL",
)
