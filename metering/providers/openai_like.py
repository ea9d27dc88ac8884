"""What many providers have in common with OpenAI: the names of headers, the model list, the call that costs."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from metering.providers.header_values import duration, instant, seconds
from metering.providers.limits import LimitRule
from metering.providers.probes import ProbeRule, Sample

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["PREFIXES", "bearer", "cheapest_of", "duration_or_time", "in_seconds", "openai_limits", "openai_probe"]

PREFIXES = ("x-ratelimit-",)
_HEADER = re.compile(r"x-ratelimit-(?P<part>limit|remaining|reset)-(?P<window>[a-z0-9-]+)")


def bearer(key: str) -> Mapping[str, str]:
    """The key where there is one."""
    return {"authorization": f"Bearer {key}"} if key else {}


def duration_or_time(text: str, now: datetime, _parts: Mapping[str, str]) -> datetime:
    """A reset such as 6m0s, or a time with an offset."""
    try:
        return now + duration(text)
    except ValueError:
        try:
            return instant(text)
        except ValueError:
            raise ValueError("a duration such as 6m0s, or a time with an offset") from None


def in_seconds(text: str, now: datetime, _parts: Mapping[str, str]) -> datetime:
    """A reset in seconds from now."""
    return now + timedelta(microseconds=int(seconds(text) * 1_000_000))


def openai_limits(provider: str, **more: Any) -> LimitRule:
    """The windows of `x-ratelimit-{limit,remaining,reset}-*`."""
    return LimitRule(
        **{"provider": provider, "prefixes": PREFIXES, "header": _HEADER, "reset": duration_or_time, **more}
    )


def openai_probe(url: str, **more: Any) -> ProbeRule:
    """`GET /v1/models` with the key as a bearer."""
    return ProbeRule(
        **{"url": url, "headers": bearer, "models_path": "/v1/models", "models_in": ("data", "id"), **more}
    )


def cheapest_of(*models: str, path: str = "/v1/chat/completions") -> Callable[[Sequence[str]], Sample | None]:
    """One token of the first of these models that is listed, which is the cheapest one."""

    def sample(listed: Sequence[str]) -> Sample | None:
        for model in models:
            if model in listed:
                body = {"model": model, "max_tokens": 1, "messages": [{"role": "user", "content": "hi"}]}
                return Sample(model=model, path=path, body=body)
        return None

    return sample
