"""Ollama says nothing of limits: a 429 of its cloud is all there is (https://docs.ollama.com/api/errors)."""

from __future__ import annotations

from metering.providers.limits import LimitRule

__all__ = ["OLLAMA_LIMITS"]

OLLAMA_LIMITS = LimitRule(provider="ollama")
