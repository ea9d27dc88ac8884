"""Closing a period by command: final documents, what refuses it, and the proofs of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest
from typer.testing import CliRunner

from flows.__main__ import app
from flows.bill_period import bill_period
from flows.billing_cycle import billing_cycle
from flows.command import call, run
from tests.tasks.place import PERIOD, Place, event

if TYPE_CHECKING:
    from click.testing import Result

PLANS = """
[plans.metered]
retention_days = 30
reconcile = "traces"
rates = [{ line = "*", metric = "input_tokens", type = "per_unit", unit_amount = "0.001" }]

[plans.plain]
retention_days = 30
rates = [{ line = "*", metric = "input_tokens", type = "per_unit", unit_amount = "0.001" }]
"""


@pytest.fixture
def months(place: Place) -> Place:
    place.plans(PLANS)
    place.account("acme", "plain")
    place.account("zeta", "metered")
    place.add(event(idempotency_key="one"), event(), event("zeta", run_id="run"))
    return place


NEW_FILES = ["INV-000002.csv", "INV-000002.html", "INV-000002.json"]


def written(place: Place) -> list[str]:
    return sorted(path.name for path in (place.out / PERIOD / "invoices").iterdir())


def flows(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.usefixtures("_engine")
def test_a_month_is_closed_by_command(months: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(billing_cycle, period=PERIOD) == 0
    index = months.out / PERIOD / "index.html"
    assert capsys.readouterr().out == f"{index}\n"
    closed = flows("bill-period", "--period", PERIOD, "--final", "--actor", "finance")
    assert closed.exit_code == 1
    done, problem, _ = closed.stderr.split("\n")
    assert (
        done == "closed 1 accounts, INV-000001 to INV-000001; 0 have a period that is not over, 0 were created after it"
    )
    assert problem.startswith("error: 1 not billed: 'zeta': 1 runs differ, and nothing was decided of them: ")
    assert sorted(path.stem for path in (months.out / PERIOD / "invoices").glob("*.json")) == [
        "INV-000001",
        "zeta-2023-11",
    ]
    page = (months.out / PERIOD / "invoices" / "INV-000001.html").read_text()
    assert "INV-000001" in page
    assert "FINAL" in page
    assert "INV-000001" in index.read_text()
    forced = flows("bill-period", "--period", PERIOD, "--final", "--override", "traces were lost", "--actor", "finance")
    assert forced.exit_code == 0, forced.stderr
    assert months.ledger_rows("SELECT account, actor FROM closes ORDER BY close") == [
        ("acme", "finance"),
        ("zeta", "finance"),
    ]
    for subject in ("INV-000001", "INV-000002", "closes"):
        assert flows("verify", subject).stdout == f"{subject}: no differences\n"
    drafts = flows("verify", "invoice", "--period", PERIOD)
    assert drafts.stdout == "invoice: no differences\n"


def test_an_item_by_command(months: Place) -> None:
    months.close()
    said = flows("explain", "INV-000001", "v2/rates/0")
    assert said.exit_code == 0, said.stderr
    header, *rows = said.stdout.splitlines()
    assert header.startswith("event_id,kind,corrects,occurred_at,recorded_at,idempotency_key,")
    assert [row.split(",")[5] for row in rows] == ["one", ""]
    assert said.stderr.startswith("2 events of 2023-11, 2000 input_tokens: ")
    documents = [
        json.loads(line) for line in flows("explain", "INV-000001", "v2/rates/0", "--json").stdout.splitlines()
    ]
    assert [each["idempotency_key"] for each in documents] == ["one", None]
    other = flows("explain", "INV-000009", "v1/rates/0")
    assert (other.exit_code, other.stdout) == (1, "")
    assert other.stderr == "error: 'INV-000009' is not the number of a final document, such as INV-000001\n"


def test_other_prices_by_command(months: Place) -> None:
    months.aggregate()
    Path("new.toml").write_text(PLANS.replace("0.001", "0.002"))
    said = flows("rerate", "--plan", "new.toml", "--period", PERIOD, "--json")
    assert said.exit_code == 0, said.stderr
    rows: list[dict[str, Any]] = json.loads(said.stdout)
    assert [(row["account"], row["difference"]) for row in rows] == [
        ("acme", "2.00"),
        ("zeta", "1.00"),
        ("all 2", "3.00"),
    ]
    Path("typo.toml").write_text(PLANS.replace("plans.plain", "plans.plian"))
    unknown = flows("rerate", "--plan", "typo.toml", "--period", PERIOD)
    assert (unknown.exit_code, unknown.stdout) == (1, "")
    assert unknown.stderr == "error: plan: got 'plian', expected plans that the ledger has: metered, plain\n"
    Path("latin.toml").write_bytes("# für alle".encode("latin-1"))
    latin = flows("rerate", "--plan", "latin.toml", "--period", PERIOD)
    assert (latin.exit_code, latin.stdout) == (1, "")
    assert latin.stderr.startswith("error: plan: got 'latin.toml', expected a file in UTF-8 (")
    missing = flows("rerate", "--plan", "none.toml", "--period", PERIOD)
    assert (missing.exit_code, missing.stderr) == (1, "error: none.toml: No such file or directory\n")


def test_a_void_and_a_credit_note_by_command(months: Place) -> None:
    months.close()
    voided = flows("void", "INV-000001", "--reason", "wrong address")
    assert (voided.exit_code, voided.stdout) == (0, "INV-000002\n")
    assert written(months) == NEW_FILES
    assert flows("verify", "INV-000002").stdout == "INV-000002: no differences\n"
    refused = flows("credit", "INV-000001", "--reason", "x")
    assert refused.exit_code == 1
    assert refused.stderr == "error: INV-000001: was voided by INV-000002\n"
    empty = flows("void", "INV-000001", "--reason", "")
    assert empty.exit_code == 1
    assert empty.stderr.startswith("error: reason: got ''")


def test_a_credit_note_is_written_by_command(months: Place) -> None:
    months.close()
    [(one,)] = months.ledger_rows("SELECT event_id FROM events WHERE idempotency_key = 'one'")
    with months.meter() as meter:
        meter.correct(UUID(str(one)), billable=False, reason="twice")
    months.aggregate()
    credited = flows("credit", "INV-000001", "--reason", "billed twice")
    assert (credited.exit_code, credited.stdout) == (0, "INV-000002\n"), credited.stderr
    assert written(months) == NEW_FILES
    assert flows("verify", "INV-000002").stdout == "INV-000002: no differences\n"


def test_a_void_whose_files_cannot_be_written_is_told_by_number(months: Place) -> None:
    months.close()
    months.out.write_text("in the way")
    voided = flows("void", "INV-000001", "--reason", "wrong address")
    assert (voided.exit_code, voided.stdout) == (1, "INV-000002\n")
    assert voided.stderr.startswith(f"error: {months.out / PERIOD}")
    months.out.unlink()
    assert months.invoice() == []
    assert set(NEW_FILES) <= set(written(months))


@pytest.mark.parametrize("command", ["void", "credit"])
def test_who_voids_and_credits_has_a_name_of_some_length(months: Place, command: str) -> None:
    months.close()
    refused = flows(command, "INV-000001", "--reason", "x", "--actor", "a" * 300)
    assert refused.exit_code == 1
    assert refused.stderr.startswith("error: actor: got ")
    assert refused.stderr.endswith("expected 1 to 255 characters (got 300)\n")
    assert months.ledger_rows("SELECT count(*) FROM invoices") == [(1,)]


@pytest.mark.usefixtures("_engine")
def test_a_period_is_closed_by_the_flow_of_its_own(months: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    months.aggregate()
    said = ["bill_period", "--final", "--period", PERIOD, "--override", "traces were lost", "--actor", "finance"]
    monkeypatch.setattr(sys, "argv", said)
    with pytest.raises(SystemExit) as exited:
        run(bill_period)
    assert exited.value.code == 0
    assert [account for (account,) in months.ledger_rows("SELECT account FROM closes ORDER BY close")] == [
        "acme",
        "zeta",
    ]


def test_an_override_needs_a_close(months: Place) -> None:
    months.aggregate()
    said = flows("bill-period", "--period", PERIOD, "--override", "why not")
    assert said.exit_code == 1
    assert said.stderr == "error: override: got 'why not', expected nothing without `final`: a draft needs none\n"
