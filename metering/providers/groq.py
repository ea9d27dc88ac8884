"""Groq (https://console.groq.com/docs/rate-limits): OpenAI's headers, on calls of a model.

Their `requests` are those of a day and their `tokens` those of a minute, says the documentation, and not the answer.
"""

from __future__ import annotations

from metering.providers.openai_like import cheapest_of, openai_limits, openai_probe

__all__ = ["GROQ_LIMITS", "GROQ_PROBE"]

GROQ_LIMITS = openai_limits("groq", refusals={"rate_limit_exceeded": True})

GROQ_PROBE = openai_probe(
    "https://api.groq.com",
    models_path="/openai/v1/models",
    sample=cheapest_of("llama-3.1-8b-instant", "openai/gpt-oss-20b", path="/openai/v1/chat/completions"),
    key_variable="GROQ_API_KEY",
    url_variable="GROQ_BASE_URL",
)
