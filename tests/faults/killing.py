"""Runs of their own in a process group, to be killed at a moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from tasks.load import ROOT

if TYPE_CHECKING:
    from tests.tasks.place import Place

ROUNDS = int(os.environ.get("TALLYSTICK_FAULT_ROUNDS", "2"))
DEADLINE_S = 120


def start(place: Place, *module: str, **environment: str) -> subprocess.Popen[str]:
    """A run in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", *module],
        cwd=ROOT,
        env={**os.environ, "METERING_HOME": str(place.home), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def driver(place: Place, module: str) -> subprocess.Popen[str]:
    """A module that says `ready` once all is imported, and then does to a home what is to be killed."""
    run = start(place, module, str(place.home))
    assert run.stdout is not None
    assert run.stdout.readline() == "ready\n"
    return run


def finished(place: Place, module: str) -> float:
    """Seconds that it took, undisturbed."""
    run = driver(place, module)
    began = time.monotonic()
    _, said = run.communicate(timeout=DEADLINE_S)
    assert run.returncode == 0, said
    return time.monotonic() - began


def kill_group(run: subprocess.Popen[str], after_s: float) -> bool:
    """Kill a run and all it started once its time is over; whether there was anything left to kill."""
    try:
        run.wait(after_s)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
    run.communicate(timeout=DEADLINE_S)
    return run.returncode == -signal.SIGKILL
