"""Bodies that say limits, as they are documented and as they were seen."""

from __future__ import annotations

from typing import Any

OPENROUTER_KEY: dict[str, Any] = {
    "data": {
        "label": "sk-or-v1-au7...890",
        "limit": 100,
        "usage": 25.5,
        "usage_monthly": 25.5,
        "limit_remaining": 74.5,
        "limit_reset": "monthly",
        "is_free_tier": False,
        "rate_limit": {"requests": 1000, "interval": "1h", "note": "This field is deprecated and safe to ignore."},
    }
}

OPENROUTER_REFUSED: dict[str, Any] = {
    "error": {
        "message": "Rate limit exceeded: free-models-per-day.",
        "code": 429,
        "metadata": {
            "headers": {
                "X-RateLimit-Limit": "50",
                "X-RateLimit-Remaining": "0",
                "X-RateLimit-Reset": "1773360000000",
            },
            "provider_name": None,
        },
    },
    "user_id": "user_3",
}

DEEPSEEK_BALANCE: dict[str, Any] = {
    "is_available": True,
    "balance_infos": [
        {"currency": "CNY", "total_balance": "110.00", "granted_balance": "10.00", "topped_up_balance": "100.00"},
        {"currency": "USD", "total_balance": "0.07", "granted_balance": "0.00", "topped_up_balance": "0.07"},
    ],
}

GEMINI_REFUSED: dict[str, Any] = {
    "error": {
        "code": 429,
        "message": "You exceeded your current quota, please check your plan and billing details.",
        "status": "RESOURCE_EXHAUSTED",
        "details": [
            {
                "@type": "type.googleapis.com/google.rpc.QuotaFailure",
                "violations": [
                    {
                        "quotaMetric": "generativelanguage.googleapis.com/generate_content_free_tier_requests",
                        "quotaId": "GenerateRequestsPerDayPerProjectPerModel-FreeTier",
                        "quotaDimensions": {"location": "global", "model": "gemini-2.5-flash"},
                        "quotaValue": "20",
                    },
                    {
                        "quotaMetric": "generativelanguage.googleapis.com/generate_content_free_tier_input_token_count",
                        "quotaId": "GenerateContentInputTokensPerModelPerMinute-FreeTier",
                        "quotaDimensions": {"location": "global", "model": "gemini-2.5-flash"},
                        "quotaValue": "250000",
                    },
                    {"quotaId": "SomethingNew"},
                ],
            },
            {"@type": "type.googleapis.com/google.rpc.Help", "links": [{"url": "https://ai.google.dev"}]},
            {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "14.5s"},
        ],
    }
}

OPENAI_PROJECT: dict[str, Any] = {
    "object": "list",
    "data": [
        {
            "object": "project.rate_limit",
            "id": "rl-gpt-4o",
            "model": "gpt-4o",
            "max_requests_per_1_minute": 500,
            "max_tokens_per_1_minute": 30000,
            "max_requests_per_1_day": 10000,
        },
        {
            "object": "project.rate_limit",
            "id": "rl-ada",
            "model": "ada",
            "max_requests_per_1_minute": 600,
            "max_tokens_per_1_minute": 150000,
            "max_images_per_1_minute": None,
        },
    ],
    "has_more": False,
}

ANTHROPIC_ORGANIZATION: dict[str, Any] = {
    "data": [
        {
            "type": "rate_limit",
            "group_type": "model_group",
            "models": ["claude-opus-4-5", "claude-opus-4-6"],
            "limits": [
                {"type": "requests_per_minute", "value": 4000},
                {"type": "input_tokens_per_minute", "value": 10000000},
                {"type": "output_tokens_per_minute", "value": 800000},
            ],
        },
        {
            "type": "rate_limit",
            "group_type": "batch",
            "models": None,
            "limits": [{"type": "enqueued_batch_requests", "value": 500000}],
        },
    ],
    "next_page": None,
}
