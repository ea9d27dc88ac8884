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

OLLAMA = {"date": DATE, "content-type": "application/json; charset=utf-8", "content-length": "27"}


def refused(**error: str) -> dict[str, object]:
    """A body that refuses, as both say it."""
    return {"type": "error", "error": {"message": "no", **error}}
