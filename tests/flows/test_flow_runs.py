"""The flows through Prefect's engine: composition, and what a run that fails leaves."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import get_current_settings

from flows.aggregate_usage import aggregate_usage
from flows.bill_period import bill_period
from flows.billing_cycle import billing_cycle
from flows.command import call
from flows.rebuild import rebuild
from flows.recost import recost
from metering.ledger import Ledger
from tasks import costs
from tests.servers import PostgresServer
from tests.tasks.place import NO_OTHERS, PERIOD, Place, event

pytestmark = pytest.mark.usefixtures("_engine")

RESALE = """
[plans.resale]
retention_days = 30
rates = [{ line = "*", type = "cost_plus", markup_percent = 20 }]
"""


def test_a_cycle_and_a_rebuild(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.account("acme")
    place.add(event(), event())
    assert call(billing_cycle, period=PERIOD) == 0
    index = place.out / PERIOD / "index.html"
    assert capsys.readouterr().out == f"{index}\n"
    files = place.files()
    place.warehouse.unlink()
    assert call(rebuild) == 0
    assert json.loads(capsys.readouterr().out) == {"costed": 0, "loaded": 2, "watermark": 2, **NO_OTHERS}
    place.bill()
    assert place.files() == files


def test_a_cycle_on_postgres_tells_prefect_no_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with PostgresServer(fsync=False, password="tell/no@one") as server:
        url = server.database()
        Ledger(url, create=True).close()
        place = Place.at(tmp_path / "home", url)
        monkeypatch.setenv("METERING_HOME", str(place.home))
        monkeypatch.setenv("METERING_LEDGER_URL", url)
        place.account("acme")
        place.add(event())
        assert call(billing_cycle, period=PERIOD) == 0
        assert place.invoices().keys() == {"acme"}
        watermark = place.newest()
        assert call(rebuild) == 0
        assert json.dumps({"costed": 0, "loaded": 1, "watermark": watermark, **NO_OTHERS}) in capfd.readouterr().out
        place.tamper("UPDATE load_watermark SET ledger_id = 'another'")
        assert call(aggregate_usage) == 1
    assert call(rebuild) == 1
    said = "".join(capfd.readouterr())
    assert "the warehouse was loaded from ledger another" in said
    assert "Connection refused" in said
    connection_url = get_current_settings().server.database.connection_url
    assert connection_url is not None
    kept = Path(connection_url.get_secret_value().partition(":///")[2])
    told = [path.read_bytes() for path in kept.parent.glob(f"{kept.name}*")]
    assert any(b"load_ledger" in data for data in told)
    for secret in ("tell/no@one", "tell%2Fno"):
        assert secret not in said
        assert not [data for data in told if secret.encode() in data]


def test_a_recost_says_what_changes_and_bills_follow_it(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place.plans(RESALE)
    place.account("acme", "resale")
    place.add(event())
    place.cycle()
    asked = {"period": PERIOD, "reason": "the provider's notice of May", "actor": "ann"}
    assert call(recost, **asked) == 0
    assert capsys.readouterr().out == "nothing changes\n"
    monkeypatch.setattr(costs, "provider_cost", lambda _: Decimal(5))
    monkeypatch.setattr(costs, "price_version", lambda: "later")
    assert call(recost, **asked, dry_run=True) == 0
    assert capsys.readouterr().out == "acme: 0.0028 -> 5 USD, 1 events costed anew\n"
    assert place.ledger_rows("SELECT * FROM recosts") == []
    assert call(recost, **asked) == 0
    assert capsys.readouterr().out == "acme: 0.0028 -> 5 USD, 1 events costed anew\n"
    place.cycle()
    assert place.invoices()["acme"].total == 6
    for said, problem in (
        ({"period": "May"}, "period: got 'May', expected a month such as 2026-10"),
        ({"reason": ""}, "reason: got '', expected 1 to 1000 characters (got 0)"),
        ({"actor": "a" * 256}, "expected 1 to 255 characters (got 256)"),
    ):
        assert call(recost, **{**asked, **said}) == 1
        assert problem in capsys.readouterr().err


def test_a_period_that_is_no_month_fails_before_anything_is_done(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(billing_cycle, period="2023-13") == 1
    assert capsys.readouterr() == ("", "error: period: got '2023-13', expected a month such as 2026-10\n")
    assert not place.warehouse.exists()


def test_accounts_that_cannot_be_billed_fail_the_run_after_the_others_are(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.plans(RESALE)
    place.account("bad", "resale")
    place.account("good", "resale")
    place.add(event("bad", model="mystery"), event("good"))
    place.aggregate()
    assert call(bill_period, period=PERIOD) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: 1 not billed: 'bad': plan 'resale': rates[0]")
    assert err.endswith(f"The others are, see {place.out / PERIOD / 'index.html'}\n")
    assert err.count("\n") == 1
    assert place.invoices().keys() == {"good"}
    with get_client(sync_client=True) as client:
        newest = max(client.read_flow_runs(), key=lambda run: run.created or run.expected_start_time)
    assert newest.state_name == "Failed"
