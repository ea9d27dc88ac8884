"""The flow of retention through Prefect's engine, and the commands that read archives."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from flows.__main__ import app
from flows.command import call
from flows.enforce_retention import enforce_retention
from tests.tasks.closed import close
from tests.tasks.place import PERIOD, Place, event

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("_engine")


@pytest.fixture
def flows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`python -m flows ...`: exit status, output and errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["flows", *arguments])
        with pytest.raises(SystemExit) as exit_:
            app()
        return int(exit_.value.code or 0), *capsys.readouterr()

    return run


def test_a_run_from_dry_to_restored(
    place: Place, capsys: pytest.CaptureFixture[str], flows: Callable[..., tuple[int, str, str]]
) -> None:
    with place.meter() as meter:
        secret = meter.keys.create("acme", plan="free").secret
        meter.consume(secret, line="a", request="hello")
    place.add(event())
    place.aggregate()
    close(place, "acme")
    would = f"request_log: 1 rows of acme\nevents of {PERIOD}: 2 rows of acme\n"
    assert call(enforce_retention, dry_run=True) == 0
    assert capsys.readouterr().out == would
    assert call(enforce_retention, dry_run=True, archive_after_days=36_000) == 0
    assert capsys.readouterr().out == "request_log: 1 rows of acme\n"
    assert place.ledger_rows("SELECT count(*) FROM events") == [(2,)]
    assert flows("verify", "archives") == (0, "archives: no differences\n", "")
    assert flows("restore", PERIOD)[0] == 1
    assert flows("enforce-retention") == (0, would, "")
    assert flows("enforce-retention") == (0, "nothing changes\n", "")
    assert flows("restore", PERIOD) == (0, '{"files": 1, "events": 2}\n', "")
    assert flows("restore", "May")[0] == 1
    assert flows("verify", "rollups", "--period", PERIOD) == (0, "rollups: no differences\n", "")
    assert flows("rebuild")[0] == 0
    assert flows("verify", "rollups", "--period", PERIOD) == (0, "rollups: no differences\n", "")
    [path] = place.archives.rglob("*.parquet")
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    status, out, _ = flows("verify", "archives")
    assert (status, out.startswith(f"{path}: has SHA-256 ")) == (1, True)
    assert call(enforce_retention, archive_after_days=-1) == 1
    assert "archive_after_days: got -1, expected 0 to 36500 days" in capsys.readouterr().err
