"""Archives: nothing leaves the ledger that is not in a verified file, and every sum stays what it was."""

from __future__ import annotations

import json
import shutil
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import duckdb
import pytest

from metering.errors import Conflict, CorrectionConflict, EventsArchived, NotFound
from metering.events import TokenUsage
from metering.history import histories_of
from metering.ledger import Ledger, admin_log
from metering.ledger.retention import Kept
from metering.legal_holds import place_hold, release_hold
from metering.plans import Plan
from tasks.archives import archive_period, due_periods
from tasks.errors import ArchiveError, JobError, WarehouseError
from tasks.explain import explain_item
from tasks.rebuild import rebuild_warehouse
from tasks.recost import Act, recost_period
from tasks.restore import restore_period
from tasks.retention import archive_over, find_over
from tasks.verify import (
    archive_differences,
    close_differences,
    document_differences,
    invoice_differences,
    rollup_differences,
)
from tests.tasks.closed import close
from tests.tasks.place import NOVEMBER, PERIOD, Place, event, month_of_usage

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from uuid import UUID

    from tests.servers import PostgresServer

CLOSED = NOVEMBER + timedelta(days=17)
LATER = NOVEMBER + timedelta(days=60)
ACCOUNTS = tuple(f"account-{number}" for number in range(6))
EVENTS = "SELECT * FROM usage_events ORDER BY seq"
SUMS = """SELECT * EXCLUDE (requests, input_tokens, output_tokens, quantity, cost, unpriced_requests), sum(requests),
    sum(input_tokens), sum(output_tokens), sum(quantity), sum(cost), sum(unpriced_requests) FROM usage_15m
    GROUP BY ALL ORDER BY ALL"""


@pytest.fixture
def ledger_url(either_url: str) -> str:
    return either_url


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def closed_month(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, empty_ledger: Path) -> Place:
    """A month of six accounts, billed and closed, to be copied."""
    home = tmp_path_factory.mktemp("closed_month") / "home"
    if request.param == "sqlite":
        home.mkdir()
        shutil.copy(empty_ledger, home / "ledger.db")
        place = Place(home)
    else:
        server = request.getfixturevalue("postgres")
        place = Place.at(home, server.database(like=request.getfixturevalue("empty_postgres")))
    month_of_usage(place, events=120)
    place.aggregate()
    place.invoice()
    for account in ACCOUNTS:
        close(place, account)
    return place


@pytest.fixture
def month(closed_month: Place, tmp_path: Path, postgres: PostgresServer) -> Iterator[Place]:
    """A copy of it for one test."""
    home = shutil.copytree(closed_month.home, tmp_path / "home")
    if closed_month.url is None:
        yield Place(home)
        return
    url = postgres.database(like=closed_month.url)
    yield Place(home, url)
    postgres.drop(url)


def archive(place: Place, *, after_days: int = 0, now: Any = LATER) -> list[str]:
    return [str(line) for line in archive_over.fn(place.ledger_url, place.archives, now, after_days)]


def rebuild(place: Place) -> dict[str, int]:
    return rebuild_warehouse.fn(place.ledger_url, place.warehouse, place.archives)


def recorded(place: Place, table: str = "events") -> int:
    return int(place.ledger_rows(f"SELECT count(*) FROM {table}")[0][0])


def files(place: Place) -> list[Path]:
    return sorted(place.archives.rglob("*.parquet"))


def test_events_leave_the_ledger_and_every_sum_stays(month: Place) -> None:
    events, sums = month.warehouse_rows(EVENTS), month.warehouse_rows(SUMS)
    found = [str(line) for line in find_over.fn(month.ledger_url, LATER, Kept(), 0)]
    assert found == [f"events of {PERIOD}: 20 rows of {account}" for account in ACCOUNTS]
    assert recorded(month) == 120
    assert archive(month) == found
    assert (recorded(month), recorded(month, "event_costs"), recorded(month, "event_ids")) == (0, 0, 120)
    assert archive(month) == []
    # What is loaded is still what was recorded, a load finds nothing new, and a new warehouse has all of it.
    assert rollup_differences(month.ledger_url, month.warehouse, PERIOD, month.archives) == []
    # Which needs no file, because it has all of it.
    month.archives.rename(month.home / "elsewhere")
    assert month.load()["loaded"] == 0
    with pytest.raises(WarehouseError, match=", and its events are not here"):
        rebuild(month)
    (month.home / "elsewhere").rename(month.archives)
    assert rebuild(month)["loaded"] == 120
    assert month.warehouse_rows(EVENTS) == events
    assert month.warehouse_rows(SUMS) == sums
    assert rebuild(month)["loaded"] == 120
    assert month.load()["loaded"] == 0


def test_a_close_stands_whatever_leaves_the_ledger(place: Place) -> None:
    """Closed, archived, made anew, with late usage and the next close: as if all events were still there."""
    month_of_usage(place, events=120)
    closed = place.close(at=CLOSED)
    assert (closed.accounts, [account for account, _ in closed.refused]) == (5, ["account-1"])
    place.invoice()
    written = place.files()
    assert [line for line in archive(place) if "stay" in line] == []
    assert recorded(place) == 20  # those of the account that could not be billed
    assert rebuild(place)["loaded"] == 120
    for number in range(1, 6):
        assert document_differences(place.ledger_url, place.out, f"INV-{number:06d}") == []
    assert invoice_differences(place.ledger_url, place.out, PERIOD, place.archives) == []
    place.invoice()
    assert place.files() == written

    late = event("account-0", usage=TokenUsage(input_tokens=7_000_000))
    place.add(late)
    place.aggregate()
    place.invoice("2023-12")
    assert invoice_differences(place.ledger_url, place.out, "2023-12", place.archives) == []
    [draft] = [each for each in place.invoices("2023-12").values() if each.account == "account-0"]
    [item] = [item for item in draft.items if item.period == PERIOD and item.metric == "uncached_input_tokens"]
    # What came late is archived once it was billed, and not before.
    assert archive(place) == []
    assert recorded(place) == 21
    place.close("2023-12", at=CLOSED + timedelta(days=31))
    archive(place)
    assert recorded(place) == 20
    assert rebuild(place)["loaded"] == 121
    explained = explain_item(place.ledger_url, place.warehouse, "INV-000006", item.item_id)
    assert late.event_id in {each.event_id for each in explained.events}
    assert close_differences(place.ledger_url) == []


def test_new_usage_is_costed_loaded_and_billed_beside_archives(month: Place) -> None:
    archive(month)
    december = event("account-0", at=NOVEMBER + timedelta(days=20))
    month.add(december)
    assert month.aggregate()["loaded"] == 1
    assert rebuild(month)["loaded"] == 121
    assert month.warehouse_rows("SELECT count(*) FROM usage_events WHERE period = '2023-12'") == [(1,)]
    assert rollup_differences(month.ledger_url, month.warehouse, PERIOD, month.archives) == []
    # What is known is known for ever.
    month.add(december)
    assert recorded(month) == 1


def test_a_period_waits_for_its_time(month: Place) -> None:
    assert archive(month, after_days=400) == []
    assert archive(month, after_days=400, now=CLOSED + timedelta(days=399)) == []
    # A window of a month may still be open.
    assert archive(month, now=CLOSED + timedelta(days=29)) == []
    assert not month.archives.exists()
    assert len(archive(month, after_days=400, now=CLOSED + timedelta(days=401))) == 6


def test_what_is_open_or_not_loaded_stays(place: Place) -> None:
    place.account("acme")
    place.account("quiet")
    place.add(event(), event())
    assert archive(place) == []
    close(place, "acme")
    close(place, "quiet")
    # Without costs nothing of it can be loaded.
    assert archive(place) == [f"events of {PERIOD}: 2 rows of acme stay: not all of the period is billed or costed"]
    assert recorded(place) == 2
    place.aggregate()
    assert archive(place) == [f"events of {PERIOD}: 2 rows of acme"]


def test_what_came_late_waits_until_it_is_billed(place: Place) -> None:
    place.account("acme")
    place.add(event(), event())
    place.aggregate()
    close(place, "acme")
    place.add(event(quantity=5))
    place.aggregate()
    stays = f"events of {PERIOD}: 2 rows of acme stay: not all of the period is billed or costed"
    assert archive(place) == [stays]
    close(place, "acme")
    assert archive(place) == [f"events of {PERIOD}: 3 rows of acme"]
    place.add(event(quantity=7), event(quantity=8))
    place.aggregate()
    assert archive(place) == []
    assert recorded(place) == 2
    close(place, "acme")
    assert archive(place) == [f"events of {PERIOD}: 2 rows of acme"]
    assert [path.name[-10:] for path in files(place)] == ["-0.parquet", "-1.parquet"]
    assert rebuild(place)["loaded"] == 5
    assert rollup_differences(place.ledger_url, place.warehouse, PERIOD, place.archives) == []


def test_a_legal_hold_wins_also_in_the_middle(month: Place) -> None:
    ledger = Ledger(month.ledger_url)
    place_hold(ledger, "account-0", reason="case", actor="counsel", now=LATER)
    held = f"events of {PERIOD}: 20 rows of account-0 stay: legal hold"
    assert held in [str(line) for line in find_over.fn(month.ledger_url, LATER, Kept(), 0)]
    found = archive(month)
    assert held in found
    assert len(found) == 6
    assert (recorded(month), len(files(month))) == (20, 5)
    release_hold(ledger, "account-0", actor="counsel", now=LATER)
    # One that comes between the archive and the deletion keeps what is still there.
    [due] = due_periods(ledger, LATER, 0)
    assert archive_period(ledger, month.archives, due, LATER)
    place_hold(ledger, "account-0", reason="case", actor="counsel", now=LATER)
    assert archive(month) == []
    assert recorded(month) == 20
    with pytest.raises(JobError, match=f"some events of {PERIOD} are archived and not deleted yet"):
        rollup_differences(month.ledger_url, month.warehouse, PERIOD, month.archives)
    assert rebuild(month)["loaded"] == 120
    release_hold(ledger, "account-0", actor="counsel", now=LATER)
    ledger.close()
    assert archive(month) == [f"events of {PERIOD}: 20 rows of account-0"]


def test_nothing_goes_while_its_file_is_not_what_was_archived(month: Place) -> None:
    ledger = Ledger(month.ledger_url)
    for due in due_periods(ledger, LATER, 0):
        assert archive_period(ledger, month.archives, due, LATER)
    ledger.close()
    changed = files(month)[2]
    flip(changed)
    with pytest.raises(JobError, match="it was changed") as caught:
        archive(month)
    assert str(changed) in str(caught.value)
    assert recorded(month) == 20
    flip(changed)
    archive(month)
    assert recorded(month) == 0


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_changed_file_is_named(month: Place) -> None:
    archive(month)
    assert archive_differences(month.ledger_url, month.archives) == []
    parquet, second, third, *_ = files(month)
    flip(parquet)
    manifest = second.with_suffix(".json")
    manifest.write_text(manifest.read_text().replace('"events":20', '"events":21'))
    third.unlink()
    found = archive_differences(month.ledger_url, month.archives)
    assert [line.partition(": ")[0] for line in found] == [str(parquet), str(manifest), str(third)]
    assert "it was changed" in found[0]
    assert found[1].endswith("is not the manifest that the ledger has")
    assert "cannot be read: No such file" in found[2]
    with pytest.raises(WarehouseError, match="it was changed"):
        rebuild(month)
    with pytest.raises(ArchiveError, match="it was changed"):
        rollup_differences(month.ledger_url, month.warehouse, PERIOD, month.archives)


def test_a_manifest_says_what_is_in_the_file(month: Place) -> None:
    archive(month)
    for path in files(month):
        manifest = json.loads(path.with_suffix(".json").read_text())
        with duckdb.connect() as connection:
            row = connection.execute(
                "SELECT count(*), sum(input_tokens), sum(quantity), sum(cost), min(seq), max(seq) FROM read_parquet(?)",
                [str(path)],
            ).fetchone()
        sums = manifest["sums"]
        assert row is not None
        assert (manifest["events"], int(sums["input_tokens"]), manifest["seq_from"], manifest["seq_to"]) == (
            *row[:2],
            *row[4:],
        )
        assert (float(sums["quantity"]), float(sums["cost"])) == (float(row[2]), float(row[3]))
        assert manifest["bytes"] == path.stat().st_size
    ledger = Ledger(month.ledger_url)
    with ledger.read() as connection:
        noted = [entry for entry in admin_log.entries(connection, limit=6) if entry.action == "events.archive"]
    ledger.close()
    assert sorted(entry.subject for entry in noted) == list(ACCOUNTS)


def test_nothing_that_an_app_writes_freely_is_archived(place: Place) -> None:
    place.account("acme")
    place.add(event(attributes={"who": "Ann Example"}, session_id="ann@example.org", error="for Ann Example"))
    place.aggregate()
    close(place, "acme")
    archive(place)
    [path] = files(place)
    with duckdb.connect() as connection:
        names = {row[0] for row in connection.execute("DESCRIBE FROM read_parquet(?)", [str(path)]).fetchall()}
    assert {"event_id", "cost", "run_id", "idempotency_key", "fingerprint"} <= names
    assert not names & {"attributes", "session_id", "error"}


def test_a_restore_reads_back_where_nothing_bills(month: Place) -> None:
    before = month.warehouse_rows(EVENTS)
    with pytest.raises(JobError, match=f"no events of {PERIOD} are archived"):
        restore_period(month.ledger_url, month.warehouse, month.archives, PERIOD)
    archive(month)
    for _ in range(2):
        found = restore_period(month.ledger_url, month.warehouse, month.archives, PERIOD)
        assert found == {"files": 6, "events": 120}
    same = "SELECT seq, event_id::UUID, account, cost FROM restored.usage_events ORDER BY seq"
    assert month.warehouse_rows(same) == [(row[0], row[1], row[4], row[-2]) for row in before]
    assert month.warehouse_rows(EVENTS) == before
    month.invoice()
    written = month.files()
    month.load()
    month.invoice()
    assert month.files() == written
    flip(files(month)[0])
    with pytest.raises(ArchiveError, match="it was changed"):
        restore_period(month.ledger_url, month.warehouse, month.archives, PERIOD)


# What asks for events that are no longer there


@pytest.fixture
def archived(place: Place) -> tuple[Place, UUID]:
    """An archived event of `acme`, which has another one in December."""
    place.account("acme")
    november = event(usage=TokenUsage(input_tokens=10), source="key-1")
    place.add(november, event(at=NOVEMBER + timedelta(days=20)))
    place.aggregate()
    close(place, "acme")
    archive(place)
    return place, november.event_id


def test_usage_is_counted_over_what_is_there_or_not_at_all(archived: tuple[Place, UUID]) -> None:
    place, _ = archived
    with place.meter() as meter:
        with pytest.raises(EventsArchived, match="events of account 'acme' up to 2023-11-16"):
            meter.usage("acme")
        with pytest.raises(EventsArchived):
            meter.usage("acme", start=NOVEMBER)
        [december] = meter.usage("acme", start=NOVEMBER + timedelta(seconds=1))
        assert december.requests == 1
        [before] = meter.usage("acme", end=NOVEMBER)
        assert before.requests == 0


def test_an_archived_event_is_not_corrected(archived: tuple[Place, UUID]) -> None:
    place, event_id = archived
    with (
        place.meter() as meter,
        pytest.raises(CorrectionConflict, match=f"event {event_id} of {PERIOD} is archived, so it can no longer be"),
    ):
        meter.correct(event_id, usage=TokenUsage(input_tokens=1), reason="late")
    assert recorded(place) == 1


def test_an_event_that_is_about_to_go_is_not_corrected(place: Place) -> None:
    place.account("acme")
    one = event()
    place.add(one)
    place.aggregate()
    close(place, "acme")
    ledger = Ledger(place.ledger_url)
    [due] = due_periods(ledger, LATER, 0)
    assert archive_period(ledger, place.archives, due, LATER)
    with place.meter() as meter, pytest.raises(CorrectionConflict, match="is archived"):
        meter.correct(one.event_id, usage=TokenUsage(input_tokens=1), reason="late")
    ledger.close()


def test_a_correction_that_comes_while_a_file_is_written_keeps_the_period(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks import archives

    place.account("acme")
    one = event()
    place.add(one)
    place.aggregate()
    close(place, "acme")
    ledger = Ledger(place.ledger_url)
    [due] = due_periods(ledger, LATER, 0)

    def check_file(*said: Any, **options: Any) -> None:
        with place.meter() as meter:
            meter.correct(one.event_id, usage=TokenUsage(input_tokens=1), reason="late")

    monkeypatch.setattr(archives, "check_file", check_file)
    assert not archive_period(ledger, place.archives, due, LATER)
    ledger.close()
    assert recorded(place, "archives") == 0
    assert recorded(place) == 3


def test_a_trace_says_that_it_is_archived(archived: tuple[Place, UUID]) -> None:
    place, event_id = archived
    with place.meter() as meter, pytest.raises(NotFound, match=f"was billed in {PERIOD}, and its events are archived"):
        histories_of(meter.ledger, str(event_id), out=place.out)


def test_plans_zones_and_costs_stay_as_archived_events_had_them(archived: tuple[Place, UUID]) -> None:
    place, _ = archived
    place.change("DELETE FROM event_costs")
    place.change("DELETE FROM events")
    with place.meter() as meter:
        with pytest.raises(Conflict, match="has usage: its time zone and anchor day"):
            meter.accounts.update("acme", time_zone="Asia/Kolkata")
        with pytest.raises(Conflict, match="may have events since"):
            meter.apply_plans([Plan(name="free", retention_days=1)], effective_from=NOVEMBER - timedelta(days=1))
    act = Act(period=PERIOD, actor="ann", reason="new prices", made_at=LATER)
    with pytest.raises(JobError, match=f"events of {PERIOD} are archived, such as those of 'acme'"):
        recost_period.fn(place.ledger_url, place.warehouse, act, dry_run=True)


def test_counters_of_archived_windows_are_forgotten(place: Place) -> None:
    now = [NOVEMBER]
    with Place(place.home, place.url, lambda: now[0]).meter() as meter:
        secret = meter.keys.create("acme", plan="free").secret
        for _ in range(3):
            assert meter.consume(secret, line="a").allowed
        place.aggregate()
        close(place, "acme")
        assert recorded(place, "counters") > 0
        archive(place)
        assert recorded(place, "counters") == 0
        now[0] = LATER
        assert meter.consume(secret, line="a").allowed
        assert meter.quota("acme")[0].used == 1
