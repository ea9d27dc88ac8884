"""Daily, before bills are made: what the providers report of last month and of this one, as far as it is known."""

from __future__ import annotations

from datetime import date, datetime, timedelta
from typing import Any

from prefect import flow
from prefect.states import Completed

from flows.command import run
from flows.places import Places
from metering.clock import utc_now
from metering.errors import InvalidSetting
from metering.providers import PROVIDERS, provider_named
from metering.settings import Settings
from tasks.errors import JobError, ProviderError
from tasks.provider_reports import pull_report

__all__ = ["pull_reports"]

NO_KEYS = (
    f"none of {', '.join(provider.key_variable for provider in PROVIDERS.values())} is set: there is no provider to ask"
)


@flow
def pull_reports(provider: str | None = None, start: str | None = None, end: str | None = None) -> Any:
    """Pull every report of each provider whose key is set, or of one provider.

    `start` is the first UTC day, the first of last month unless said; `end` the first day that is not asked for, today
    unless said. Days that were pulled and are settled are not asked for again. Returns what became of each report, and
    raises `JobError` where one could not be had; the others are pulled then.
    """
    first, after = _days(start, end, utc_now())
    keys = Settings.from_env().provider_keys
    if provider is None and not keys:
        return Completed(message=NO_KEYS, data={"skipped": NO_KEYS})
    places = Places.from_env()
    asked = (
        [each for name, each in PROVIDERS.items() if name in keys] if provider is None else [provider_named(provider)]
    )
    done: dict[str, dict[str, int]] = {}
    problems: list[str] = []
    for each in asked:
        for report in each.reports:
            try:
                done[f"{each.name} {report.name}"] = pull_report(
                    places.ledger_url, each.name, report.name, first, after
                )
            except ProviderError as exc:
                problems.append(str(exc))
    if problems:
        raise JobError("; ".join(dict.fromkeys(problems)))
    return done


def _days(start: str | None, end: str | None, now: datetime) -> tuple[date, date]:
    """The half-open range of UTC days. Raises `InvalidSetting`."""
    last_month = (now.replace(day=1) - timedelta(days=1)).replace(day=1)
    first = last_month.date() if start is None else _day("start", start)
    after = now.date() if end is None else _day("end", end)
    if after <= first:
        raise InvalidSetting("end", str(after), f"a day after {first}")
    return first, after


def _day(name: str, value: str) -> date:
    try:
        return date.fromisoformat(value)
    except ValueError:
        raise InvalidSetting(name, value, "a day such as 2026-10-31") from None


if __name__ == "__main__":
    run(pull_reports)
