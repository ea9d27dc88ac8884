"""A recost killed at any moment is finished by running it again, and until then nothing is billed by halves."""

from __future__ import annotations

import random
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from tasks.errors import WarehouseError
from tests.faults.killing import ROUNDS, driver, finished, kill_group
from tests.tasks.place import Place, month_of_usage

if TYPE_CHECKING:
    from pathlib import Path

DRIVER = "tests.faults.recost_driver"
chance = random.Random(20231205)


def result(place: Place) -> dict[str, Any]:
    return {
        "costs": place.ledger_rows("SELECT * FROM event_costs ORDER BY seq"),
        "recosts": place.ledger_rows("SELECT * FROM recosts"),
        "replaced": place.ledger_rows("SELECT * FROM replaced_costs ORDER BY seq"),
        "events": place.warehouse_rows("SELECT * FROM usage_events ORDER BY seq"),
        "loaded": place.warehouse_rows("SELECT * FROM loaded_recost"),
    }


@pytest.fixture(scope="module")
def aggregated(tmp_path_factory: pytest.TempPathFactory, empty_ledger: Path) -> Place:
    """A month of usage that is costed and loaded."""
    home = tmp_path_factory.mktemp("aggregated") / "home"
    home.mkdir()
    shutil.copy(empty_ledger, home / "ledger.db")
    month_of_usage(Place(home), events=1_200)
    Place(home).aggregate()
    return Place(home)


def test_a_recost_killed_at_any_moment(aggregated: Place, tmp_path: Path) -> None:
    undisturbed = Place(tmp_path / "undisturbed")
    shutil.copytree(aggregated.home, undisturbed.home)
    took_s = finished(undisturbed, DRIVER)
    expected = result(undisturbed)
    assert len(expected["replaced"]) > 1_000
    assert len(expected["recosts"]) == 1
    killed = 0
    for number in range(ROUNDS):
        place = Place(tmp_path / f"round-{number}")
        shutil.copytree(aggregated.home, place.home)
        killed += kill_group(driver(place, DRIVER), took_s * (number + chance.random()) / ROUNDS)
        if [(len(place.ledger_rows("SELECT * FROM recosts")),)] != place.warehouse_rows("SELECT * FROM loaded_recost"):
            with pytest.raises(WarehouseError, match=r"recost 1 of 2023-11 has not ended|newest recost is 1"):
                place.load()
        finished(place, DRIVER)
        assert result(place) == expected, f"round {number}"
    assert killed
