"""What providers report of a UTC day, into the ledger: asked of their APIs, or read from answers that were saved."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from prefect import task

from metering.clock import utc_now
from metering.errors import InvalidFile, InvalidReport, InvalidSetting
from metering.events import MAX_NAME
from metering.ledger import Ledger
from metering.ledger.schema import provider_pulls, provider_usage
from metering.providers import Page, ReportDay, provider_named
from metering.providers.reports import COUNTS, ONE_DAY, decode
from metering.settings import Settings
from tasks.asking import ask, client_for
from tasks.errors import ProviderError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from datetime import date
    from pathlib import Path

    from metering.providers import Provider, Report, ReportRow

__all__ = ["ORGANIZATION", "PROVISIONAL_DAYS", "import_reports", "pull", "pull_report"]

ORGANIZATION = "default"
"""Whose report it is, where nobody says: a key belongs to one organization."""

PROVISIONAL_DAYS = 3
"""A day that ended no longer ago than this may still change, and is asked for again. Anthropic's figures appear
"typically within 5 minutes", and a batch may run for 24 hours, as OpenAI's may, who does not say when a day is final.
"""


@task
def pull_report(ledger_url: str, provider: str, report: str, start: date, end: date) -> dict[str, int]:
    """See `pull`. The key comes from the settings, so that no run is told it."""
    settings = Settings.from_env()
    asked = provider_named(provider)
    key = settings.provider_keys.get(provider)
    if key is None:
        raise InvalidSetting(asked.key_variable, None, f"{asked.key_kind} of {provider}")
    url = settings.provider_urls.get(provider, asked.url)
    return pull(ledger_url, asked, asked.report(report), start, end, key=key, url=url)


def pull(
    ledger_url: str,
    provider: Provider,
    report: Report,
    start: date,
    end: date,
    *,
    key: str,
    url: str,
    clock: Callable[[], datetime] = utc_now,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, int]:
    """Pull a report for the UTC days from `start` to before `end` that are missing or provisional, page by page.

    Each page's days are one transaction, so what is interrupted goes on where it was. Returns how many `days` and
    `rows` were written, how many days are `unsaid` in the answers, and how many `out_of_reach` of the report. Raises
    `ProviderError`, and what opening the ledger raises.
    """
    first, after = report.reach(start, end, clock().date())
    done: dict[str, int] = {"days": 0, "rows": 0, "unsaid": 0}
    ledger = Ledger(ledger_url)
    try:
        with client_for(provider, key, url) as client:

            def answered(first: date, after: date, page: str | None) -> tuple[datetime, Page]:
                asked_at = clock()
                body = ask(client, report.question(first, after, page), provider, key, sleep)
                try:
                    return asked_at, report.page(decode(body))
                except InvalidReport as exc:
                    raise ProviderError(provider.name, f"{report.name} report: {exc}") from exc

            for days in _runs(_wanted(ledger, provider, report, first, after)):
                unsaid = set(days)
                for asked_at, page in _pages(answered, provider, days):
                    known = [day for day in page.days if day.day in unsaid]
                    unsaid -= {day.day for day in known}
                    if page.next_page is None and not report.says_empty_days:
                        known += [ReportDay(day=day, rows=()) for day in sorted(unsaid)]
                        unsaid = set()
                    _add(done, _write(ledger, provider, report, ORGANIZATION, known, asked_at))
                done["unsaid"] += len(unsaid)
    finally:
        ledger.close()
    return {**done, "out_of_reach": max(0, (end - start).days) - max(0, (after - first).days)}


def _pages(
    answered: Callable[[date, date, str | None], tuple[datetime, Page]], provider: Provider, days: Sequence[date]
) -> Iterator[tuple[datetime, Page]]:
    """The pages of a run of days, and when each was asked for.

    Raises `ProviderError` for pages without end, and for a day that is on two.
    """
    token = None
    had: set[date] = set()
    for _ in range(len(days) + 1):
        asked_at, page = answered(days[0], days[-1] + ONE_DAY, token)
        here = {day.day for day in page.days}
        if here & had:
            raise ProviderError(provider.name, f"has {min(here & had)} on two pages of one report")
        had |= here
        yield asked_at, page
        token = page.next_page
        if token is None:
            return
    raise ProviderError(provider.name, f"has more pages than the {len(days)} days from {days[0]} that it was asked for")


def _wanted(ledger: Ledger, provider: Provider, report: Report, first: date, after: date) -> list[date]:
    """The days that were never pulled, or whose report was provisional."""
    days = [first + timedelta(days=number) for number in range((after - first).days)]
    with ledger.read() as connection:
        settled = sa.select(provider_pulls.c.day).where(
            *_of(provider_pulls, provider, report, ORGANIZATION), sa.not_(provider_pulls.c.provisional)
        )
        known = set(connection.execute(settled).scalars())
    return [day for day in days if str(day) not in known]


def _runs(days: Sequence[date]) -> Iterator[list[date]]:
    """Days that follow each other, together: they are asked for at once."""
    gaps = [at for at, (day, following) in enumerate(pairwise(days), 1) if following - day > ONE_DAY]
    for begin, end in pairwise([0, *gaps, len(days)]):
        if begin < end:
            yield list(days[begin:end])


def import_reports(
    ledger_url: str,
    paths: Sequence[Path],
    provider: str,
    report: str,
    *,
    organization: str = ORGANIZATION,
    clock: Callable[[], datetime] = utc_now,
) -> dict[str, int]:
    """Import answers that were saved: a page, a list of pages, or a page a line. Each file is one transaction.

    A file was asked for when it was last changed: days that were pulled later than that stay as they are. So the same
    file twice changes nothing, and an old one undoes nothing. Returns how many `days` and `rows` were written. Raises
    `InvalidFile` and `InvalidSetting` before anything is written, and what opening the ledger raises.
    """
    reporter = provider_named(provider)
    asked = reporter.report(report)
    if not 1 <= len(organization) <= MAX_NAME or not organization.isprintable():
        raise InvalidSetting("organization", organization, f"1 to {MAX_NAME} printable characters")
    files = [(_days_in(path, asked), _changed_at(path, clock())) for path in paths]
    done = {"days": 0, "rows": 0}
    ledger = Ledger(ledger_url)
    try:
        for days, at in files:
            _add(done, _write(ledger, reporter, asked, organization, days, at))
    finally:
        ledger.close()
    return done


def _days_in(path: Path, report: Report) -> list[ReportDay]:
    days: dict[date, ReportDay] = {}
    for where, page in _saved(path):
        try:
            found = report.page(page).days
        except InvalidReport as exc:
            raise InvalidFile(path, f"{where}{exc}") from exc
        for day in found:
            if day.day in days:
                raise InvalidFile(path, f"{where}{day.day} was on a page before; expected each day once in a file")
            days[day.day] = day
    return list(days.values())


def _saved(path: Path) -> list[tuple[str, object]]:
    """The pages in a file, each with what an error calls its place."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as exc:
        raise InvalidFile(path, f"cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise InvalidFile(path, f"is not UTF-8: {exc}") from exc
    try:
        whole = decode(text)
    except InvalidReport as exc:
        return _lines(path, text, exc)
    pages = whole if isinstance(whole, list) else [whole]
    return [(f"page {number}: " if len(pages) > 1 else "", page) for number, page in enumerate(pages, 1)]


def _lines(path: Path, text: str, problem: InvalidReport) -> list[tuple[str, object]]:
    """A page a line. `problem` is what kept the whole from being one page."""
    pages: list[tuple[str, object]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                pages.append((f"line {number}: ", decode(line)))
            except InvalidReport as exc:
                raise InvalidFile(path, f"line {number}: {exc}" if pages else str(problem)) from exc
    if not pages:
        raise InvalidFile(path, str(problem))
    return pages


def _changed_at(path: Path, now: datetime) -> datetime:
    return min(datetime.fromtimestamp(path.stat().st_mtime, UTC), now)


def _write(
    ledger: Ledger, provider: Provider, report: Report, organization: str, days: Sequence[ReportDay], at: datetime
) -> dict[str, int]:
    """Replace days by what was reported of them at a time, but for those that were asked for later."""
    usage = _of(provider_usage, provider, report, organization)
    pulls = _of(provider_pulls, provider, report, organization)
    with ledger.write() as connection:
        later = sa.select(provider_pulls.c.day).where(*pulls, provider_pulls.c.pulled_at > at)
        newer = set(connection.execute(later).scalars())
        taken = {str(day.day): day for day in days if str(day.day) not in newer}
        connection.execute(provider_usage.delete().where(*usage, provider_usage.c.day.in_(taken)))
        connection.execute(provider_pulls.delete().where(*pulls, provider_pulls.c.day.in_(taken)))
        key = {"provider": provider.name, "organization": organization, "report": report.name}
        rows = [key | {"day": name} | _columns(row) for name, day in taken.items() for row in day.rows]
        if rows:
            connection.execute(provider_usage.insert(), rows)
        if taken:
            connection.execute(
                provider_pulls.insert(),
                [
                    key | {"day": name, "pulled_at": at, "provisional": _is_provisional(day.day, at)}
                    for name, day in taken.items()
                ],
            )
    return {"days": len(taken), "rows": len(rows)}


def _of(table: sa.Table, provider: Provider, report: Report, organization: str) -> tuple[sa.ColumnElement[bool], ...]:
    return (
        table.c.provider == provider.name,
        table.c.organization == organization,
        table.c.report == report.name,
    )


def _columns(row: ReportRow) -> dict[str, Any]:
    counts = {name: getattr(row.counts, name) for name in COUNTS}
    return {"dimensions": row.dimensions, "model": row.model, **counts, "cost": row.cost}


def _is_provisional(day: date, at: datetime) -> bool:
    return at.date() <= day + timedelta(days=PROVISIONAL_DAYS)


def _add(done: dict[str, int], more: dict[str, int]) -> None:
    for name, count in more.items():
        done[name] += count
