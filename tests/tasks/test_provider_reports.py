"""What providers report, into the ledger: over a network that fails, day by day, and from files."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
import threading
from datetime import UTC, date, datetime, timedelta
from email.utils import format_datetime
from typing import TYPE_CHECKING, Any

import pytest

from metering.errors import InvalidSetting
from metering.providers import PROVIDERS
from metering.settings import Settings
from tasks.asking import ATTEMPTS, FIRST_WAIT_S
from tasks.errors import ProviderError
from tasks.load import ROOT
from tasks.provider_reports import PROVISIONAL_DAYS, pull_report
from tests.metering.providers.pages import (
    activity,
    anthropic_cost,
    completions,
    embeddings,
    messages,
    openai_bucket,
    openai_cost,
    paged,
)
from tests.servers import wait_until
from tests.tasks.place import Place
from tests.tasks.pulls import DAYS, END, START, days, pulled, rows
from tests.tasks.report_server import KEY, ReportServer, cut, saying, status

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.conftest import Clock


@pytest.fixture
def server() -> Iterator[ReportServer]:
    """A month: of each day something else, and of some days nothing."""
    with ReportServer() as running:
        for number, day in enumerate(DAYS):
            openai = [completions(output_tokens=number), completions(model="gpt-4o-2024-08-06", batch=True)]
            said = {
                ("openai", "usage"): openai[: number % 3],
                ("openai", "embeddings"): [embeddings(input_tokens=number)],
                ("openai", "cost"): [openai_cost(number / 8), openai_cost("0.5", line_item="embeddings")],
                ("anthropic", "usage"): [messages(output_tokens=number), messages(service_tier="batch")][: number % 3],
                ("anthropic", "cost"): [anthropic_cost(f"{number}.5")],
            }
            for what, results in said.items():
                running.results[what][day] = results
        yield running


@pytest.fixture
def undisturbed(tmp_path: Path, empty_ledger: Path, server: ReportServer) -> list[tuple[Any, ...]]:
    """What a pull comes to that nothing happens to."""
    (tmp_path / "undisturbed").mkdir()
    (tmp_path / "undisturbed" / "ledger.db").write_bytes(empty_ledger.read_bytes())
    place = Place(tmp_path / "undisturbed")
    pulled(place, server)
    server.asked.clear()
    return rows(place)


def test_each_report_is_pulled_whole(place: Place, server: ReportServer) -> None:
    done = {
        (provider.name, report.name): pulled(place, server, provider.name, report.name)
        for provider in PROVIDERS.values()
        for report in provider.reports
    }
    whole = {"days": 30, "unsaid": 0, "out_of_reach": 0}
    assert done["openai", "usage"] == {**whole, "rows": 30}
    assert done["openai", "embeddings"] == {**whole, "rows": 30}
    assert done["openai", "cost"] == {**whole, "rows": 60}
    assert done["anthropic", "usage"] == {**whole, "rows": 30}
    assert done["anthropic", "cost"] == {**whole, "rows": 30}
    assert done["openrouter", "usage"] == {"days": 11, "rows": 0, "unsaid": 0, "out_of_reach": 19}
    sums = (
        "SELECT provider, report, sum(input_tokens), sum(cache_read_tokens), sum(output_tokens) FROM provider_usage "
        "WHERE report <> 'cost' GROUP BY provider, report ORDER BY provider, report"
    )
    assert place.ledger_rows(sums) == [
        ("anthropic", "usage", 30 * 3_200, 30 * 200, 145 + 155 + 10 * 500),
        ("openai", "embeddings", sum(range(30)), None, None),
        ("openai", "usage", 30 * 27_444, 30 * 8_448, 145 + 155 + 10 * 500),
    ]
    cost = "SELECT cost FROM provider_usage WHERE report = 'cost' AND day = '2023-11-04' ORDER BY provider, dimensions"
    assert place.ledger_rows(cost) == [("0.035",), ("0.5",), ("0.375",)]


def test_what_a_network_does_changes_nothing(
    place: Place, server: ReportServer, undisturbed: list[tuple[Any, ...]]
) -> None:
    server.days_per_page = 7
    server.faults.extend([status(429, retry_after="7"), status(500), None, cut, None, status(529), status(503), None])
    slept: list[float] = []
    pulled(place, server, slept=slept)
    assert slept == [7.0, 2 * FIRST_WAIT_S, FIRST_WAIT_S, FIRST_WAIT_S, 2 * FIRST_WAIT_S]
    assert rows(place) == undisturbed


@pytest.mark.parametrize("broken", [status(500), cut, status(429)])
def test_an_interrupted_pull_goes_on_where_it_was(
    either_url: str, tmp_path: Path, server: ReportServer, undisturbed: list[tuple[Any, ...]], broken: Any
) -> None:
    place = Place.at(tmp_path / "home", either_url)
    server.days_per_page = 7
    server.faults.extend([None, None])
    server.broken = broken
    slept: list[float] = []
    with pytest.raises(ProviderError, match=f"openai: .*, asked {ATTEMPTS} times"):
        pulled(place, server, slept=slept)
    assert len(slept) == ATTEMPTS - 1
    assert days(place) == [str(day) for day in DAYS[:14]]
    server.broken = None
    server.asked.clear()
    assert pulled(place, server) == {"days": 16, "rows": 17, "unsaid": 0, "out_of_reach": 0}
    assert server.days_asked() == ["2023-11-15", "2023-11-15page_2023-11-22", "2023-11-15page_2023-11-29"]
    assert rows(place) == undisturbed
    server.asked.clear()
    assert pulled(place, server)["days"] == 0
    assert server.asked == []


def test_a_killed_pull_goes_on_where_it_was(
    place: Place, server: ReportServer, undisturbed: list[tuple[Any, ...]]
) -> None:
    server.days_per_page = 1
    answered, held, released = random.Random(os.urandom(8)).randrange(30), threading.Event(), threading.Event()

    def hold(_: Any) -> None:
        held.set()
        released.wait(60)

    server.faults.extend([None] * answered)
    server.broken = hold
    script = (
        "import datetime, sys; from tasks.provider_reports import pull_report\n"
        f"pull_report.fn(sys.argv[1], 'openai', 'usage', {START!r}, {END!r})\n"
    )
    environ = {"METERING_OPENAI_URL": server.url, "OPENAI_ADMIN_KEY": KEY, "PATH": os.environ["PATH"]}
    with subprocess.Popen([sys.executable, "-c", script, place.ledger_url], cwd=ROOT, env=environ) as process:
        wait_until(held.is_set, f"page {answered}", 60)
        process.kill()
    released.set()
    assert days(place) == [str(day) for day in DAYS[:answered]]
    server.broken = None
    assert pulled(place, server)["days"] == 30 - answered
    assert rows(place) == undisturbed


def test_gaps_are_asked_for_and_nothing_else(place: Place, server: ReportServer) -> None:
    pulled(place, server, start=date(2023, 11, 5), end=date(2023, 11, 10))
    pulled(place, server, start=date(2023, 11, 20), end=date(2023, 11, 21))
    server.asked.clear()
    assert pulled(place, server)["days"] == 24
    assert server.days_asked() == ["2023-11-01", "2023-11-10", "2023-11-21"]


def test_the_newest_days_are_provisional_and_pulled_again(place: Place, server: ReportServer) -> None:
    now = datetime(2023, 11, 30, 11, tzinfo=UTC)
    assert pulled(place, server, now=now, end=date(2023, 11, 30))["days"] == 29
    provisional = "SELECT day FROM provider_pulls WHERE provisional ORDER BY day"
    newest = [str(day) for day in DAYS[29 - PROVISIONAL_DAYS : 29]]
    assert place.ledger_rows(provisional) == [(day,) for day in newest]
    changed, final = DAYS[27], DAYS[20]
    for day in (changed, final):
        server.results["openai", "usage"][day] = [completions(input_tokens=999_999, model="gpt-5")]
    server.asked.clear()
    assert pulled(place, server, now=now + timedelta(hours=1), end=date(2023, 11, 30))["days"] == PROVISIONAL_DAYS
    assert server.days_asked() == newest[:1]
    found = "SELECT day, model, input_tokens FROM provider_usage WHERE input_tokens = 999999"
    assert place.ledger_rows(found) == [(str(changed), "gpt-5", 999_999)]
    assert place.ledger_rows(f"SELECT count(*) FROM provider_usage WHERE day = '{changed}'") == [(1,)]
    assert pulled(place, server)["days"] == PROVISIONAL_DAYS + 1
    assert place.ledger_rows(provisional) == []


def test_a_day_without_usage_is_pulled(place: Place, server: ReportServer) -> None:
    assert pulled(place, server, end=date(2023, 11, 2)) == {"days": 1, "rows": 0, "unsaid": 0, "out_of_reach": 0}
    server.asked.clear()
    assert pulled(place, server, end=date(2023, 11, 2))["days"] == 0
    assert server.asked == []


def test_a_day_that_is_left_out_is_not_taken_for_one_without_usage(place: Place, server: ReportServer) -> None:
    server.faults.append(saying(paged(openai_bucket(day=DAYS[0]), openai_bucket(day=DAYS[2]))))
    assert pulled(place, server, end=date(2023, 11, 4)) == {"days": 2, "rows": 0, "unsaid": 1, "out_of_reach": 0}
    assert days(place) == ["2023-11-01", "2023-11-03"]


def test_openrouter_leaves_out_days_without_usage(place: Place, server: ReportServer) -> None:
    now = datetime(2023, 11, 10, 11, tzinfo=UTC)
    for day in (DAYS[3], DAYS[8], date(2023, 10, 5), now.date()):
        server.results["openrouter", "usage"][day] = [activity(day)]
    done = pulled(place, server, "openrouter", start=date(2023, 10, 1), now=now)
    assert done == {"days": 30, "rows": 2, "unsaid": 0, "out_of_reach": 31}
    assert days(place) == [str(date(2023, 10, 11) + timedelta(days=number)) for number in range(30)]
    assert place.ledger_rows("SELECT day, cost FROM provider_usage ORDER BY day") == [
        ("2023-11-04", "0.015"),
        ("2023-11-09", "0.015"),
    ]


@pytest.mark.parametrize("code", [401, 403])
@pytest.mark.parametrize(
    ("provider", "said"),
    [
        ("openai", "openai: refuses the key in OPENAI_ADMIN_KEY ({}): its reports need an admin key"),
        (
            "openrouter",
            "openrouter: refuses the key in OPENROUTER_MANAGEMENT_KEY ({}): its reports need a management key",
        ),
    ],
)
def test_a_key_that_is_refused_is_said_at_once(
    place: Place, server: ReportServer, code: int, provider: str, said: str
) -> None:
    server.faults.append(status(code, body=f'{{"error": {{"message": "Incorrect key {KEY}"}}}}'))
    slept: list[float] = []
    with pytest.raises(ProviderError) as caught:
        pulled(place, server, provider, slept=slept, now=datetime(2023, 11, 30, tzinfo=UTC))
    assert str(caught.value) == said.format(code)
    assert (len(server.asked), slept) == (1, [])


def test_what_will_not_be_better_is_said_at_once(place: Place, server: ReportServer) -> None:
    server.broken = status(400, body=f'{{"error":\n  "no such group, {KEY}"}}')
    with pytest.raises(
        ProviderError, match=r'answered 400 at /v1/organization/usage/completions: \{"error": "no such g'
    ):
        pulled(place, server)
    server.broken = status(302, location="http://elsewhere.example/")
    with pytest.raises(ProviderError, match=r"answered 302 at .*: nothing"):
        pulled(place, server)
    assert len(server.asked) == 2


def test_a_provider_that_wants_to_wait_longer_is_asked_by_the_next_run(place: Place, server: ReportServer) -> None:
    server.broken = status(429, retry_after="3412")
    slept: list[float] = []
    with pytest.raises(ProviderError, match="answered 429, asked once; it may be asked again in 3412 s"):
        pulled(place, server, slept=slept)
    assert slept == []


@pytest.mark.parametrize(
    ("said", "least", "most"),
    [
        (None, 1, 100),
        (format_datetime(datetime(2020, 1, 1, tzinfo=UTC), usegmt=True), 1, 1),
        ("Tue, 01 Jan 2019 00:00:00 -0000", 1, 1),
        ("soon", 1, 1),
        ("-5", 1, 1),
    ],
)
def test_retry_after_may_be_a_date_or_nonsense(
    place: Place, server: ReportServer, said: str | None, least: float, most: float
) -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    server.faults.append(status(429, retry_after=said or soon))
    slept: list[float] = []
    pulled(place, server, slept=slept)
    [waited] = slept
    assert least <= waited <= most


@pytest.mark.parametrize(
    ("page", "said"),
    [
        (
            paged(openai_bucket(completions(input_tokens=-1))),
            r"openai: usage report: data\[0\]\.results\[0\]\.input_tok",
        ),
        ("<html>", "openai: usage report: report: got .*<html>.*, expected JSON"),
    ],
)
def test_an_answer_that_cannot_be_read_is_said_and_nothing_written(
    place: Place, server: ReportServer, page: Any, said: str
) -> None:
    server.faults.append(saying(page))
    with pytest.raises(ProviderError, match=said):
        pulled(place, server)
    assert rows(place) == []


def test_a_day_on_two_pages_and_pages_without_end_are_refused(place: Place, server: ReportServer) -> None:
    server.broken = saying(paged(openai_bucket(completions(), day=START), next_page="again"))
    with pytest.raises(ProviderError, match="openai: has 2023-11-01 on two pages of one report"):
        pulled(place, server)
    assert days(place) == ["2023-11-01"]
    server.broken = saying(paged(next_page="more"))
    with pytest.raises(ProviderError, match="openai: has more pages than the 29 days from 2023-11-02"):
        pulled(place, server)


def test_a_provider_that_is_away(place: Place) -> None:
    with ReportServer() as gone:
        pass
    with pytest.raises(ProviderError, match=r"openai: did not answer \(ConnectError: .*\), asked 6 times"):
        pulled(place, gone)
    gone.url = "http://127.0.0.1:port"
    with pytest.raises(ProviderError, match=r"cannot be asked at 'http://127.0.0.1:port'"):
        pulled(place, gone)


def test_an_answer_that_was_asked_for_earlier_undoes_nothing(place: Place, server: ReportServer, clock: Clock) -> None:
    day = date(2023, 11, 2)

    def overtaken(handler: Any) -> None:
        server.results["openai", "usage"][START] = [completions()]
        clock.advance(minutes=1)
        pulled(place, server, end=day, clock=clock)
        clock.advance(minutes=1)
        saying(paged(openai_bucket(day=START)))(handler)

    server.faults.append(overtaken)
    assert pulled(place, server, end=day, clock=clock)["days"] == 0
    assert place.ledger_rows("SELECT count(*) FROM provider_usage") == [(1,)]


def test_no_key_in_errors_logs_settings_or_rows(
    place: Place, server: ReportServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for provider in PROVIDERS.values():
        monkeypatch.setenv(provider.key_variable, f" {KEY}\n")
        monkeypatch.setenv(f"METERING_{provider.name.upper()}_URL", server.url)
    assert KEY not in repr(Settings.from_env())
    assert pull_report.fn(place.ledger_url, "anthropic", "usage", START, END)["days"] == 30
    said = []
    for fault in (status(401, body=KEY), status(404, body=f"no {KEY} here"), saying({"data": KEY[:3]})):
        server.faults.append(fault)
        with pytest.raises(ProviderError) as caught:
            pull_report.fn(place.ledger_url, "openai", "usage", START, END)
        said.append(str(caught.value))
    assert "no ... here" in said[1]
    kept = repr(rows(place))
    assert "claude-sonnet-4" in kept
    for text in (*said, caplog.text, kept):
        assert KEY not in text


def test_without_a_key_it_is_said_which(place: Place) -> None:
    with pytest.raises(InvalidSetting, match="OPENAI_ADMIN_KEY: got None, expected an admin key of openai"):
        pull_report.fn(place.ledger_url, "openai", "usage", START, END)
