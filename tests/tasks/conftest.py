"""A ledger of its own for every test of the tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.tasks.place import Place
from tests.tasks.runs import PLANS, Runs

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def place(tmp_path: Path, ledger_url: str) -> Place:
    """A home with a new ledger, in it or on Postgres."""
    return Place.at(tmp_path / "home", ledger_url)


@pytest.fixture
def runs(place: Place) -> Runs:
    """Runs of the account `acme`, whose plan asks to be reconciled."""
    place.plans(PLANS)
    place.account("acme", "metered")
    return Runs(place)
