"""Gemini (https://ai.google.dev/gemini-api/docs/rate-limits): limits are told by a refusal's body alone.

It says which quotas were exceeded and how long to wait
(https://github.com/googleapis/googleapis/blob/master/google/rpc/error_details.proto), also where the quota is of a day:
that time is no reset. Nor does it say what remains: a long prompt exceeds what a short one would not.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from metering.providers.limit_bodies import inner, objects, said
from metering.providers.limits import BodySays, Field, LimitRule
from metering.providers.probes import ProbeRule

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["GEMINI_LIMITS", "GEMINI_PROBE"]

WHAT = {"InputTokens": "input_tokens", "Tokens": "tokens", "Requests": "requests"}
"""In a quota's id, such as GenerateRequestsPerDayPerProjectPerModel-FreeTier."""
PERIOD = re.compile(r"Per(Second|Minute|Hour|Day|Month)")


def _refusal(body: Mapping[str, Any]) -> BodySays:
    windows: dict[str, Mapping[str, Field]] = {}
    retry_after = None
    for place, detail in objects(body, "error", "details"):
        kind = str(detail.get("@type")).rpartition(".")[2]
        if kind == "RetryInfo" and detail.get("retryDelay") is not None:
            retry_after = (f"{place}.retryDelay", detail["retryDelay"])
        elif kind == "QuotaFailure":
            for violation_place, violation in objects(detail, "violations", place=f"{place}."):
                name = _window(violation)
                if name:
                    windows[name] = said(violation, violation_place, limit="quotaValue")
    return BodySays(windows=windows, retry_after=retry_after)


def _window(violation: Mapping[str, Any]) -> str | None:
    quota, model = violation.get("quotaId"), inner(violation, "quotaDimensions", "model")
    if not isinstance(quota, str):
        return None
    what = next((name for text, name in WHAT.items() if text in quota), None)
    period = PERIOD.search(quota)
    name = f"{what}_{period[1].lower()}" if what and period else quota
    return f"{name}/{model}" if isinstance(model, str) else name


GEMINI_LIMITS = LimitRule(provider="google", aliases=("gemini",), body=_refusal, refusals={"RESOURCE_EXHAUSTED": True})

GEMINI_PROBE = ProbeRule(
    url="https://generativelanguage.googleapis.com",
    headers=lambda key: {"x-goog-api-key": key},
    models_path="/v1beta/models?pageSize=1000",
    models_in=("models", "name"),
    key_variable="GEMINI_API_KEY",
)
