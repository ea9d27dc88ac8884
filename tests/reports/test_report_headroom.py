from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from metering.errors import KeyRefused, ProviderLimited
from metering.providers import LimitWindow
from metering.providers.forecast import Reading, window_states
from metering.providers.probes import ProviderStatus
from metering.providers.showing import duration_text, status_rows
from reports.headroom import headroom_html

END = datetime(2026, 3, 12, 12, tzinfo=UTC)
START = END - timedelta(days=1)
HOSTILE = "<script>alert('x')</script>"
HOUR_MS = 3_600_000


def words_of(html: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", html[html.index("<body>") :]).split())


def status(**said: Any) -> ProviderStatus:
    values = {"provider": "openai", "account_key": "prod", "checked_at": END, "reachable": True, "models": ("a", "b")}
    return ProviderStatus(**{**values, **said})


def window(limit: int | None, remaining: int | None, **said: Any) -> LimitWindow:
    percent = None if limit is None or remaining is None else 100 * (limit - remaining) / limit
    return LimitWindow(limit=limit, remaining=remaining, percent_used=percent, **said)


def reading(hours: float, percent: int, remaining: int) -> Reading:
    return Reading(
        checked_at=END - timedelta(hours=hours),
        limit=Decimal(1_000),
        remaining=Decimal(remaining),
        percent_used=Decimal(percent),
        reset_at=END + timedelta(hours=20),
    )


STATUSES = [
    status(windows={"tokens": window(1_000, 100, reset_in_ms=20 * HOUR_MS), "requests": window(None, 7)}),
    status(account_key="claude", provider="anthropic", error=KeyRefused("anthropic", "invalid key: answered 401")),
    status(
        account_key=HOSTILE,
        error=ProviderLimited("openai", "answered 429: a rate limit is reached"),
        retry_after_s=12.5,
        windows={"tokens": window(1_000, 0)},
    ),
    status(account_key="llama", provider="ollama", models=(), warnings=("a: what", "b: why")),
]
HISTORY = {("prod", "openai", "tokens"): [reading(24, 10, 900), reading(12, 50, 500)]}
STATES = window_states(STATUSES, HISTORY)


def test_rows_for_a_table() -> None:
    shown = [tuple(row.values()) for row in status_rows(STATUSES, STATES)]
    assert shown == [
        ("prod", "openai", "tokens", 1_000, 100, "90.0%", "20h 0m", "3h 0m", None),
        ("prod", "openai", "requests", None, 7, None, None, None, None),
        ("claude", "anthropic", *[None] * 6, "anthropic: invalid key: answered 401"),
        (
            HOSTILE,
            "openai",
            "tokens",
            1_000,
            0,
            "100.0%",
            None,
            "0s",
            "openai: answered 429: a rate limit is reached; to be asked again in 12.5 s",
        ),
        ("llama", "ollama", *[None] * 6, "a: what (and 1 more)"),
    ]


def test_the_page() -> None:
    html = headroom_html(STATUSES, STATES, start=START, end=END)
    words = words_of(html)
    assert "As of 2026-03-12 12:00 UTC. Lines show what was left in percent since 2026-03-11 12:00" in words
    assert "Credentials 4 Failed probes 1 Windows at 80% or more 2" in words
    assert "prod openai, 2 models" in words
    assert "tokens 1,000 100 90.0% 20h 0m 3h 0m" in words
    assert "anthropic: invalid key: answered 401" in words
    assert 'aria-label="Headroom of tokens, at the least 10.0%"' in html
    assert '<polyline points="0.0,4.0 120.0,20.0 240.0,36.0"/>' in html
    assert html.count("<polyline ") == 1  # the others have no past
    assert HOSTILE not in html
    assert html == headroom_html(STATUSES, STATES, start=START, end=END)
    for loaded in ("http://", "https://", "src=", "@import"):
        assert loaded not in html


def test_what_lies_before_the_page_is_not_drawn() -> None:
    states = window_states(STATUSES[:1], {("prod", "openai", "tokens"): [reading(30, 1, 990)]})
    assert "<polyline" not in headroom_html(STATUSES[:1], states, start=START, end=END)


def test_nothing_is_configured() -> None:
    assert "No credential is configured." in words_of(headroom_html([], [], start=START, end=END))


def test_durations() -> None:
    spoken = [duration_text(timedelta(seconds=seconds)) for seconds in (-5, 0, 59.4, 59.6, 360, 7_500, 273_600)]
    assert spoken == ["0s", "0s", "59s", "1m 0s", "6m 0s", "2h 5m", "3d 4h"]
