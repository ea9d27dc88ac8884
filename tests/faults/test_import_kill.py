"""An import killed at any moment is finished by running it again: the same facts as an undisturbed run."""

from __future__ import annotations

import csv
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from metering.ledger import Ledger
from metering.ledger.schema import account_plans, accounts, event_ids, events, plan_versions

if TYPE_CHECKING:
    from collections.abc import Callable

ROUNDS = int(os.environ.get("TALLYSTICK_FAULT_ROUNDS", "2"))
ROWS = 3_000
DEADLINE_S = 60
# Small commits make many moments between two of them.
SCRIPT = "import metering.importing as i; i.ROWS_PER_COMMIT = 60; from metering.cli import main; main()"
ARGUMENTS = ("import", "trace.csv", "--map", "occurred_at=TIMESTAMP,account=who", "--line", "chat", "--plan", "pro")
REFUSED = 30


@pytest.fixture
def trace() -> None:
    """Rows of five accounts; a tenth of them come twice or more, and some are refused."""
    chance = random.Random(11)
    with Path("trace.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["TIMESTAMP", "who", "input_tokens", "output_tokens"])
        rows = []
        for number in range(ROWS - REFUSED):
            at = f"2023-11-16 {chance.randrange(24):02d}:{chance.randrange(60):02d}:00.1234567"
            rows.append([at, f"account-{chance.randrange(5)}", chance.randrange(9_000), chance.randrange(900)])
            if number % 10 == 9:
                rows[-1] = rows[chance.randrange(number)]
        rows += [["2023-11-16", "account-0", -1 - number, 0] for number in range(REFUSED)]
        chance.shuffle(rows)
        table.writerows(rows)


def start(ledger: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "METERING_LEDGER_URL": f"sqlite:///{ledger}", "METERING_HOME": f"{ledger}.home"}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *ARGUMENTS],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def finish(ledger: Path) -> None:
    assert start(ledger).wait(DEADLINE_S) == 3


def facts(path: Path) -> dict[str, Any]:
    """Everything an import leaves, but for the numbers and times of the recording itself."""
    ledger = Ledger(f"sqlite:///{path}")
    kept = [column for column in events.c if column.name not in ("seq", "recorded_at", "plan_version")]
    with ledger.read() as connection:
        found = {
            "events": sorted(map(repr, connection.execute(sa.select(*kept)))),
            "ids": sorted(map(repr, connection.execute(sa.select(event_ids)))),
            "accounts": sorted(connection.execute(sa.select(accounts.c.account)).scalars()),
            "plans": sorted(map(tuple, connection.execute(sa.select(account_plans.c.account, account_plans.c.plan)))),
            "versions": connection.execute(sa.select(sa.func.count()).select_from(plan_versions)).scalar(),
            "refused": sorted((path.with_name(path.name + ".home") / "rejects").iterdir())[0].read_text(),
        }
    ledger.close()
    return found


def count_events(ledger: Ledger) -> int:
    with ledger.read() as connection:
        return connection.execute(sa.select(sa.func.count()).select_from(events)).scalar() or 0


def after_a_moment(process: subprocess.Popen[bytes], ledger: Ledger, chance: random.Random) -> None:
    """Any moment of the run, from the start of the interpreter on."""
    threading.Event().wait(chance.uniform(0, 1.2))


def after_some_events(process: subprocess.Popen[bytes], ledger: Ledger, chance: random.Random) -> None:
    """A moment in the midst of the rows."""
    enough = chance.randrange(1, ROWS // 2)
    deadline = time.monotonic() + DEADLINE_S
    while process.poll() is None and count_events(ledger) < enough and time.monotonic() < deadline:
        threading.Event().wait(0.001)


def test_a_killed_import_is_finished_by_running_it_again(trace: None, empty_ledger: Path, tmp_path: Path) -> None:
    undisturbed = tmp_path / "undisturbed.db"
    shutil.copy(empty_ledger, undisturbed)
    finish(undisturbed)
    expected = facts(undisturbed)
    assert len(expected["events"]) == ROWS - REFUSED
    assert expected["refused"].count("\n") == REFUSED + 1

    chance = random.Random(os.environ.get("TALLYSTICK_FAULT_SEED", "tally"))
    moments: list[Callable[..., None]] = [after_some_events, after_a_moment]
    left_in_the_midst = 0
    for round_ in range(ROUNDS):
        path = tmp_path / f"killed-{round_}.db"
        shutil.copy(empty_ledger, path)
        ledger = Ledger(f"sqlite:///{path}")
        process = start(path)
        moments[round_ % 2](process, ledger, chance)
        process.kill()
        process.wait(DEADLINE_S)
        left_in_the_midst += 0 < count_events(ledger) < ROWS - REFUSED
        ledger.close()
        finish(path)
        assert facts(path) == expected, f"round {round_}"
    assert left_in_the_midst
