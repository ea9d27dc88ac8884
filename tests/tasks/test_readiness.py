"""What speaks against closing a period, and that an override closes it all the same, with who and why."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from metering.billing.reconciliation import Tolerance
from metering.drain import Drain
from metering.events import TokenUsage, new_event_id
from metering.ledger import Ledger
from metering.ledger.schema import dead_letters, provider_pulls
from metering.meter import Meter
from metering.spool import Spool
from tasks.reconcile import reconcile_runs
from tasks.reconciled import apply_reconciliation
from tests.servers import RedisServer
from tests.tasks.place import NOVEMBER, PERIOD, Place, event

if TYPE_CHECKING:
    from tests.tasks.place import Closed

PLANS = """
[plans.plain]
retention_days = 30

[plans.traced]
retention_days = 30
reconcile = "traces"

[plans.reported]
retention_days = 30
reconcile = "provider"
"""
CLOSED_AT = datetime(2023, 12, 6, tzinfo=UTC)


def refused(closed: Closed) -> dict[str, str]:
    return dict(closed.refused)


@pytest.fixture
def plain(place: Place) -> Place:
    place.plans(PLANS)
    place.account("acme", "plain")
    place.add(event())
    return place


def test_what_is_not_loaded(plain: Place) -> None:
    plain.aggregate()
    plain.add(event(), event())
    assert refused(plain.close_loaded(PERIOD)) == {"acme": "2 events are not loaded: `python -m flows aggregate-usage`"}
    plain.cost()
    assert "2 events are not loaded" in refused(plain.close_loaded(PERIOD))["acme"]
    assert plain.close().accounts == 1


def letter(place: Place, position: str, **said: Any) -> None:
    row = {"position": position, "shard": 1, "noticed_at": CLOSED_AT, "error": "?", "header": b"", "body": b"", **said}
    with closing(Ledger(place.ledger_url)) as ledger, ledger.write() as connection:
        connection.execute(dead_letters.insert().values(**row))


def test_dead_letters_that_are_open(plain: Place) -> None:
    plain.account("zeta", "plain")
    letter(plain, "1-1", account="acme", period=PERIOD)
    letter(plain, "1-2", account="acme", period=PERIOD, resolved_at=CLOSED_AT)
    letter(plain, "1-3", account="acme", period="2023-12")
    closed = plain.close()
    assert refused(closed) == {"acme": "1 dead letters are open: `tallystick doctor`"}
    assert closed.accounts == 1
    letter(plain, "1-4")  # nobody knows whose it is, and when
    assert refused(plain.close()) == {"acme": "2 dead letters are open: `tallystick doctor`"}


def test_what_waits_in_the_spool(plain: Place) -> None:
    folder = plain.home / "spool"
    reason = f"the spool {folder} has what was recorded before its end: `tallystick drain`"
    with closing(Spool(folder, clock=lambda: NOVEMBER)) as waiting:
        waiting.append("settle", new_event_id(), b"{}")
        assert refused(plain.close()) == {"acme": reason}
    shutil.rmtree(folder)
    with closing(Spool(folder, clock=lambda: CLOSED_AT)) as waiting:
        waiting.append("settle", new_event_id(), b"{}")
        assert plain.close().refused == ()


def test_what_redis_has_not_been_drained_of(plain: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with RedisServer() as server:
        monkeypatch.setenv("METERING_QUOTA_URL", server.url)
        monkeypatch.setenv("METERING_TIMEOUT_MS", "20000")
        with Meter(plain.ledger_url, quota_url=server.url, quota_timeout_s=20) as meter:
            secret = meter.keys.create("acme", plan="plain").secret
            # Redis stamps it with its own time, so the period that is closed is this month's.
            meter.consume(secret, line="a")
            now = datetime.now(UTC)
            month = f"{now:%Y-%m}"
            later = now + timedelta(days=40)
            assert refused(plain.close(month, at=later)) == {
                "acme": "Redis has calls of before its end that are not drained: `tallystick drain`"
            }
            Drain(meter.ledger, meter._redis.link).run()  # type: ignore[union-attr]
        assert plain.close(month, at=later).accounts == 1


def test_what_its_plan_asks_to_be_reconciled(place: Place) -> None:
    place.plans(PLANS)
    place.account("acme", "traced")
    place.account("zeta", "plain")
    place.add(event(run_id="r"))
    closed = place.close()
    assert closed.accounts == 1
    assert refused(closed) == {
        "acme": "its plan asks for a reconciliation, and there is none since its end: "
        "`python -m flows reconcile-tokens --period 2023-11`"
    }
    number = reconcile_runs.fn(place.ledger_url, place.warehouse, PERIOD, CLOSED_AT, Tolerance())
    assert refused(place.close()) == {
        "acme": f"1 runs differ, and nothing was decided of them: `python -m flows reconcile apply {number}`"
    }
    place.add(event(run_id="r"))
    assert refused(place.close())["acme"].startswith("its last reconciliation is older than some of its events: ")
    number = reconcile_runs.fn(place.ledger_url, place.warehouse, PERIOD, CLOSED_AT, Tolerance())
    apply_reconciliation(place.ledger_url, number, actor="finance", now=CLOSED_AT)
    assert place.close().refused == ()


def test_what_the_provider_has_not_reported(place: Place) -> None:
    place.plans(PLANS)
    place.account("acme", "reported")
    place.add(event())
    place.aggregate()
    reconcile_runs.fn(place.ledger_url, place.warehouse, PERIOD, CLOSED_AT, Tolerance())

    def pulled(days: range, *, provisional: bool) -> None:
        with closing(Ledger(place.ledger_url)) as ledger, ledger.write() as connection:
            for day in days:
                said = {"provider": "openai", "organization": "default", "report": "usage"}
                which = str(date(2023, 11, day))
                connection.execute(
                    provider_pulls.insert().values(**said, day=which, pulled_at=CLOSED_AT, provisional=provisional)
                )

    missing = "no provider's report of all its days was pulled: `python -m flows pull-reports`"
    pulled(range(1, 30), provisional=False)
    assert refused(place.close()) == {"acme": missing}
    pulled(range(30, 31), provisional=True)
    assert refused(place.close()) == {"acme": missing}
    place.change("UPDATE provider_pulls SET provisional = false")
    assert place.close().refused == ()


def test_an_override_is_kept_with_who_and_why(place: Place) -> None:
    place.plans(PLANS)
    place.account("acme", "traced")
    place.account("zeta", "plain")
    place.add(event())
    closed = place.close(override="the tracer was down")
    assert (closed.accounts, closed.refused) == (2, ())
    overrides = dict(place.ledger_rows("SELECT account, override FROM closes"))
    assert overrides["zeta"] is None
    assert overrides["acme"].startswith("the tracer was down (its plan asks for a reconciliation, and there is none")
    logged = place.ledger_rows(
        "SELECT actor, details FROM admin_log WHERE action = 'period.close' AND subject = 'acme'"
    )
    [(actor, details)] = logged
    assert actor == "finance"
    assert json.loads(details)["override"] == overrides["acme"]


def test_no_override_closes_a_period_that_is_not_over(plain: Place) -> None:
    closed = plain.close(at=NOVEMBER + timedelta(hours=1), override="now")
    assert (closed.accounts, closed.not_over) == (0, 1)


def test_what_cannot_be_priced_stays_open(place: Place) -> None:
    place.plans('[plans.resale]\nretention_days = 1\nrates = [{ line = "*", type = "cost_plus", markup_percent = 20 }]')
    place.account("acme", "resale")
    place.add(event(model="mystery", usage=TokenUsage(input_tokens=1)))
    closed = place.close(override="whatever")
    assert closed.accounts == 0
    assert "bills provider cost, which is not known for 1 of the requests" in refused(closed)["acme"]
    assert place.ledger_rows("SELECT count(*) FROM invoices") == [(0,)]
