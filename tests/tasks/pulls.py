"""Pulls of a month, and what is in the ledger after them."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any

from metering.providers import PROVIDERS
from tasks.provider_reports import pull
from tests.tasks.report_server import KEY

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.tasks.place import Place
    from tests.tasks.report_server import ReportServer

START, END = date(2023, 11, 1), date(2023, 12, 1)
NOW = datetime(2023, 12, 20, 11, tzinfo=UTC)
DAYS = [START + timedelta(days=number) for number in range(30)]


def pulled(
    place: Place,
    server: ReportServer,
    provider: str = "openai",
    report: str = "usage",
    *,
    start: date = START,
    end: date = END,
    now: datetime = NOW,
    clock: Callable[[], datetime] | None = None,
    key: str = KEY,
    slept: list[float] | None = None,
) -> dict[str, int]:
    asked = PROVIDERS[provider]
    sleep = (lambda _: None) if slept is None else slept.append
    return pull(
        place.ledger_url,
        asked,
        asked.report(report),
        start,
        end,
        key=key,
        url=server.url,
        clock=clock or (lambda: now),
        sleep=sleep,
    )


def rows(place: Place) -> list[tuple[Any, ...]]:
    """All that is known of reports, but for when it was pulled."""
    usage = place.ledger_rows("SELECT * FROM provider_usage ORDER BY provider, organization, report, day, dimensions")
    pulls = place.ledger_rows(
        "SELECT provider, organization, report, day, provisional FROM provider_pulls ORDER BY 1, 2, 3, 4"
    )
    return [*usage, *pulls]


def days(place: Place) -> list[str]:
    return [day for (day,) in place.ledger_rows("SELECT day FROM provider_pulls ORDER BY day")]
