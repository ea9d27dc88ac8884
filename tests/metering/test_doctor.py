"""The doctor names what is wrong, changes nothing, and does not fall ill itself."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from metering import Meter, doctor
from metering.admission.redis.keys import shard_key, shard_of
from metering.doctor import examine
from metering.events import new_event_id
from metering.ledger import SCHEMA, Ledger
from metering.spool import Spool
from tests.servers import RedisServer, flavours, free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

    import redis

ACME = shard_of("acme")


def findings() -> dict[str, tuple[bool, str]]:
    return {finding.what: (finding.ok, finding.says) for finding in examine()}


def warnings() -> dict[str, str]:
    return {finding.what: finding.says for finding in examine() if finding.warning}


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
    assert f"schema {SCHEMA}, journal wal" in found["ledger"][1]
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


@pytest.mark.parametrize(("name", "value"), [("METERING_TIMEOUT_MS", "soon"), ("METERING_ALLOW_EVICTION", "yes")])
def test_settings_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    ((what, (ok, says)),) = findings().items()
    assert (what, ok, says.startswith(f"{name}: got ")) == ("settings", False, True)


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer(appendonly=True) as running:
        yield running


@pytest.fixture
def client(server: RedisServer) -> Iterator[redis.Redis]:
    with server.client() as opened:
        opened.flushall()
        yield opened


@pytest.fixture
def app(here: Path, client: redis.Redis, server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Meter]:
    """A meter whose quotas are on Redis, as the settings say too."""
    monkeypatch.setenv("METERING_QUOTA_URL", server.url)
    with Meter.from_env(create=False) as meter:
        yield meter


def consume(meter: Meter) -> None:
    meter.consume(meter.keys.create("acme", plan="pro").secret, line="chat")


def test_all_is_well_with_redis(app: Meter, server: RedisServer) -> None:
    consume(app)
    found = findings()
    assert all(ok for ok, _ in found.values())
    assert warnings() == {}
    assert found["redis"][1].startswith(f"127.0.0.1:{server.port}, ")
    assert found["redis memory"][1] == "maxmemory-policy noeviction"
    assert found["redis persistence"][1] == "append-only file is on, appendfsync always"
    assert found["shards"][1] == "1 open, 63 unused"
    assert found["lag"][1].startswith("1 events to drain, the oldest ")
    assert found["lost events"][1] == "none"
    assert found["dead letters"][1] == "0 open"
    assert found["outbox"][1] == "0 changes that Redis has not been told"
    assert found["spool"][1] == ".tallystick/spool: 0 lines in 0 files"
    assert "counters" not in found


@pytest.mark.parametrize("flavour", flavours())
def test_it_knows_what_the_server_is(here: Path, flavour: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with RedisServer(flavour) as server:
        monkeypatch.setenv("METERING_QUOTA_URL", server.url)
        says = findings()["redis"][1]
    assert says.rpartition(", ")[2].startswith("Valkey 9." if flavour == "valkey-9" else "Redis ")
    assert "not found" not in says


def test_a_server_that_may_lose_what_it_acknowledged(app: Meter, client: redis.Redis) -> None:
    client.config_set("appendfsync", "everysec")
    try:
        assert findings()["redis persistence"] == (
            True,
            "append-only file is on, appendfsync everysec: up to a second of what was acknowledged may be lost",
        )
        assert warnings() == {}
        client.config_set("appendonly", "no")
        says = "append-only file is off: what was acknowledged may be lost with the server"
        assert warnings() == {"redis persistence": says}
    finally:
        client.config_set("appendonly", "yes")
        client.config_set("appendfsync", "always")


def test_a_server_that_throws_away(app: Meter, client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        ok, says = findings()["redis memory"]
        assert (ok, says.startswith("maxmemory-policy allkeys-lru: ")) == (False, True)
        monkeypatch.setenv("METERING_ALLOW_EVICTION", "1")
        assert findings()["redis memory"] == (True, says)
        assert warnings() == {"redis memory": says}
    finally:
        client.config_set("maxmemory-policy", "noeviction")


def test_a_server_that_is_away(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("METERING_QUOTA_URL", f"redis://:hush@127.0.0.1:{port}")
    found = findings()
    assert [what for what, (ok, _) in found.items() if not ok] == ["redis"]
    assert found["redis"][1].startswith(f"Redis at 127.0.0.1:{port} did not answer: ")
    assert "hush" not in repr(found)
    assert found["outbox"][0]


def test_a_url_that_is_none(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METERING_QUOTA_URL", "postgres://localhost")
    assert findings()["redis"] == (
        False,
        "METERING_QUOTA_URL: got 'postgres://localhost', expected redis://, rediss:// or redis+cluster:// and a host",
    )


def test_shards_that_lost_data(app: Meter, client: redis.Redis) -> None:
    consume(app)
    client.hset(shard_key(ACME, "shard"), "fenced", "behind")
    until = "nothing is admitted there until `tallystick quota rebuild`"
    assert findings()["shards"] == (False, f"shard {ACME} fenced (behind): {until}")
    client.flushall()
    assert findings()["shards"] == (False, f"shard {ACME} lost: {until}")
    with app.ledger.write() as connection:
        for shard in range(7):
            connection.exec_driver_sql("INSERT INTO shards (shard, epoch, seq, lost) VALUES (?, 1, 0, 0)", (shard,))
    says = f"shard 0 lost, 1 lost, 2 lost, 3 lost, 4 lost and 3 more: {until}"
    assert findings()["shards"] == (False, says)


def test_events_that_nobody_drains(app: Meter, monkeypatch: pytest.MonkeyPatch) -> None:
    consume(app)
    assert warnings() == {}
    monkeypatch.setattr(doctor, "LATE_S", -1.0)
    says = warnings()["lag"]
    assert says.startswith("1 events to drain, the oldest ")
    assert says.endswith("is `tallystick drain --follow` running?")


def test_what_the_ledger_knows_of_losses(app: Meter) -> None:
    with app.ledger.write() as connection:
        connection.exec_driver_sql("INSERT INTO shards (shard, epoch, seq, lost) VALUES (3, 0, 0, 1200), (9, 0, 0, 1)")
        for number, resolved_at in enumerate((None, None, "2026-03-12T12:00:00Z")):
            connection.exec_driver_sql(
                "INSERT INTO dead_letters (position, shard, noticed_at, error, header, body, resolved_at)"
                " VALUES (?, 3, '2026-03-12T12:00:00Z', 'poison', x'', x'', ?)",
                (f"3/1/{number}-0", resolved_at),
            )
        connection.exec_driver_sql("INSERT INTO outbox (recount, created_at) VALUES (0, '2026-03-12T12:00:00Z')")
    assert all(ok for ok, _ in findings().values())
    assert warnings() == {
        "lost events": "1,201 that Redis admitted never came: 1,200 of shard 3, 1 of shard 9",
        "dead letters": "2 open: in the ledger's table dead_letters, with error and bytes",
        "outbox": "1 changes that Redis has not been told: the drain tells it",
    }


def test_what_waits_in_the_spool(app: Meter, monkeypatch: pytest.MonkeyPatch) -> None:
    now = datetime.now(UTC)
    folder = Path(".tallystick/spool")
    for age_s in (3, 2_000):
        begun = now - timedelta(seconds=age_s)
        assert warnings() == {}
        spool = Spool(folder, clock=lambda begun=begun: begun)
        for _ in range(2):
            spool.append("log", new_event_id(), b"{}")
        spool.close()
    says = f".tallystick/spool: 4 lines in 2 files, the oldest begun {begun:%Y-%m-%d %H:%M:%S}Z"
    why = "; is the store away that they are for, or are they another ledger's? The log says why they stay"
    assert warnings() == {"spool": says + why}
    next(folder.iterdir()).with_suffix(".damaged").touch()
    assert warnings() == {"spool": f"{says}; 1 files of unreadable lines set aside as *.damaged{why}"}
    monkeypatch.delenv("METERING_QUOTA_URL")
    for path in folder.iterdir():
        path.unlink()
    assert "spool" not in findings()


def test_a_file_that_never_shrinks_is_named(here: Path) -> None:
    assert findings()["space"][1].endswith(" of them free")
    with closing(sqlite3.connect(here)) as connection:
        connection.execute("PRAGMA auto_vacuum = NONE")
        connection.execute("VACUUM")
    assert f"sqlite3 {here} 'PRAGMA auto_vacuum = INCREMENTAL; VACUUM'" in warnings()["space"]
