"""A close killed at any moment is finished by running it again: the same documents, numbers without gap or repeat."""

from __future__ import annotations

import random
import shutil
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from metering.ledger import Ledger
from metering.ledger.proving import chain_faults
from tasks.verify import document_differences
from tests.faults.killing import ROUNDS, driver, finished, kill_group
from tests.tasks.place import Place, month_of_usage

if TYPE_CHECKING:
    from pathlib import Path

ACCOUNTS = 12

DRIVER = "tests.faults.close_driver"
chance = random.Random(20231206)


def result(place: Place) -> dict[str, Any]:
    return {
        "documents": place.ledger_rows("SELECT * FROM invoices ORDER BY seq"),
        "items": place.ledger_rows("SELECT * FROM invoice_items ORDER BY seq, position"),
        "frozen": place.ledger_rows("SELECT * FROM frozen_inputs ORDER BY account"),
        "closes": place.ledger_rows("SELECT * FROM closes ORDER BY close"),
        "issuers": place.ledger_rows("SELECT * FROM issuers"),
        "files": place.files(),
    }


@pytest.fixture(scope="module")
def aggregated(tmp_path_factory: pytest.TempPathFactory, empty_ledger: Path) -> Place:
    """A month of usage that is costed and loaded."""
    home = tmp_path_factory.mktemp("aggregated") / "home"
    home.mkdir()
    shutil.copy(empty_ledger, home / "ledger.db")
    month_of_usage(Place(home), events=120, accounts=ACCOUNTS)
    Place(home).aggregate()
    return Place(home)


def test_a_close_killed_at_any_moment(aggregated: Place, tmp_path: Path) -> None:
    undisturbed = Place(tmp_path / "undisturbed")
    shutil.copytree(aggregated.home, undisturbed.home)
    took_s = finished(undisturbed, DRIVER)
    expected = result(undisturbed)
    numbers = [row[2] for row in expected["documents"]]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) >= ACCOUNTS - 2
    halfway = 0
    for number in range(ROUNDS):
        place = Place(tmp_path / f"round-{number}")
        shutil.copytree(aggregated.home, place.home)
        kill_group(driver(place, DRIVER), took_s * (number + chance.random()) / ROUNDS)
        ((closed,),) = place.ledger_rows("SELECT count(*) FROM closes")
        halfway += 0 < closed < len(expected["closes"])
        finished(place, DRIVER)
        assert result(place) == expected, f"round {number}"
        with closing(Ledger(place.ledger_url)) as ledger, ledger.read() as connection:
            assert chain_faults(connection) == []
        assert document_differences(place.ledger_url, place.out, "INV-000001") == []
    assert halfway or ROUNDS < 10
