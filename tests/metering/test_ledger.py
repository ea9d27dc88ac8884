"""The ledger as a file: its schema, what it says when it cannot serve, and that it serves again."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext

from metering.admission.verify import check_counters
from metering.errors import InvalidPlan, InvalidSetting, LedgerError, SchemaMismatch, StoreUnavailable
from metering.ledger import SCHEMA, Ledger, migrations, outbox
from metering.ledger.schema import metadata
from metering.ledger.types import instant_text
from metering.meter import Meter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HOLD_THE_LOCK = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("held", flush=True)
sys.stdin.read()
"""


def path_of(url: str) -> Path:
    return Path(url.removeprefix("sqlite:///"))


def execute(url: str, statement: str) -> None:
    with closing(sqlite3.connect(path_of(url))) as connection, connection:
        connection.execute(statement)


@pytest.fixture
def opened(ledger_url: str) -> Iterator[Ledger]:
    ledger = Ledger(ledger_url)
    yield ledger
    ledger.close()


def test_migrations_build_exactly_the_schema(opened: Ledger) -> None:
    with opened.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, metadata) == []


def test_a_deleted_sequence_number_is_never_used_again(opened: Ledger) -> None:
    with opened.read() as connection:
        sql = connection.exec_driver_sql("SELECT sql FROM sqlite_master WHERE name = 'events'").scalar_one()
    assert "AUTOINCREMENT" in sql


def test_the_file_is_opened_as_durable_as_it_gets(opened: Ledger) -> None:
    with opened.read() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 5000}


def test_each_ledger_has_an_id_of_its_own(tmp_path: Path) -> None:
    ids = set()
    for name in ("a.db", "b.db"):
        ledger = Ledger(f"sqlite:///{tmp_path}/deep/{name}", create=True)
        assert (ledger.is_new, ledger.revision()) == (True, SCHEMA)
        with ledger.read() as connection:
            ids.add(connection.exec_driver_sql("SELECT ledger_id FROM ledger_info").scalar_one())
        ledger.close()
    assert len(ids) == 2
    again = Ledger(f"sqlite:///{tmp_path}/deep/a.db", create=True)
    assert not again.is_new
    again.close()


@pytest.mark.parametrize(
    ("revision", "message"),
    [
        ("'9999'", f"schema 9999 is newer than {SCHEMA}, the newest this tallystick knows; upgrade tallystick"),
        ("'0000'", f"schema 0000 is older than {SCHEMA}; run `tallystick migrate`"),
    ],
)
def test_another_schema_is_refused(ledger_url: str, revision: str, message: str) -> None:
    execute(ledger_url, f"UPDATE alembic_version SET version_num = {revision}")
    with pytest.raises(SchemaMismatch) as caught:
        Ledger(ledger_url)
    assert str(caught.value) == f"ledger {path_of(ledger_url)}: {message}"
    if "newer" in message:
        with pytest.raises(SchemaMismatch):
            Ledger(ledger_url, upgrade=True)


def test_the_first_ledger_is_upgraded_with_all_it_holds(
    open_meter: Callable[..., Meter], tmp_path: Path, clock: Any
) -> None:
    meter = open_meter()
    secret = meter.keys.create("acme", plan="pro").secret
    event_id = meter.consume(secret, line="a", idempotency_key="k", response="r").event_id
    meter.reserve(secret, line="a")
    url = f"sqlite:///{tmp_path}/old.db"
    make_first_ledger(path_of(url), meter.ledger.path)
    before = contents(path_of(url))
    assert before["events"] != before["holds"] != []

    with pytest.raises(SchemaMismatch, match=f"schema 0001 is older than {SCHEMA}; run `tallystick migrate`"):
        Ledger(url)
    ledger = Ledger(url, upgrade=True)
    with ledger.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
        assert [outbox.version_of(connection, account) for account in ("acme", "other")] == [1, 1]
        assert outbox.unsent(connection, 9) == []
    ledger.close()
    after = contents(path_of(url))
    before["event_ids"] = [(*row, None) for row in before["event_ids"]]
    goes = instant_text(clock.now + timedelta(days=30))
    before["request_log"] = [(*row[:8], goes, *row[8:]) for row in before["request_log"]]
    chained = {name: contents(meter.ledger.path)[name] for name in ("admin_log", "chains")}
    assert {name: after[name] for name in after.keys() & (before.keys() | chained)} == before | chained

    with Meter(url, clock=clock) as upgraded:
        replay = upgraded.consume(secret, line="a", idempotency_key="k")
        assert (replay.event_id, replay.replayed, replay.response) == (event_id, True, "r")
        assert upgraded.consume(secret, line="a").allowed
        assert upgraded.quota("acme")[0].used == 3
        with upgraded.ledger.read() as connection:
            assert outbox.version_of(connection, "acme") == 1
        upgraded.keys.create("acme")
        with upgraded.ledger.read() as connection:
            assert outbox.version_of(connection, "acme") == 2


def test_an_empty_ledger_has_no_versions_to_start_with(opened: Ledger) -> None:
    with opened.read() as connection:
        assert outbox.version_of(connection, "acme") == 0


def make_first_ledger(path: Path, source: Path) -> None:
    """A ledger at revision 0001, with the rows of a newer one."""
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__path__[0])))
    engine = sa.create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.exec_driver_sql("DELETE FROM ledger_info")
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("ATTACH ? AS source", (str(source),))
        for name in tables(connection):
            columns = ", ".join(row[1] for row in connection.execute(f"PRAGMA table_info({name})"))
            connection.execute(f"INSERT INTO {name} ({columns}) SELECT {columns} FROM source.{name}")
    engine.dispose()


def tables(connection: sqlite3.Connection) -> list[str]:
    found = connection.execute("SELECT name FROM main.sqlite_master WHERE type = 'table'").fetchall()
    return [name for (name,) in found if name not in ("alembic_version", "sqlite_sequence")]


def contents(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    with closing(sqlite3.connect(path)) as connection:
        return {
            name: sorted(connection.execute(f"SELECT * FROM {name}").fetchall(), key=repr)
            for name in tables(connection)
        }


def test_a_database_without_schema_is_named(tmp_path: Path) -> None:
    execute(f"sqlite:///{tmp_path}/x.db", "CREATE TABLE mine (a)")
    with pytest.raises(SchemaMismatch, match="has no Tallystick schema; `tallystick init` creates it"):
        Ledger(f"sqlite:///{tmp_path}/x.db")


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_text("account,requests\nacme,5\n" * 100)
    for create in (False, True):
        with pytest.raises(LedgerError, match=r"x\.db: not a readable SQLite database"):
            Ledger(f"sqlite:///{tmp_path}/x.db", create=create)


def test_a_ledger_that_is_not_there_is_named_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match=r"x\.db: cannot be opened; `tallystick init` creates it"):
        Ledger(f"sqlite:///{tmp_path}/x.db")
    assert not (tmp_path / "x.db").exists()


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable, match=r"ledger\.db: its folder cannot be used"):
        Ledger(f"sqlite:///{tmp_path}/file/ledger.db", create=True)
    (tmp_path / "folder.db").mkdir()
    with pytest.raises(StoreUnavailable, match=r"folder\.db: cannot be opened"):
        Ledger(f"sqlite:///{tmp_path}/folder.db", create=True)


@pytest.mark.parametrize("url", ["mysql://me:secret@host/db?password=secret", "sqlite:///", "ledger.db"])
def test_a_url_that_is_no_ledger_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(InvalidSetting, match="expected sqlite:///FILE") as caught:
        Ledger(url)
    assert "secret" not in str(caught.value)


def test_a_ledger_with_broken_plans_is_not_half_made(tmp_path: Path) -> None:
    plans, url = tmp_path / "plans.toml", f"sqlite:///{tmp_path}/ledger.db"
    plans.write_text("[plans.mine]\nretention_days = -1\n")
    with pytest.raises(InvalidPlan):
        Meter(url, plans=plans)
    plans.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidSetting, match="a readable file"):
        Meter(url, plans=plans)
    plans.write_text("[plans.mine]\nretention_days = 1\n")
    with Meter(url, plans=plans) as meter:
        assert meter.ledger.is_new
        assert meter.keys.create("acme", plan="mine").plan == "mine"


def test_a_full_disk_is_no_refusal_and_leaves_nothing_half_written(open_meter: Callable[..., Meter]) -> None:
    meter = open_meter()
    secret = meter.keys.create("acme", plan="pro").secret

    def set_most_pages(cursor: sqlite3.Cursor, more: int) -> None:
        pages = cursor.execute("PRAGMA page_count").fetchone()[0]
        cursor.execute(f"PRAGMA max_page_count = {pages + more}")

    meter.ledger.writer.run(lambda cursor: set_most_pages(cursor, 2))
    body = {"text": "x" * 2_000}

    told: list[str] = []

    def fill() -> int:
        for number in range(1_000):
            try:
                meter.consume(secret, line="a", idempotency_key=f"k{number}", request=body, response=body)
            except StoreUnavailable as exc:
                told.append(str(exc))
                return number
        return 1_000

    admitted = fill()
    assert told == [f"ledger {meter.ledger.path}: the disk is full; nothing of this call was written"]
    assert 0 < admitted < 1_000
    assert_holds(meter, admitted)
    assert meter.consume(secret, line="a", idempotency_key="k0", request=body).replayed, (
        "what needs no room still works"
    )
    meter.ledger.writer.run(lambda cursor: set_most_pages(cursor, 1_000))
    assert meter.consume(secret, line="a", idempotency_key=f"k{admitted}", request=body, response=body).allowed
    assert_holds(meter, admitted + 1)


def assert_holds(meter: Meter, events: int) -> None:
    with meter.ledger.read() as connection:
        counts = {
            table: connection.exec_driver_sql(f"SELECT count(*) FROM {table}").scalar_one()
            for table in ("events", "event_ids", "request_log", "replays")
        }
    assert counts == dict.fromkeys(counts, events)
    assert meter.quota("acme")[0].used == events
    assert all(check.agrees for check in check_counters(meter.ledger))


def test_a_ledger_held_by_another_process_is_waited_for_and_no_longer(open_meter: Callable[..., Meter]) -> None:
    meter = open_meter(timeout_s=0.3)
    secret = meter.keys.create("acme", plan="pro").secret
    hold = meter.reserve(secret, line="a")
    arguments: list[Any] = [sys.executable, "-c", HOLD_THE_LOCK, str(meter.ledger.path)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        for call in (lambda: meter.consume(secret, line="a"), lambda: meter.keys.create("acme")):
            with pytest.raises(StoreUnavailable, match="another writer held it for longer than the timeout"):
                call()
        assert hold.settle().pending
        assert meter.quota("acme")[0].used == 1, "reading goes on"
        holder.communicate(timeout=30)
    meter.flush()
    assert hold.settle().billable
    assert meter.consume(secret, line="a").allowed
    assert meter.quota("acme")[0].used == 2


def test_closing_waits_for_no_one_and_the_next_call_opens_again(open_meter: Callable[..., Meter]) -> None:
    meter = open_meter()
    secret = meter.keys.create("acme", plan="pro").secret
    meter.consume(secret, line="a")
    meter.close()
    assert not Path(f"{meter.ledger.path}-wal").exists()
    meter.close()
    assert meter.consume(secret, line="a").allowed
