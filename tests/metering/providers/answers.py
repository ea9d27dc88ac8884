"""Headers of providers' answers, as they are documented and as they were seen."""

from __future__ import annotations

DATE = "Thu, 12 Mar 2026 12:00:00 GMT"

ANTHROPIC = {
    "date": DATE,
    "content-type": "application/json",
    "request-id": "req_011CSHoEeqs5C35K2UUqR7Fy",
    "anthropic-organization-id": "3c6a1b2e-9d3f-4f68-8f7a-1d8f0f7b5a11",
    "anthropic-ratelimit-requests-limit": "4000",
    "anthropic-ratelimit-requests-remaining": "3999",
    "anthropic-ratelimit-requests-reset": "2026-03-12T12:00:01Z",
    "anthropic-ratelimit-tokens-limit": "480000",
    "anthropic-ratelimit-tokens-remaining": "479000",
    "anthropic-ratelimit-tokens-reset": "2026-03-12T12:00:00Z",
    "anthropic-ratelimit-input-tokens-limit": "400000",
    "anthropic-ratelimit-input-tokens-remaining": "399000",
    "anthropic-ratelimit-input-tokens-reset": "2026-03-12T12:00:00Z",
    "anthropic-ratelimit-output-tokens-limit": "80000",
    "anthropic-ratelimit-output-tokens-remaining": "80000",
    "anthropic-ratelimit-output-tokens-reset": "2026-03-12T11:59:59Z",
    "retry-after": "43",
    "set-cookie": "session=secret",
}
"""An answer of HTTP 200, with the `retry-after` that comes as a matter of course."""

ANTHROPIC_PRIORITY = {
    "date": DATE,
    "anthropic-priority-input-tokens-limit": "10000",
    "anthropic-priority-input-tokens-remaining": "9618",
    "anthropic-priority-input-tokens-reset": "2026-03-12T12:01:00Z",
    "anthropic-priority-output-tokens-limit": "10000",
    "anthropic-priority-output-tokens-remaining": "6000",
    "anthropic-priority-output-tokens-reset": "2026-03-12T12:00:30Z",
}

ANTHROPIC_UNIFIED = {
    "date": DATE,
    "anthropic-ratelimit-unified-status": "allowed",
    "anthropic-ratelimit-unified-reset": "1773320400",
    "anthropic-ratelimit-unified-representative-claim": "five_hour",
    "anthropic-ratelimit-unified-5h-status": "allowed",
    "anthropic-ratelimit-unified-5h-utilization": "0.07",
    "anthropic-ratelimit-unified-5h-reset": "1773320400",
    "anthropic-ratelimit-unified-7d-status": "rejected",
    "anthropic-ratelimit-unified-7d-utilization": "1.02",
    "anthropic-ratelimit-unified-7d-reset": "1773792000",
}

OPENAI = {
    "date": DATE,
    "content-type": "application/json",
    "openai-organization": "acme-inc",
    "openai-processing-ms": "312",
    "x-ratelimit-limit-requests": "10000",
    "x-ratelimit-limit-tokens": "200000",
    "x-ratelimit-remaining-requests": "9999",
    "x-ratelimit-remaining-tokens": "199963",
    "x-ratelimit-reset-requests": "8.64s",
    "x-ratelimit-reset-tokens": "12ms",
    "x-request-id": "req_1f5a",
    "set-cookie": "__cf_bm=secret",
}

OPENAI_IMAGES = {
    "date": DATE,
    "x-ratelimit-limit-input-images": "250",
    "x-ratelimit-remaining-input-images": "249",
    "x-ratelimit-reset-input-images": "240ms",
    "x-ratelimit-limit-project-tokens": "1,000,000",
    "x-ratelimit-remaining-project-tokens": "999500.75",
    "x-ratelimit-reset-project-tokens": "2026-03-12T13:00:00+01:00",
}

OPENAI_LIMITED = {
    **OPENAI,
    "x-ratelimit-remaining-tokens": "0",
    "x-ratelimit-reset-tokens": "1m53.425s",
    "retry-after": "114",
    "retry-after-ms": "113425",
}

AZURE = {
    "date": DATE,
    "apim-request-id": "7c3f9d3e",
    "x-ratelimit-limit-requests": "20000",
    "x-ratelimit-remaining-requests": "19999",
    "x-ratelimit-renewalperiod-requests": "60",
    "x-ratelimit-reset-requests": "3",
    "x-ratelimit-limit-tokens": "1000",
    "x-ratelimit-remaining-tokens": "500",
    "x-ratelimit-renewalperiod-tokens": "60",
    "x-ratelimit-reset-tokens": "30",
}
"""Of requests 1 of 20,000 is used, which is there again after 3 ms; of tokens one half, after 30 s."""

AZURE_UNKNOWN = {
    "date": DATE,
    "x-ratelimit-limit-tokens": "-1",
    "x-ratelimit-remaining-tokens": "-1",
    "x-ratelimit-reset-tokens": "0",
}

AZURE_MISSPELT = {
    "date": DATE,
    "x-rate-limit-reset-tokens": "55",
    "x-ratelimit-remaining-tokens": "0",
    "retry-after-ms": "55000",
}

GROQ = {
    "date": DATE,
    "x-groq-region": "us-west-1",
    "x-ratelimit-limit-requests": "14400",
    "x-ratelimit-limit-tokens": "18000",
    "x-ratelimit-remaining-requests": "14370",
    "x-ratelimit-remaining-tokens": "17997",
    "x-ratelimit-reset-requests": "2m59.56s",
    "x-ratelimit-reset-tokens": "7.66s",
}

MISTRAL = {
    "date": DATE,
    "x-ratelimit-limit-req-10-second": "20",
    "x-ratelimit-remaining-req-10-second": "19",
    "x-ratelimit-limit-tokens-minute": "500000",
    "x-ratelimit-remaining-tokens-minute": "499948",
    "x-ratelimit-limit-tokens-month": "1000000000000",
    "x-ratelimit-remaining-tokens-month": "999998798434",
    "x-ratelimit-tokens-query-cost": "52",
}

COHERE = {
    "date": DATE,
    "x-debug-trace-id": "f2dd389ebfa9ffcc",
    "x-endpoint-monthly-call-limit": "1000",
    "x-trial-endpoint-call-limit": "20",
    "x-trial-endpoint-call-remaining": "19",
}

TOGETHER = {
    "date": DATE,
    "x-ratelimit-limit": "10",
    "x-ratelimit-remaining": "0",
    "x-ratelimit-reset": "1",
    "x-tokenlimit-limit": "3000",
    "x-tokenlimit-remaining": "2750",
}

FIREWORKS = {
    "date": DATE,
    "x-ratelimit-limit-tokens-prompt": "60000",
    "x-ratelimit-remaining-tokens-prompt": "59400",
    "x-ratelimit-limit-tokens-cache-adjusted-prompt": "15000",
    "x-ratelimit-limit-tokens-generated": "1200",
    "x-ratelimit-remaining-tokens-generated": "1100",
    "x-ratelimit-over-limit": "no",
}

CEREBRAS = {
    "date": DATE,
    "x-ratelimit-limit-requests-day": "14400",
    "x-ratelimit-remaining-requests-day": "14399",
    "x-ratelimit-reset-requests-day": "33011.382867",
    "x-ratelimit-limit-tokens-minute": "60000",
    "x-ratelimit-remaining-tokens-minute": "59000",
    "x-ratelimit-reset-tokens-minute": "11.5",
}

HUGGINGFACE = {
    "date": DATE,
    "ratelimit": '"api";r=999;t=295',
    "ratelimit-policy": '"fixed window";"api";q=1000;w=300',
}

REPLICATE = {"date": DATE, "ratelimit-remaining": "599", "ratelimit-reset": "1"}

OPENROUTER = {
    "date": DATE,
    "x-ratelimit-limit": "20",
    "x-ratelimit-remaining": "0",
    "x-ratelimit-reset": "1773316830500",
}

OLLAMA = {"date": DATE, "content-type": "application/json; charset=utf-8", "content-length": "27"}


def refused(**error: str) -> dict[str, object]:
    """A body that refuses, as both say it."""
    return {"type": "error", "error": {"message": "no", **error}}
