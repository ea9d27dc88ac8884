"""Anthropic: an organization's reports, and the rate limits that its answers carry.

Reports (https://platform.claude.com/docs/en/build-with-claude/usage-cost-api): `uncached_input_tokens` is without what
was read from and written to a cache. Amounts are decimal texts in cents: "123.45" is 1.2345 USD. Costs of the priority
tier are not in the cost report. Buckets without usage are there, with no results.

Limits (https://platform.claude.com/docs/en/api/rate-limits): resets are RFC 3339, those of a subscription's windows
(`unified_5h`, with what is used instead of counts) seconds since 1970. `tokens` is input and output together. The
priority tier's headers have no "ratelimit" in their names.

An admin key may ask for the organization's limits (https://platform.claude.com/docs/en/manage-claude/rate-limits-api),
without what remains: of each group of models that share one, named by the first of them, such as
`requests_minute/claude-opus-5`, and of what else is limited (`requests_minute/batch`).
"""

from __future__ import annotations

import re
from datetime import UTC, date, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from metering.providers.header_values import epoch, instant
from metering.providers.limit_bodies import objects, said
from metering.providers.limits import BodySays, LimitRule
from metering.providers.probes import ProbeRule, Sample
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

__all__ = ["ANTHROPIC", "ANTHROPIC_LIMITS", "ANTHROPIC_PROBE"]

VERSION = "2023-06-01"
MESSAGES = ("model", "workspace_id", "service_tier", "context_window")
COST_GROUPS = ("workspace_id", "description")
COSTS = (*COST_GROUPS, "model", "cost_type", "token_type", "service_tier", "context_window")
"""Grouping by description fills in all of these."""

CENT = -2


def _question(path: str, group_by: tuple[str, ...], start: date, end: date, page: str | None) -> Question:
    return Question(
        path=path,
        params=(
            ("starting_at", f"{start}T00:00:00Z"),
            ("ending_at", f"{end}T00:00:00Z"),
            ("bucket_width", "1d"),
            ("limit", str(DAYS_PER_PAGE)),
            *(("group_by[]", name) for name in group_by),
            *([] if page is None else [("page", page)]),
        ),
    )


def _day(bucket: Part) -> date:
    return day_from(bucket, "starting_at", _time(bucket, "starting_at"), _time(bucket, "ending_at"))


def _time(bucket: Part, name: str) -> datetime:
    said = bucket.text(name)
    try:
        time = datetime.fromisoformat(said or "")
        if time.tzinfo is not None:
            return time.astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    raise bucket.refused(name, said, "a time with an offset, as in RFC 3339")


def _messages(result: Part) -> ReportRow:
    written = result.part("cache_creation")
    write_1h = written.count("ephemeral_1h_input_tokens")
    write = written.count("ephemeral_5m_input_tokens") + write_1h
    read = result.count("cache_read_input_tokens")
    counts = Counts(
        input_tokens=result.count("uncached_input_tokens") + read + write,
        cache_read_tokens=read,
        cache_write_tokens=write,
        cache_write_1h_tokens=write_1h,
        output_tokens=result.count("output_tokens"),
    )
    return row(result, MESSAGES, counts=counts)


def _costs(result: Part) -> ReportRow:
    result.currency("currency")
    return row(result, COSTS, cost_usd=result.number("amount").scaleb(CENT))


def _report(name: str, path: str, group_by: tuple[str, ...], row_of: Callable[[Part], ReportRow]) -> Report:
    return Report(
        name=name,
        question=partial(_question, f"/v1/organizations/{path}", group_by),
        page=lambda page: bucket_page(page, _day, row_of),
        says_tokens=name != "cost",
        says_cost=name == "cost",
    )


ANTHROPIC = Provider(
    name="anthropic",
    url="https://api.anthropic.com",
    key_variable="ANTHROPIC_ADMIN_KEY",
    key_kind="an admin key",
    headers=lambda key: {"x-api-key": key, "anthropic-version": VERSION},
    reports=(
        _report("usage", "usage_report/messages", MESSAGES, _messages),
        _report("cost", "cost_report", COST_GROUPS, _costs),
    ),
)


def _reset(text: str, _now: datetime, _parts: Mapping[str, str]) -> datetime:
    return epoch(text) if text[:10].isdigit() else instant(text)


def _organization_limits(body: Mapping[str, Any]) -> BodySays:
    windows = {}
    for place, group in objects(body, "data"):
        if group.get("type") != "rate_limit":
            continue
        models = group.get("models")
        what = models[0] if isinstance(models, list) and models else group.get("group_type")
        for limit_place, limit in objects(group, "limits", place=f"{place}."):
            kind = limit.get("type")
            if isinstance(kind, str) and isinstance(what, str):
                window = kind.replace("_per_", "_")
                windows[f"{window}/{what}"] = said(limit, limit_place, limit="value")
    return BodySays(windows=windows)


ANTHROPIC_LIMITS = LimitRule(
    provider="anthropic",
    aliases=("claude",),
    prefixes=("anthropic-ratelimit-", "anthropic-priority-"),
    header=re.compile(
        r"anthropic-(?:ratelimit-|(?=priority-))(?P<window>[a-z0-9-]+)-(?P<part>limit|remaining|reset|utilization)"
    ),
    body=_organization_limits,
    reset=_reset,
    refusals={"rate_limit_error": True},
)


def _sample(models: Sequence[str]) -> Sample | None:
    for family in ("haiku", "sonnet", "opus"):
        for model in models:
            if family in model:
                body = {"model": model, "max_tokens": 1, "messages": [{"role": "user", "content": "hi"}]}
                return Sample(model=model, path="/v1/messages", body=body)
    return None


ANTHROPIC_PROBE = ProbeRule(
    url=ANTHROPIC.url,
    headers=ANTHROPIC.headers,
    models_path="/v1/models?limit=1000",
    models_in=("data", "id"),
    sample=_sample,
    key_variable="ANTHROPIC_API_KEY",
    url_variable="ANTHROPIC_BASE_URL",
    admin_path="/v1/organizations/rate_limits",
)
