"""One Prefect server for all flow tests, in a folder of its own."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import pytest
from prefect.testing.utilities import prefect_test_harness

from tests.tasks.place import Place

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where Prefect keeps what is its own."""
    return tmp_path_factory.mktemp("prefect")


@pytest.fixture(scope="session")
def _engine(prefect_home: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(prefect_home))
        with prefect_test_harness(server_startup_timeout=60):
            yield


@pytest.fixture
def place(tmp_path: Path, empty_ledger: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A home with a new ledger in it, which METERING_HOME names."""
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(empty_ledger, home / "ledger.db")
    monkeypatch.setenv("METERING_HOME", str(home))
    assert not [name for name in os.environ if name.startswith("METERING_") and name != "METERING_HOME"]
    return Place(home)
