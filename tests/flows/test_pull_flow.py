"""Pulling reports as a job: whom it asks for which days, what it says, and when it fails."""

from __future__ import annotations

import json
import sys
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING, Any

import pytest

from flows import pull_reports as module
from flows.__main__ import app
from flows.command import call
from flows.pull_reports import NO_KEYS, pull_reports
from tests.metering.providers.pages import completions, openai_bucket, paged
from tests.tasks.report_server import KEY, ReportServer, status

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.tasks.place import Place


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ReportServer]:
    with ReportServer() as running:
        for name in ("OPENAI", "ANTHROPIC", "OPENROUTER"):
            monkeypatch.setenv(f"METERING_{name}_URL", running.url)
        yield running


def test_the_days_are_those_of_last_month_and_this_one_unless_said() -> None:
    now = datetime(2026, 3, 31, 23, tzinfo=UTC)
    assert module._days(None, None, now) == (date(2026, 2, 1), date(2026, 3, 31))
    assert module._days("2026-01-05", "2026-01-06", now) == (date(2026, 1, 5), date(2026, 1, 6))
    assert module._days(None, None, datetime(2026, 1, 1, tzinfo=UTC)) == (date(2025, 12, 1), date(2026, 1, 1))


@pytest.mark.usefixtures("_engine")
def test_the_flow(place: Place, server: ReportServer, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    assert call(pull_reports) == 0
    assert json.loads(capfd.readouterr().out) == {"skipped": NO_KEYS}
    monkeypatch.setenv("OPENAI_ADMIN_KEY", KEY)
    monkeypatch.setenv("ANTHROPIC_ADMIN_KEY", "sk-another")
    server.results["openai", "usage"][date(2023, 11, 2)] = [completions()]
    assert call(pull_reports, start="2023-11-01", end="2023-11-04") == 1
    out, err = capfd.readouterr()
    refused = "anthropic: refuses the key in ANTHROPIC_ADMIN_KEY (401): its reports need an admin key"
    assert (out, err) == ("", f"error: {refused}\n")
    assert call(pull_reports, provider="openai", start="2023-11-01", end="2023-11-05") == 0
    new = {"days": 1, "rows": 0, "unsaid": 0, "out_of_reach": 0}
    assert json.loads(capfd.readouterr().out) == {f"openai {name}": new for name in ("usage", "embeddings", "cost")}
    assert {provider for provider, _, _ in server.asked} == {"openai", "anthropic"}
    assert place.ledger_rows("SELECT day, report, input_tokens FROM provider_usage") == [
        ("2023-11-02", "usage", 27_444)
    ]
    assert call(pull_reports, provider="openrouter") == 1
    said = "error: OPENROUTER_MANAGEMENT_KEY: got None, expected a management key of openrouter\n"
    assert capfd.readouterr() == ("", said)
    for wrong, problem in (
        ({"provider": "azure"}, "provider: got 'azure', expected one of openai, anthropic, openrouter"),
        ({"start": "soon"}, "start: got 'soon', expected a day such as 2026-10-31"),
        ({"start": "2023-11-02", "end": "2023-11-02"}, "end: got '2023-11-02', expected a day after 2023-11-02"),
    ):
        assert call(pull_reports, **wrong) == 1
        assert capfd.readouterr() == ("", f"error: {problem}\n")
    server.broken = status(404)
    assert call(pull_reports, provider="openai", start="2023-10-01") == 1
    assert capfd.readouterr().err.count("answered 404 at ") == 3


def test_saved_answers_are_imported_by_command(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path = tmp_path / "page.json"
    path.write_text(json.dumps(paged(openai_bucket(completions()))))
    command = ["flows", "import-report", str(path), "--provider", "openai", "--report", "usage"]
    for words, code, out, err in (
        (command, 0, '{"days": 1, "rows": 1}\n', ""),
        ([*command, "--organization", "eu"], 0, '{"days": 1, "rows": 1}\n', ""),
        (
            [*command[:-1], "cost"],
            1,
            "",
            f"error: {path}: data[0].results[0].amount: got None, expected a JSON object\n",
        ),
    ):
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            app()
        assert (ended.value.code, *capsys.readouterr()) == (code, out, err)
    assert place.ledger_rows("SELECT organization FROM provider_pulls ORDER BY 1") == [("default",), ("eu",)]
