"""Which month is billed, where, and what is said when that cannot be."""

from __future__ import annotations

import errno
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.__main__ import app
from flows.command import call
from flows.places import Places, billed_month
from metering.errors import InvalidSetting, SchemaMismatch, StoreUnavailable
from tasks.errors import AccountsNotBilled, WarehouseError
from tests.tasks.place import PERIOD, Place, event

NOW = datetime(2024, 1, 31, 23, 59, tzinfo=UTC)


def test_without_a_period_last_month_is_billed() -> None:
    assert billed_month(None, NOW) == "2023-12"
    assert billed_month(None, datetime(2024, 3, 1, tzinfo=UTC)) == "2024-02"
    assert billed_month("2023-11", NOW) == "2023-11"


@pytest.mark.parametrize("period", ["", "2023-13", "2023-1", "november", "2023-11-01", "0000-01"])
def test_a_period_that_is_no_month_is_refused(period: str) -> None:
    with pytest.raises(InvalidSetting, match=rf"period: got '{period}', expected a month such as 2026-10"):
        billed_month(period, NOW)


def test_a_ledger_that_cannot_be_used_is_said(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Places.from_env().ledger_url == place.ledger_url
    place.ledger.unlink()
    with pytest.raises(StoreUnavailable, match="tallystick init"):
        Places.from_env()
    place.ledger.touch()
    with pytest.raises(SchemaMismatch, match="tallystick init"):
        Places.from_env()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (WarehouseError("two\nlines"), "error: two lines\n"),
        (InvalidSetting("period", "x", "a month"), "error: period: got 'x', expected a month\n"),
        (OSError(errno.ENOSPC, "No space left on device", "/out"), "error: /out: No space left on device\n"),
        (OSError("no disk"), "error: no disk\n"),
        (
            AccountsNotBilled([("acme", "two rates"), ("b", "no price")], Path("/out/index.html")),
            "error: 2 not billed: 'acme': two rates; 'b': no price. The others are, see /out/index.html\n",
        ),
    ],
)
def test_an_error_is_one_line(capsys: pytest.CaptureFixture[str], error: Exception, said: str) -> None:
    def job() -> None:
        raise error

    assert call(job) == 1
    assert capsys.readouterr() == ("", said)


def test_many_that_are_not_billed_are_counted() -> None:
    error = AccountsNotBilled([(f"a{number}", "no price") for number in range(7)], Path("/index.html"))
    assert str(error).startswith("7 not billed: 'a0': no price; ")
    assert "'a4': no price; and 2 more. The others" in str(error)


def test_a_defect_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        call(lambda: 1 // 0)


def test_verify_says_what_differs(place: Place) -> None:
    place.account("acme")
    place.add(event())
    place.cycle()
    run = CliRunner().invoke
    for subject in ("rollups", "invoice"):
        same = run(app, ["verify", subject, "--period", PERIOD])
        assert (same.exit_code, same.output) == (0, f"{subject}: no differences\n")
    next(place.out.rglob("*.csv")).unlink()
    differs = run(app, ["verify", "invoice", "--period", PERIOD])
    assert (differs.exit_code, differs.output) == (1, "acme-2023-11.csv: is missing\n")
    wrong = run(app, ["verify", "invoice", "--period", "2023"])
    assert (wrong.exit_code, wrong.output) == (1, "error: period: got '2023', expected a month such as 2026-10\n")
