"""OpenAI: an organization's reports, and the rate limits that its answers carry.

Reports (https://platform.openai.com/docs/api-reference/usage): `input_tokens` includes what was read from a cache, and
what was written to one. Costs are USD: the documentation has a float, real answers also a text ("0.0042"). They can be
grouped by line item, such as `gpt-4.1-2025-04-14, output`, and not by model. Buckets without usage are there, with no
results.

Limits (https://platform.openai.com/docs/guides/rate-limits): resets are durations. The window of requests may be a day.

An admin key may ask for a project's limits (https://platform.openai.com/docs/api-reference/project-rate-limits), of
each model and without what remains. They are windows of their own (`requests_minute/gpt-4o`), because an answer does
not say which models its headers are about.
"""

from __future__ import annotations

from datetime import UTC, date, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from metering.providers.limit_bodies import objects, said
from metering.providers.limits import BodySays
from metering.providers.openai_like import openai_limits, openai_probe
from metering.providers.probes import Sample
from metering.providers.reports import (
    DAYS_PER_PAGE,
    Counts,
    Part,
    Provider,
    Question,
    Report,
    ReportRow,
    bucket_page,
    day_from,
    row,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["OPENAI", "OPENAI_LIMITS", "OPENAI_PROBE"]

COMPLETIONS = ("model", "project_id", "batch", "service_tier")
EMBEDDINGS = ("model", "project_id")
COSTS = ("project_id", "line_item")

CHEAPEST = ("gpt-4.1-mini", "gpt-4o-mini", "gpt-4.1", "gpt-4o", "o4-mini")

_YEAR_9999 = 253_402_300_800


def _question(path: str, group_by: tuple[str, ...], start: date, end: date, page: str | None) -> Question:
    return Question(
        path=path,
        params=(
            ("start_time", str(_midnight(start))),
            ("end_time", str(_midnight(end))),
            ("bucket_width", "1d"),
            ("limit", str(DAYS_PER_PAGE)),
            *(("group_by", name) for name in group_by),
            *([] if page is None else [("page", page)]),
        ),
    )


def _midnight(day: date) -> int:
    return int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp())


def _day(bucket: Part) -> date:
    times = []
    for name in ("start_time", "end_time"):
        seconds = bucket.count(name)
        if seconds >= _YEAR_9999:
            raise bucket.refused(name, seconds, "seconds since 1970")
        times.append(datetime.fromtimestamp(seconds, UTC))
    return day_from(bucket, "start_time", *times)


def _completions(result: Part) -> ReportRow:
    counts = Counts(
        requests=result.optional_count("num_model_requests"),
        input_tokens=result.count("input_tokens"),
        cache_read_tokens=result.optional_count("input_cached_tokens"),
        cache_write_tokens=result.optional_count("input_cache_write_tokens"),
        input_audio_tokens=result.optional_count("input_audio_tokens"),
        output_tokens=result.count("output_tokens"),
        output_audio_tokens=result.optional_count("output_audio_tokens"),
    )
    return row(result, COMPLETIONS, counts=counts)


def _embeddings(result: Part) -> ReportRow:
    counts = Counts(requests=result.optional_count("num_model_requests"), input_tokens=result.count("input_tokens"))
    return row(result, EMBEDDINGS, counts=counts)


def _costs(result: Part) -> ReportRow:
    amount = result.part("amount")
    amount.currency("currency")
    return row(result, COSTS, cost_usd=amount.number("value"))


def _report(name: str, path: str, group_by: tuple[str, ...], row_of: Callable[[Part], ReportRow]) -> Report:
    return Report(
        name=name,
        question=partial(_question, f"/v1/organization/{path}", group_by),
        page=lambda page: bucket_page(page, _day, row_of),
        says_tokens=name != "cost",
        says_cost=name == "cost",
    )


OPENAI = Provider(
    name="openai",
    url="https://api.openai.com",
    key_variable="OPENAI_ADMIN_KEY",
    key_kind="an admin key",
    headers=lambda key: {"authorization": f"Bearer {key}"},
    reports=(
        _report("usage", "usage/completions", COMPLETIONS, _completions),
        _report("embeddings", "usage/embeddings", EMBEDDINGS, _embeddings),
        _report("cost", "costs", COSTS, _costs),
    ),
)


PROJECT_LIMITS = {
    "max_requests_per_1_minute": "requests_minute",
    "max_requests_per_1_day": "requests_day",
    "max_tokens_per_1_minute": "tokens_minute",
    "max_images_per_1_minute": "images_minute",
    "max_audio_megabytes_per_1_minute": "audio_megabytes_minute",
    "batch_1_day_max_input_tokens": "batch_input_tokens_day",
}


def _project_limits(body: Mapping[str, Any]) -> BodySays:
    return BodySays(
        windows={
            f"{window}/{limits['model']}": said(limits, place, limit=name)
            for place, limits in objects(body, "data")
            if limits.get("object") == "project.rate_limit" and isinstance(limits.get("model"), str)
            for name, window in PROJECT_LIMITS.items()
            if limits.get(name) is not None
        }
    )


OPENAI_LIMITS = openai_limits(
    "openai",
    aliases=("codex",),
    body=_project_limits,
    refusals={"rate_limit_exceeded": True, "insufficient_quota": False},
)


def _sample(models: Sequence[str]) -> Sample | None:
    for model in CHEAPEST:
        if model in models:
            most = "max_tokens" if model.startswith("gpt-4") else "max_completion_tokens"
            body = {"model": model, most: 1, "messages": [{"role": "user", "content": "hi"}]}
            return Sample(model=model, path="/v1/chat/completions", body=body)
    return None


OPENAI_PROBE = openai_probe(
    OPENAI.url,
    sample=_sample,
    key_variable="OPENAI_API_KEY",
    url_variable="OPENAI_BASE_URL",
    admin_path="/v1/organization/projects/{project}/rate_limits?limit=100",
)
