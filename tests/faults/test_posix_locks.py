"""The POSIX-lock trap: DuckDB's scanner carries its own SQLite, and two copies in one process lose commits.

So no process may have both on one ledger: `tasks.load_worker` reads it through DuckDB and in no other way, and everyone
else through `metering.ledger.sqlite`.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from typing import TYPE_CHECKING

import pytest

from metering.events import TokenUsage
from metering.meter import Meter
from tasks.load import ROOT
from tests.tasks.place import Place, month_of_usage

if TYPE_CHECKING:
    from pathlib import Path

PROCESSES, CALLS = 4, 25
ROOMS = ("metering", "tasks", "flows", "reports", "examples", "benchmarks")


@pytest.fixture
def place(tmp_path: Path, empty_ledger: Path) -> Place:
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(empty_ledger, home / "ledger.db")
    return Place(home)


def consume(url: str, secret: str, index: int) -> list[str]:
    """Calls, one after the other; the ids of those that were acknowledged."""
    with Meter(url, timeout_s=60) as meter:
        answers = [
            meter.consume(secret, line="a", usage=TokenUsage(input_tokens=1), idempotency_key=f"{index}-{number}")
            for number in range(CALLS)
        ]
    return [answer.event_id.hex for answer in answers if answer.allowed]


def test_no_commit_is_lost_while_duckdb_loads_in_a_loop(place: Place) -> None:
    with Meter(place.ledger_url) as meter:
        secret = meter.keys.create("acme", plan="enterprise").secret
    loads = 0
    # The process that starts the loads admits as well: it is the one whose locks the trap would drop.
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool, ThreadPoolExecutor(1) as thread:
        running = [pool.submit(consume, place.ledger_url, secret, index) for index in range(PROCESSES)]
        running.append(thread.submit(consume, place.ledger_url, secret, PROCESSES))
        while not all(future.done() for future in running):
            place.aggregate()
            loads += 1
        ids = [event_id for future in running for event_id in future.result()]
    assert loads >= 2
    assert len(set(ids)) == (PROCESSES + 1) * CALLS
    assert place.ledger_rows("PRAGMA integrity_check") == [("ok",)]
    assert sorted(ids) == sorted(event_id for (event_id,) in place.ledger_rows("SELECT event_id FROM events"))
    place.aggregate()
    in_warehouse = place.warehouse_rows("SELECT replace(event_id::VARCHAR, '-', '') FROM usage_events")
    assert sorted(event_id for (event_id,) in in_warehouse) == sorted(ids)
    assert place.warehouse_rows("SELECT sum(requests), sum(input_tokens) FROM usage_15m") == [(len(ids), len(ids))]


def calls_of(module: Path, names: set[str]) -> list[tuple[str, str | None]]:
    """Calls of `names` in a module, each with its first argument where that is a literal."""
    found = []
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in names:
            first = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
            found.append((ast.unparse(node.func), first if isinstance(first, str) else None))
    return found


def test_nothing_else_opens_a_ledger() -> None:
    opening, attaching = {}, set()
    for path in sorted(path for room in ROOMS for path in (ROOT / room).rglob("*") if path.suffix in (".py", ".sql")):
        name = str(path.relative_to(ROOT))
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".py" and (found := calls_of(path, {"sqlite3.connect", "sqlite3.Connection", "connect"})):
            opening[name] = found
        if "sqlite_scan" in text or "TYPE sqlite" in text or "from sqlite3 import" in text or "apsw" in text:
            attaching.add(name)
    ours = {name: found for name, found in opening.items() if any(call == "sqlite3.connect" for call, _ in found)}
    in_the_place = [found for found in ours.pop("metering/ledger/sqlite.py") if found[0] == "sqlite3.connect"]
    assert in_the_place == [("sqlite3.connect", None)]
    # Rows that are counted, or put aside, in a temporary file without a name.
    assert {call for found in ours.values() for call in found} <= {("sqlite3.connect", "")}
    assert all(name.startswith(("metering/importing/", "metering/traces/importing")) for name in ours)
    assert {name for name in opening if name.startswith(("tasks", "flows", "reports"))} == set()
    assert attaching == {"tasks/load_worker.py"}


AUDIT = """
import os, sys, json, atexit
log = os.open(os.environ["AUDIT_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
who = "worker" if "tasks.load_worker" in sys.orig_argv else "flow"
def note(*what): os.write(log, (json.dumps([who, *what]) + "\\n").encode())
def hook(event, arguments):
    if event in ("sqlite3.connect", "open") and isinstance(arguments[0], (str, bytes, os.PathLike)):
        note(event, os.fsdecode(arguments[0]))
sys.addaudithook(hook)
def at_end():
    mapped = open("/proc/self/maps").read() if os.path.exists("/proc/self/maps") else None
    note("end", None if mapped is None else "sqlite_scanner" in mapped, "_sqlite3" in sys.modules)
atexit.register(at_end)
"""


def test_a_whole_cycle_keeps_the_two_apart(place: Place, tmp_path: Path) -> None:
    month_of_usage(place, events=50)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(AUDIT)
    log = tmp_path / "audit.jsonl"
    subprocess.run(
        [sys.executable, "-m", "tests.faults.cycle_driver", str(place.home)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site"), "AUDIT_LOG": str(log)},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    noted = [json.loads(line) for line in log.read_text().splitlines()]
    # The flow opens the ledger through sqlite3 alone, the worker through nothing that Python sees.
    touched = {(who, what) for who, what, first, *_ in noted if str(place.ledger) in str(first)}
    assert touched == {("flow", "sqlite3.connect")}
    ends = {who: rest for who, what, *rest in noted if what == "end"}
    assert ends.keys() == {"flow", "worker"}
    assert ends["flow"] in ([False, True], [None, True])
    assert ends["worker"] in ([True, False], [None, False])
