"""The doctor names what is wrong, changes nothing, and does not fall ill itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from metering import Meter
from metering.doctor import examine
from metering.ledger import Ledger


def findings() -> dict[str, tuple[bool, str]]:
    return {finding.what: (finding.ok, finding.says) for finding in examine()}


@pytest.fixture
def here(ledger_url: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The ledger that is configured."""
    monkeypatch.setenv("METERING_LEDGER_URL", ledger_url)
    return Path(ledger_url.removeprefix("sqlite:///"))


def test_all_is_well(here: Path) -> None:
    with Meter(f"sqlite:///{here}") as meter:
        secret = meter.keys.create("acme", plan="pro").secret
        meter.consume(secret, line="chat")
        hold = meter.reserve(secret, line="chat")
        found = findings()
        hold.release()
    assert all(ok for ok, _ in found.values())
    assert found["home"][1] == str(Path(".tallystick").absolute())
    assert str(here) in found["ledger"][1]
    assert "schema 0001, journal wal" in found["ledger"][1]
    assert found["contents"][1] == "1 accounts, events up to number 1, 1 open holds"
    assert found["counters"][1] == "1, all equal to the ledger"
    assert found["plans"][1] == "plans.toml is absent: the four default plans"
    assert found["warehouse"][1].startswith(".tallystick/warehouse.duckdb is absent")


def test_nothing_is_there_and_nothing_is_made() -> None:
    found = findings()
    assert found["ledger"] == (
        False,
        "ledger .tallystick/ledger.db: cannot be opened; `tallystick init` creates it",
    )
    assert [what for what, (ok, _) in found.items() if not ok] == ["ledger"]
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"noise" * 2_000])
def test_a_file_that_is_no_ledger(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    Path("mine.db").write_bytes(content)
    monkeypatch.setenv("METERING_LEDGER_URL", "sqlite:///mine.db")
    ok, says = findings()["ledger"]
    assert not ok
    assert says.startswith("ledger mine.db: ")
    assert b"accounts" not in Path("mine.db").read_bytes()


@pytest.mark.parametrize(("version", "expected"), [("9999", "is newer than"), ("0000", "`tallystick migrate`")])
def test_a_ledger_of_another_version(here: Path, version: str, expected: str) -> None:
    ledger = Ledger(f"sqlite:///{here}")
    with ledger.write() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = ?", (version,))
    ledger.close()
    ok, says = findings()["ledger"]
    assert (ok, expected in says) == (False, True)


def test_a_ledger_that_is_damaged_inside(here: Path) -> None:
    with Meter(f"sqlite:///{here}") as meter:
        meter.consume(meter.keys.create("acme", plan="pro").secret, line="chat")
        with meter.ledger.read() as connection:
            size = connection.exec_driver_sql("PRAGMA page_size").scalar()
            page = connection.exec_driver_sql("SELECT rootpage FROM sqlite_master WHERE name = 'counters'").scalar()
    assert size is not None
    assert page is not None
    damaged = bytearray(here.read_bytes())
    damaged[(page - 1) * size : page * size] = b"\x55" * size
    here.write_bytes(damaged)
    ((what, says),) = [(what, says) for what, (ok, says) in findings().items() if not ok]
    assert what == "counters"
    assert "not a readable SQLite database" in says


def test_counters_that_differ(here: Path) -> None:
    with Meter(f"sqlite:///{here}") as meter:
        meter.consume(meter.keys.create("acme", plan="pro").secret, line="chat")
        with meter.ledger.write() as connection:
            connection.exec_driver_sql("UPDATE counters SET used = '7'")
    assert findings()["counters"] == (False, "1 of 1 counters differ from the ledger: see `tallystick verify`")


@pytest.mark.parametrize(
    ("content", "expected"),
    [("[plans.x]\nlimits = 3\n", "(line "), ("[[[", "is not TOML"), (b"\xff\xfe", "utf-8")],
)
def test_plans_that_cannot_be_used(here: Path, content: Any, expected: str) -> None:
    Path("plans.toml").write_bytes(content if isinstance(content, bytes) else content.encode())
    ok, says = findings()["plans"]
    assert (ok, says.startswith("plans.toml: "), expected in says) == (False, True, True)


def test_plans_that_can() -> None:
    Path("plans.toml").write_text("[plans.x]\nretention_days = 7\n[plans.y]\nretention_days = 7\n")
    assert findings()["plans"] == (True, "plans.toml: x, y")


@pytest.mark.parametrize(
    ("name", "value"), [("METERING_TIMEOUT_MS", "soon"), ("METERING_QUOTA_URL", "redis://localhost")]
)
def test_settings_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    ((what, (ok, says)),) = findings().items()
    assert (what, ok, says.startswith(f"{name}: got ")) == ("settings", False, True)
