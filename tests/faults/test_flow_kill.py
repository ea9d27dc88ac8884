"""A cycle killed at any moment is finished by running it again: the same rows and bytes as an undisturbed run."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tasks.load import ROOT
from tests.faults.killing import DEADLINE_S, ROUNDS, driver, kill_group, start
from tests.tasks.place import PERIOD, Place, month_of_usage

DRIVER = "tests.faults.cycle_driver"
PREPARE = """
import asyncio
from prefect.server.database import provide_database_interface
asyncio.run(provide_database_interface().run_migrations_upgrade())
"""
chance = random.Random(20231116)


def worker_of(run: subprocess.Popen[str]) -> int | None:
    """The load that a run has started, if it is running now."""
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    for child in map(int, children):
        if b"tasks.load_worker" in Path(f"/proc/{child}/cmdline").read_bytes():
            return child
    return None


def result(place: Place) -> dict[str, Any]:
    """Everything that must not depend on what was killed."""
    return {
        "files": place.files(),
        "costs": place.ledger_rows("SELECT seq, cost, price_version FROM event_costs ORDER BY seq"),
        "events": place.warehouse_rows("SELECT * FROM usage_events ORDER BY seq"),
        "sums": place.warehouse_rows("SELECT * FROM usage_15m ORDER BY ALL"),
        "watermark": place.warehouse_rows("SELECT * FROM load_watermark"),
    }


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory, empty_ledger: Path) -> Place:
    """A month of usage that no job has seen yet."""
    home = tmp_path_factory.mktemp("fresh") / "home"
    home.mkdir()
    shutil.copy(empty_ledger, home / "ledger.db")
    month_of_usage(Place(home), events=1_200)
    return Place(home)


@pytest.fixture
def copied(fresh: Place, tmp_path: Path) -> Any:
    def copy(name: str) -> Place:
        shutil.copytree(fresh.home, tmp_path / name)
        return Place(tmp_path / name)

    return copy


@pytest.fixture(scope="module")
def undisturbed(fresh: Place) -> tuple[dict[str, Any], float]:
    """What a run that nobody kills comes to, and how long it takes once it has started."""
    home = fresh.home.parent / "undisturbed"
    shutil.copytree(fresh.home, home)
    run = driver(Place(home), DRIVER)
    began = time.monotonic()
    assert run.wait(DEADLINE_S) == 0
    took_s = time.monotonic() - began
    run.communicate()
    found = result(Place(home))
    assert len(found["events"]) == 1_200
    assert len(found["files"]) > 15
    return found, took_s


def test_a_cycle_killed_at_any_moment(undisturbed: tuple[dict[str, Any], float], copied: Any) -> None:
    expected, took_s = undisturbed
    killed = 0
    for number in range(ROUNDS):
        place = copied(f"round-{number}")
        # One moment in each part of the run's duration, however many rounds there are.
        killed += kill_group(driver(place, DRIVER), took_s * (number + chance.random()) / ROUNDS)
        place.cycle()
        assert result(place) == expected, f"round {number}"
    assert killed


def test_a_load_whose_worker_is_killed(undisturbed: tuple[dict[str, Any], float], copied: Any) -> None:
    expected, _ = undisturbed
    for number in range(max(1, ROUNDS // 3)):
        place = copied(f"worker-{number}")
        run = driver(place, DRIVER)
        deadline = time.monotonic() + DEADLINE_S
        while (worker := worker_of(run)) is None:
            assert run.poll() is None
            assert time.monotonic() < deadline
        try:
            run.wait(0.35 * chance.random())
        except subprocess.TimeoutExpired:
            if worker_of(run) == worker:
                os.kill(worker, signal.SIGKILL)
        _, said = run.communicate(timeout=DEADLINE_S)
        assert run.returncode == 0 or "the load ended with status -9" in said
        place.cycle()
        assert result(place) == expected, f"round {number}"


def test_a_flow_killed_at_any_moment(
    undisturbed: tuple[dict[str, Any], float], copied: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    expected, _ = undisturbed
    command = ("flows.billing_cycle", "--period", PERIOD)
    # Prefect's own database is made first: what a kill does to its migrations is not ours.
    settings = {"PREFECT_HOME": str(tmp_path_factory.mktemp("prefect"))}
    prepared = {**os.environ, **settings}
    subprocess.run([sys.executable, "-c", PREPARE], cwd=ROOT, env=prepared, check=True, timeout=DEADLINE_S)
    took_s = 10.0
    for number in range(max(1, ROUNDS // 10)):
        place = copied(f"flow-{number}")
        kill_group(start(place, *command, **settings), took_s * chance.uniform(0.2, 1))
        began = time.monotonic()
        run = start(place, *command, **settings)
        out, err = run.communicate(timeout=DEADLINE_S)
        took_s = time.monotonic() - began
        # One account of this month cannot be billed, so this is also what a failing run says, and no more.
        index = place.out / PERIOD / "index.html"
        assert (run.returncode, out) == (1, ""), err
        assert re.fullmatch(rf"error: 1 not billed: 'account-1': .*\. The others are, see {index}\n", err), err
        assert result(place) == expected, f"round {number}"
