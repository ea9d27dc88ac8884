"""Answers of the providers' report APIs, as they are documented and as they were seen."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import Any

AUGUST = date(2025, 8, 1)


def seconds(day: date) -> int:
    return int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp())


def openai_bucket(*results: Any, day: date = AUGUST) -> dict[str, Any]:
    return {
        "object": "bucket",
        "start_time": seconds(day),
        "end_time": seconds(day + timedelta(days=1)),
        "results": list(results),
    }


def anthropic_bucket(*results: Any, day: date = AUGUST) -> dict[str, Any]:
    return {
        "starting_at": f"{day}T00:00:00Z",
        "ending_at": f"{day + timedelta(days=1)}T00:00:00Z",
        "results": list(results),
    }


def paged(*buckets: Any, next_page: str | None = None) -> dict[str, Any]:
    return {"object": "page", "data": list(buckets), "has_more": next_page is not None, "next_page": next_page}


def completions(**said: Any) -> dict[str, Any]:
    """27,444 tokens in, of which 8,448 from a cache and 100 to one; 500 out, in 5 requests."""
    return {
        "object": "organization.usage.completions.result",
        "input_tokens": 27_444,
        "input_cached_tokens": 8_448,
        "input_uncached_tokens": 18_996,
        "input_cache_write_tokens": 100,
        "output_tokens": 500,
        "input_audio_tokens": 3,
        "output_audio_tokens": 2,
        "num_model_requests": 5,
        "project_id": None,
        "user_id": None,
        "api_key_id": None,
        "model": "gpt-4.1-2025-04-14",
        "batch": False,
        "service_tier": None,
        **said,
    }


def embeddings(**said: Any) -> dict[str, Any]:
    """1,600 tokens in 2 requests."""
    return {
        "object": "organization.usage.embeddings.result",
        "input_tokens": 1_600,
        "num_model_requests": 2,
        "model": "text-embedding-3-small",
        **said,
    }


def openai_cost(value: Any, **said: Any) -> dict[str, Any]:
    return {
        "object": "organization.costs.result",
        "amount": {"value": value, "currency": "usd"},
        "line_item": "gpt-4.1-2025-04-14, output",
        "project_id": None,
        **said,
    }


def messages(**said: Any) -> dict[str, Any]:
    """1,500 tokens uncached, 200 from the cache, 500 and 1,000 to it for 5 minutes and an hour; 500 out."""
    return {
        "uncached_input_tokens": 1_500,
        "cache_read_input_tokens": 200,
        "cache_creation": {"ephemeral_5m_input_tokens": 500, "ephemeral_1h_input_tokens": 1_000},
        "output_tokens": 500,
        "server_tool_use": {"web_search_requests": 10},
        "model": "claude-sonnet-4-20250514",
        "service_tier": "standard",
        "context_window": None,
        "api_key_id": None,
        "workspace_id": None,
        **said,
    }


def anthropic_cost(amount: Any, **said: Any) -> dict[str, Any]:
    return {
        "amount": amount,
        "currency": "USD",
        "cost_type": "tokens",
        "token_type": "uncached_input_tokens",
        "description": "Claude Sonnet 4 Usage - Input Tokens",
        "model": "claude-sonnet-4-20250514",
        "service_tier": "standard",
        "context_window": "0-200k",
        "workspace_id": None,
        **said,
    }


def activity(day: date = AUGUST, **said: Any) -> dict[str, Any]:
    return {
        "date": str(day),
        "model": "openai/gpt-4.1",
        "model_permaslug": "openai/gpt-4.1-2025-04-14",
        "endpoint_id": "550e8400-e29b-41d4-a716-446655440000",
        "provider_name": "OpenAI",
        "usage": 0.015,
        "byok_usage_inference": 0.012,
        "requests": 5,
        "prompt_tokens": 50,
        "completion_tokens": 125,
        "reasoning_tokens": 25,
        **said,
    }
