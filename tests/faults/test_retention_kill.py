"""A run of retention killed at any moment: nothing is gone that no verified archive has, and the next run ends it."""

from __future__ import annotations

import random
import shutil
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import duckdb
import pytest

from metering.legal_holds import place_hold
from tasks.rebuild import rebuild_warehouse
from tasks.verify import archive_differences
from tests.faults.killing import ROUNDS, driver, finished, kill_group
from tests.tasks.closed import close
from tests.tasks.place import NOVEMBER, Place, month_of_usage

if TYPE_CHECKING:
    from pathlib import Path

EVENTS = 600
HELD = "account-3"
DRIVER = "tests.faults.retention_driver"
chance = random.Random(20240301)


def result(place: Place) -> dict[str, Any]:
    """Everything that must not depend on what was killed."""
    tables = ("events", "event_costs", "event_ids", "archives", "request_log", "replays", "admin_log")
    return {
        **{name: place.ledger_rows(f"SELECT * FROM {name} ORDER BY 1, 2") for name in tables},
        "files": {path.name: path.read_bytes() for path in sorted(place.archives.rglob("*")) if path.is_file()},
    }


def known(place: Place) -> list[str]:
    """The ids of events in the ledger, and of those in its archives."""
    found = [event_id for (event_id,) in place.ledger_rows("SELECT event_id FROM events")]
    for (file,) in place.ledger_rows("SELECT file FROM archives"):
        with duckdb.connect() as connection:
            rows = connection.execute("SELECT event_id FROM read_parquet(?)", [str(place.archives / file)]).fetchall()
        found += [event_id for (event_id,) in rows]
    return found


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory, empty_ledger: Path) -> Place:
    """A month of usage, billed and closed, with a request log that is over, and an account on hold."""
    home = tmp_path_factory.mktemp("closed") / "home"
    home.mkdir()
    shutil.copy(empty_ledger, home / "ledger.db")
    place = Place(home)
    month_of_usage(place, events=EVENTS)
    with place.meter() as meter:
        for name in (HELD, "caller"):
            secret = meter.keys.create(name, plan=None if name == HELD else "free").secret
            for number in range(40):
                meter.consume(secret, line="a", request=number, response=number, idempotency_key=f"k{number}")
        place_hold(meter.ledger, HELD, reason="case", actor="counsel", now=NOVEMBER + timedelta(days=1))
    place.aggregate()
    for number in range(6):
        close(place, f"account-{number}")
    return place


def test_a_run_killed_at_any_moment(closed: Place, tmp_path: Path) -> None:
    undisturbed = Place(tmp_path / "undisturbed")
    shutil.copytree(closed.home, undisturbed.home)
    took_s = finished(undisturbed, DRIVER)
    expected = result(undisturbed)
    every = set(known(closed))
    held = len(closed.ledger_rows(f"SELECT 1 FROM events WHERE account = '{HELD}'"))
    open_ones = len(closed.ledger_rows("SELECT 1 FROM events WHERE account = 'caller'"))
    assert (len(expected["events"]), len(expected["archives"])) == (held + open_ones, 5)
    assert (len(expected["request_log"]), len(expected["replays"])) == (40, 40)
    assert len(every) == EVENTS + 80
    killed = 0
    for number in range(ROUNDS):
        place = Place(tmp_path / f"round-{number}")
        shutil.copytree(closed.home, place.home)
        killed += kill_group(driver(place, DRIVER), took_s * (number + chance.random()) / ROUNDS)
        assert set(known(place)) == every, f"round {number}"
        assert archive_differences(place.ledger_url, place.archives) == [], f"round {number}"
        finished(place, DRIVER)
        assert result(place) == expected, f"round {number}"
        # A run more changes nothing.
        finished(place, DRIVER)
        assert result(place) == expected, f"round {number}"
    assert killed
    rebuild_warehouse.fn(undisturbed.ledger_url, undisturbed.warehouse, undisturbed.archives)
    rows = "SELECT * FROM usage_events ORDER BY seq"
    assert undisturbed.warehouse_rows(rows) == closed.warehouse_rows(rows)
