"""A ledger of its own for every test of the tasks."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from tests.tasks.place import Place

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def place(tmp_path: Path, empty_ledger: Path) -> Place:
    """A home with a new ledger in it."""
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(empty_ledger, home / "ledger.db")
    return Place(home)
