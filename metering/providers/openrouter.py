"""OpenRouter's activity (https://openrouter.ai/docs/api/api-reference/analytics/get-user-activity).

The last 30 completed UTC days at once, a row for each model and endpoint, tokens and money in one. `usage` is USD taken
from OpenRouter's credits; what calls on keys of one's own cost elsewhere (`byok_usage_inference`) is not in it. Days on
which nothing was used are left out.
"""

from __future__ import annotations

from collections import defaultdict
from datetime import UTC, date, datetime

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

__all__ = ["OPENROUTER"]

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
