"""Hugging Face (https://huggingface.co/docs/hub/rate-limits): limits of the Hub, by the draft of the IETF.

`api` are calls of the Hub's API, as its list of models with an inference provider is
(https://huggingface.co/docs/inference-providers/hub-api). What an inference provider limits is not told.
"""

from __future__ import annotations

from metering.providers.limits import LimitRule
from metering.providers.openai_like import bearer, in_seconds
from metering.providers.probes import ProbeRule

__all__ = ["HUGGINGFACE_LIMITS", "HUGGINGFACE_PROBE"]

HUGGINGFACE_LIMITS = LimitRule(
    provider="huggingface",
    aliases=("hf",),
    prefixes=("ratelimit",),
    structured={"ratelimit": {"r": "remaining", "t": "reset"}, "ratelimit-policy": {"q": "limit"}},
    reset=in_seconds,
)

HUGGINGFACE_PROBE = ProbeRule(
    url="https://huggingface.co",
    headers=bearer,
    models_path="/api/models?inference_provider=all&limit=100",
    models_in=("", "id"),
    key_variable="HF_TOKEN",
    url_variable="HF_ENDPOINT",
)
