"""Saved answers of providers' report APIs, into the ledger."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from metering.errors import InvalidFile, InvalidSetting
from tasks.provider_reports import import_reports
from tests.metering.providers.pages import anthropic_bucket, completions, openai_bucket, paged
from tests.tasks.pulls import DAYS, NOW, START, pulled, rows
from tests.tasks.report_server import ReportServer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.tasks.place import Place

PAGES = [
    paged(openai_bucket(completions(), day=START), openai_bucket(day=DAYS[1]), next_page="page_2"),
    paged(openai_bucket(completions(), completions(batch=True), day=DAYS[2])),
]
SHAPES: dict[str, Callable[[list[Any]], str]] = {
    "list": json.dumps,
    "lines": lambda pages: "\n".join(map(json.dumps, pages)) + "\n\n",
    "indented": lambda pages: "\ufeff" + json.dumps(pages, indent=2),
}


def saved(path: Path, text: str, *, at: datetime = NOW) -> Path:
    path.write_text(text)
    os.utime(path, (at.timestamp(), at.timestamp()))
    return path


def imported(place: Place, *paths: Path, **said: Any) -> dict[str, int]:
    return import_reports(place.ledger_url, paths, "openai", "usage", clock=lambda: NOW + timedelta(days=1), **said)


@pytest.mark.parametrize("shape", SHAPES)
def test_files_are_the_same_as_answers(place: Place, tmp_path: Path, shape: str) -> None:
    path = saved(tmp_path / "pages.json", SHAPES[shape](PAGES))
    assert imported(place, path) == {"days": 3, "rows": 3}
    before = place.ledger_rows("SELECT * FROM provider_pulls"), rows(place)
    assert imported(place, path) == {"days": 3, "rows": 3}
    assert (place.ledger_rows("SELECT * FROM provider_pulls"), rows(place)) == before
    with ReportServer() as server:
        assert pulled(place, server, end=DAYS[3]) == {"days": 0, "rows": 0, "unsaid": 0, "out_of_reach": 0}


def test_a_page_a_file(place: Place, tmp_path: Path) -> None:
    paths = [saved(tmp_path / f"page{number}.json", json.dumps(page)) for number, page in enumerate(PAGES)]
    assert imported(place, *paths) == {"days": 3, "rows": 3}


def test_a_file_is_as_old_as_its_last_change(place: Place, tmp_path: Path) -> None:
    soon = datetime(2023, 11, 3, 1, tzinfo=UTC)
    imported(place, saved(tmp_path / "new.json", json.dumps(PAGES), at=NOW))
    before = rows(place)
    changed = [paged(openai_bucket(day=START))]
    assert imported(place, saved(tmp_path / "old.json", json.dumps(changed), at=soon)) == {"days": 0, "rows": 0}
    assert rows(place) == before
    assert (
        imported(place, saved(tmp_path / "old.json", json.dumps(changed), at=soon), organization="other")["days"] == 1
    )
    provisional = "SELECT organization, provisional FROM provider_pulls WHERE day = '2023-11-01' ORDER BY 1"
    assert [(name, bool(flag)) for name, flag in place.ledger_rows(provisional)] == [
        ("default", False),
        ("other", True),
    ]
    future = saved(tmp_path / "future.json", json.dumps(changed), at=datetime(2099, 1, 1, tzinfo=UTC))
    assert imported(place, future)["days"] == 1
    assert place.ledger_rows("SELECT max(pulled_at) FROM provider_pulls") == [("2023-12-21T11:00:00.000000Z",)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"bad\.json: report: got '', expected JSON"),
        ("{\n}", "data: got None, expected a list"),
        ('{\n"data": [}', "expected JSON .*byte 11"),
        ('{"data": []}\n[', r"line 2: report: got '\[', expected JSON"),
        (json.dumps([*PAGES, {"data": [1]}]), r"page 3: data\[0\]: got 1"),
        (json.dumps([*PAGES, PAGES[0]]), "page 3: 2023-11-01 was on a page before; expected each day once"),
        (
            json.dumps(paged(anthropic_bucket())),
            r"data\[0\]\.start_time: got None, expected a count; names seen: start",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_named_and_nothing_is_written(
    place: Place, tmp_path: Path, text: str, said: str
) -> None:
    good = saved(tmp_path / "good.json", json.dumps(PAGES))
    with pytest.raises(InvalidFile, match=said):
        imported(place, good, saved(tmp_path / "bad.json", text))
    assert rows(place) == []


def test_files_that_are_not_there_or_no_text(place: Place, tmp_path: Path) -> None:
    with pytest.raises(InvalidFile, match="nowhere: cannot be read: No such file"):
        imported(place, tmp_path / "nowhere")
    (tmp_path / "binary").write_bytes(b"\xff")
    with pytest.raises(InvalidFile, match="binary: is not UTF-8"):
        imported(place, tmp_path / "binary")
    with pytest.raises(InvalidSetting, match="organization: got '', expected 1 to 255 printable characters"):
        imported(place, organization="")
