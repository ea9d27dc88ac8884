"""Reconciling through Prefect's engine, and booking what it proposes by command."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from typer.testing import CliRunner

from flows.__main__ import app
from flows.billing_cycle import billing_cycle
from flows.command import call
from flows.reconcile_tokens import months_of, reconcile_tokens
from metering.events import TokenUsage
from tests.tasks.place import PERIOD, Place
from tests.tasks.runs import PLANS, Runs

pytestmark = pytest.mark.usefixtures("_engine")


def artifact(key: str) -> str:
    with get_client(sync_client=True) as client:
        found = [one for one in client.read_artifacts() if one.key == key]
    return str(max(found, key=lambda one: one.created).data)


def test_what_differs_is_proposed_booked_and_gone(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.plans(PLANS.replace('"traces"', '"provider"'))
    place.account("acme", "metered")
    runs = Runs(place)
    for run_id in ("fine", "twice", "twice", "untold"):
        runs.bill(run_id)
    for run_id in ("fine", "twice", "never"):
        runs.trace(run_id)
    assert call(reconcile_tokens, period=PERIOD) == 0
    ((month, said),) = json.loads(capsys.readouterr().out).items()
    page = Path(said.pop("page"))
    assert (month, said) == (
        PERIOD,
        {
            "reconciliation": 1,
            "double-counted": 1,
            "matched": 1,
            "unbilled": 1,
            "untraced": 1,
            "provider_days": 0,
            "provider_days_off": 0,
        },
    )
    assert {path.name for path in page.parent.iterdir()} == {
        "corrections.csv",
        "corrections.json",
        "invoices",
        "providers.csv",
        "reconciliation.csv",
        "reconciliation.html",
    }
    assert "python -m flows reconcile apply 1" in artifact(f"reconciliation-{PERIOD}-summary")
    assert "no day of it was pulled" in page.read_text()
    assert {row["run"] for row in json.loads(artifact(f"reconciliation-{PERIOD}"))} == {"twice", "never", "untold"}

    runs.bill("untold", TokenUsage(input_tokens=1))
    booked = CliRunner().invoke(app, ["reconcile", "apply", "1", "--actor", "finance"])
    assert booked.exit_code == 1
    assert json.loads(booked.stdout) == {"booked": 2, "booked_before": 0, "refused": 1}
    assert booked.stderr == ("run 'untold' of account 'acme': it has changed since it was judged; reconcile again\n")
    # The plan asks for it, so the billing cycle reconciles before it bills.
    assert call(billing_cycle, period=PERIOD) == 0
    assert "unbilled" not in artifact(f"reconciliation-{PERIOD}-summary")
    assert place.invoices()["acme"].requests == 5
    assert CliRunner().invoke(app, ["reconcile", "apply", "2"]).exit_code == 0
    assert place.ledger_rows("SELECT count(*) FROM verdicts WHERE applied_at IS NULL") == [(1,)]
    missing = CliRunner().invoke(app, ["reconcile", "apply", "9"])
    assert (missing.exit_code, missing.stderr) == (1, "error: reconciliation 9 is not in the ledger\n")


def test_what_cannot_be_is_said(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, message in (
        ({"tolerance_tokens": -1}, "tolerance_tokens: got -1, expected 0 to 2147483647"),
        ({"tolerance_tokens": "some"}, "tolerance_tokens: Input should be a valid integer"),
        ({"tolerance_percent": "101"}, "tolerance_percent: got '101', expected a number from 0 to 100"),
        ({"tolerance_percent": "NaN"}, "tolerance_percent: got 'NaN', expected a number from 0 to 100"),
        ({"period": "2023-13"}, "period: got '2023-13', expected a month such as 2026-10"),
    ):
        assert call(reconcile_tokens, **wrong) == 1
        assert message in capsys.readouterr().err
    assert place.ledger_rows("SELECT count(*) FROM reconciliations") == [(0,)]


def test_unless_said_last_month_and_this_one_are_reconciled() -> None:
    new_year = datetime(2024, 1, 1, tzinfo=UTC)
    assert months_of(None, new_year) == ["2023-12", "2024-01"]
    assert months_of("2023-11", new_year) == ["2023-11"]
