"""Ollama says nothing of limits: a 429 of its cloud is all there is (https://docs.ollama.com/api/errors)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from metering.providers.limits import LimitRule
from metering.providers.probes import ProbeRule, Sample

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["OLLAMA_LIMITS", "OLLAMA_PROBE"]

OLLAMA_LIMITS = LimitRule(provider="ollama")


def _sample(models: Sequence[str]) -> Sample | None:
    if not models:
        return None
    body = {"model": models[0], "prompt": "hi", "stream": False, "options": {"num_predict": 1}}
    return Sample(model=models[0], path="/api/generate", body=body)


OLLAMA_PROBE = ProbeRule(
    url="http://127.0.0.1:11434",
    headers=lambda key: {"authorization": f"Bearer {key}"} if key else {},
    models_path="/api/tags",
    models_in=("models", "name"),
    sample=_sample,
    needs_key=False,
    url_variable="OLLAMA_HOST",
    latency_ns="total_duration",
)
