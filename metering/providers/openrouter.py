"""OpenRouter: an account's activity, what a key may still spend, and the limits of free models.

Activity (https://openrouter.ai/docs/api/api-reference/analytics/get-user-activity): the last 30 completed UTC days at
once, a row for each model and endpoint, tokens and money in one. `usage` is USD taken from OpenRouter's credits; what
calls on keys of one's own cost elsewhere (`byok_usage_inference`) is not in it. Days on which nothing was used are left
out.

A key (https://openrouter.ai/docs/api/api-reference/api-keys/get-current-key) has a limit in USD or none. It is whole
again at midnight UTC: of each day, Monday, or first of a month
(https://openrouter.ai/docs/api/api-reference/api-keys/create-keys), or never. The key is asked about, not the list of
models, which is anybody's. A refusal's body has the limit of a free model, and when it ends in milliseconds since 1970.
"""

from __future__ import annotations

import re
from collections import defaultdict
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any

from metering.providers.header_values import epoch_ms
from metering.providers.limit_bodies import inner, said
from metering.providers.limits import BodySays, Field
from metering.providers.openai_like import openai_limits, openai_probe
from metering.providers.reports import (
    Counts,
    Page,
    Part,
    Provider,
    Question,
    Report,
    ReportDay,
    ReportRow,
    day_from,
    grouped,
    row,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["OPENROUTER", "OPENROUTER_LIMITS", "OPENROUTER_PROBE"]

DIMENSIONS = ("model", "model_permaslug", "provider_name")


def _question(_start: date, _end: date, _page: str | None) -> Question:
    return Question(path="/api/v1/activity", params=())


def _page(page: object) -> Page:
    days: defaultdict[date, list[ReportRow]] = defaultdict(list)
    for item in Part(page).parts("data"):
        days[_day(item)].append(_row(item))
    return Page(
        days=tuple(ReportDay(day=day, rows=grouped(rows)) for day, rows in sorted(days.items())), next_page=None
    )


def _day(item: Part) -> date:
    said = item.text("date")
    try:
        time = datetime.fromisoformat(said or "")
    except ValueError:
        raise item.refused("date", said, "a day such as 2026-10-31") from None
    return day_from(item, "date", time.replace(tzinfo=time.tzinfo or UTC))


def _row(item: Part) -> ReportRow:
    counts = Counts(
        requests=item.count("requests"),
        input_tokens=item.count("prompt_tokens"),
        output_tokens=item.count("completion_tokens"),
        reasoning_tokens=item.optional_count("reasoning_tokens"),
    )
    return row(item, DIMENSIONS, counts=counts, cost_usd=item.number("usage"))


OPENROUTER = Provider(
    name="openrouter",
    url="https://openrouter.ai",
    key_variable="OPENROUTER_MANAGEMENT_KEY",
    key_kind="a management key",
    headers=lambda key: {"authorization": f"Bearer {key}"},
    reports=(
        Report(
            name="usage",
            question=_question,
            page=_page,
            says_tokens=True,
            says_cost=True,
            says_empty_days=False,
            completed_days=30,
        ),
    ),
)


def _limits(body: Mapping[str, Any]) -> BodySays:
    windows: dict[str, Mapping[str, Field]] = {}
    key = said(body.get("data"), "data", limit="limit", remaining="limit_remaining", used="usage", reset="limit_reset")
    if "used" in key:
        windows["credits_usd"] = key
    place = ("error", "metadata", "headers")
    names = {part.lower(): f"X-RateLimit-{part}" for part in ("Limit", "Remaining", "Reset")}
    refused = said(inner(body, *place), ".".join(place), **names)
    if refused:
        windows["requests"] = refused
    return BodySays(windows=windows)


def _reset(text: str, now: datetime, _parts: Mapping[str, str]) -> datetime:
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    if text == "daily":
        return midnight + timedelta(days=1)
    if text == "weekly":
        return midnight + timedelta(days=7 - midnight.weekday())
    if text == "monthly":
        return (midnight.replace(day=1) + timedelta(days=32)).replace(day=1)
    try:
        return epoch_ms(text)
    except ValueError:
        raise ValueError("daily, weekly, monthly, or milliseconds since 1970") from None


OPENROUTER_LIMITS = openai_limits(
    "openrouter",
    header=re.compile(r"x-(?P<window>ratelimit)-(?P<part>limit|remaining|reset)"),
    windows={"ratelimit": "requests"},
    body=_limits,
    reset=_reset,
)

OPENROUTER_PROBE = openai_probe(
    OPENROUTER.url, models_path="/api/v1/key", models_in=None, key_variable="OPENROUTER_API_KEY"
)
