"""Loads from a Postgres ledger beside writers of any length, and a server that is killed: no row skipped or doubled."""

from __future__ import annotations

import os
import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from decimal import Decimal
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from metering import Meter
from metering.errors import StoreUnavailable
from metering.events import derive_event_id, new_event_id
from metering.ledger import Ledger
from metering.ledger.schema import events
from tasks import costs
from tasks.errors import WarehouseError
from tasks.rebuild import rebuild_warehouse
from tasks.verify import rollup_differences
from tests.servers import PostgresServer, wait_until
from tests.tasks.place import PERIOD, Place, event

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import psycopg

ROUNDS = int(os.environ.get("TALLYSTICK_FAULT_ROUNDS", "2"))
SECRET = "tell/no@one"
COPIED = ", ".join(column.name for column in events.c if column.name not in ("seq", "event_id"))
chance = random.Random(20231116)


def begun(home: Path, ledger_url: str) -> Place:
    """A home whose ledger has the first event, for others to be copied from."""
    place = Place.at(home, ledger_url)
    place.account("acme", "enterprise")
    place.add(event())
    return place


@pytest.fixture
def place(tmp_path: Path, postgres_url: str) -> Place:
    return begun(tmp_path / "home", postgres_url)


@pytest.fixture
def client(place: Place, postgres: PostgresServer) -> Iterator[Callable[[], psycopg.Connection[Any]]]:
    """Opens plain connections to the ledger."""
    opened = []

    def open_one() -> psycopg.Connection[Any]:
        opened.append(postgres.client(place.ledger_url))
        return opened[-1]

    yield open_one
    for connection in opened:
        connection.close()


def insert(connection: psycopg.Connection[Any]) -> int:
    """Another event like the first one; its number."""
    event_id = new_event_id()
    connection.execute("INSERT INTO event_ids (event_id, period) VALUES (%s, %s)", (event_id, PERIOD))
    copied = f"INSERT INTO events (event_id, {COPIED}) SELECT %s, {COPIED} FROM events WHERE seq = 1 RETURNING seq"
    (seq,) = connection.execute(copied, (event_id,)).fetchone() or (0,)
    return int(seq)


def loaded(place: Place) -> list[int]:
    return [seq for (seq,) in place.warehouse_rows("SELECT seq FROM usage_events ORDER BY seq")]


def assert_all_is_loaded_once(place: Place) -> None:
    """Row by row, and in the sums."""
    recorded = place.ledger_rows(
        "SELECT e.seq, e.event_id, e.account, e.requests, e.input_tokens, c.cost "
        "FROM events AS e JOIN event_costs AS c ON c.seq = e.seq ORDER BY e.seq"
    )
    assert len(recorded) == place.ledger_rows("SELECT count(*) FROM events")[0][0]
    copied = place.warehouse_rows(
        "SELECT seq, replace(event_id::VARCHAR, '-', ''), account, requests, input_tokens, cost "
        "FROM usage_events ORDER BY seq"
    )
    assert copied == [(*row, Decimal(cost)) for *row, cost in recorded]
    assert rollup_differences(place.ledger_url, place.warehouse, PERIOD) == []


def test_an_open_writer_holds_back_what_began_after_it_and_no_more(
    place: Place, client: Callable[[], psycopg.Connection[Any]]
) -> None:
    slow, quick = client(), client()
    insert(quick)
    slow.execute("BEGIN")
    lower = insert(slow)
    higher = insert(quick)
    assert lower < higher
    first = place.aggregate()
    assert (first["loaded"], loaded(place)) == (2, [1, 2])
    assert place.aggregate() == {**first, "loaded": 0}
    slow.execute("COMMIT")
    assert place.aggregate()["loaded"] == 2
    assert_all_is_loaded_once(place)


def test_a_load_waits_for_open_writers_also_where_costs_did_not(
    place: Place, client: Callable[[], psycopg.Connection[Any]]
) -> None:
    place.cost()
    slow, quick = client(), client()
    slow.execute("BEGIN; SELECT pg_current_xact_id()")
    quick.execute("INSERT INTO event_costs VALUES (%s, 0, 'by hand', now())", (insert(quick),))
    assert place.load()["loaded"] == 1
    slow.execute("ROLLBACK")
    assert place.load()["loaded"] == 1


def test_what_began_first_and_has_the_highest_number_is_not_skipped(
    place: Place, client: Callable[[], psycopg.Connection[Any]]
) -> None:
    slow, quick = client(), client()
    slow.execute("BEGIN")
    slow.execute("SELECT pg_current_xact_id()")
    held_back = insert(quick)
    assert place.aggregate()["loaded"] == 1
    highest = insert(slow)
    slow.execute("COMMIT")
    assert highest > held_back
    assert place.aggregate()["loaded"] == 2
    assert_all_is_loaded_once(place)


def test_a_number_taken_early_and_committed_late_is_not_skipped(
    place: Place, client: Callable[[], psycopg.Connection[Any]]
) -> None:
    slow, quick = client(), client()
    # It has its number, and no transaction yet: nothing shows that it is there.
    (seq,) = slow.execute("SELECT nextval('events_seq_seq')").fetchone() or (0,)
    higher = insert(quick)
    assert place.aggregate()["loaded"] == 2
    slow.execute("BEGIN")
    renumbered = insert(slow)
    slow.execute("UPDATE events SET seq = %s WHERE seq = %s", (seq, renumbered))
    slow.execute("COMMIT")
    assert seq < higher
    assert place.aggregate()["loaded"] == 1
    assert_all_is_loaded_once(place)


def test_what_is_rolled_back_in_part_or_whole_is_neither_loaded_nor_waited_for(
    place: Place, client: Callable[[], psycopg.Connection[Any]]
) -> None:
    writer = client()
    for statement in ("BEGIN", "SAVEPOINT a", "ROLLBACK TO a", "SAVEPOINT b", "COMMIT", "BEGIN", "ROLLBACK"):
        writer.execute(statement)
        if statement not in ("COMMIT", "ROLLBACK"):
            insert(writer)
    assert place.aggregate()["loaded"] == 4
    assert_all_is_loaded_once(place)


def test_loads_in_a_loop_beside_eight_writers(place: Place, client: Callable[[], psycopg.Connection[Any]]) -> None:
    with place.meter() as meter:
        secret = meter.keys.create("acme").secret
    stop, commits = threading.Event(), [0] * 8

    def admits(number: int) -> None:
        with Meter(place.ledger_url, timeout_s=60) as meter:
            while not stop.is_set():
                assert meter.consume(secret, line="application", model="gpt-4.1", provider="openai").allowed
                commits[number] += 1

    def holds(number: int) -> None:
        """Transactions that end when others have committed so and so often."""
        mine, connection = random.Random(number), client()
        while not stop.is_set():
            connection.execute("BEGIN")
            if mine.random() < 0.5:
                connection.execute("SELECT pg_current_xact_id()")
            for _ in range(mine.randrange(1, 4)):
                enough = sum(commits) + mine.choice([0, 1, 10, 300])
                wait_until(lambda: sum(commits) >= enough or stop.is_set(), "others to commit", 60)  # noqa: B023
                insert(connection)
            connection.execute(mine.choice(["COMMIT"] * 6 + ["ROLLBACK"]))
            commits[number] += 1

    counts = []
    with ThreadPoolExecutor(8) as pool:
        writing = [pool.submit(admits if number < 4 else holds, number) for number in range(8)]
        try:
            while len(list(filter(None, counts))) < ROUNDS:
                counts.append(place.aggregate()["loaded"])
                assert len(counts) < 100 + ROUNDS
        finally:
            stop.set()
        for future in writing:
            future.result()
    counts.append(place.aggregate()["loaded"])
    assert sum(counts) == len(loaded(place))
    assert_all_is_loaded_once(place)
    # That there was something to skip.
    ((turned,),) = place.ledger_rows(
        "SELECT count(*) FROM (SELECT commit_xid, lag(commit_xid) OVER (ORDER BY seq) AS before FROM events) AS e "
        "WHERE commit_xid < before"
    )
    assert turned > 10


def test_a_reversal_that_comes_before_what_it_takes_back(
    place: Place, client: Callable[[], psycopg.Connection[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "EVENTS_PER_COMMIT", 1)
    writer = client()
    writer.execute("BEGIN")
    writer.execute("SELECT pg_current_xact_id()")
    original = event(model="gpt-4.1", line="other")
    place.add(original)
    changed = {"event_id": "%(reversal)s", "corrects": "event_id", "requests": "-requests"}
    changed |= {name: f"-{name}" for name in ("input_tokens", "output_tokens")}
    names = ["event_id", *COPIED.split(", ")]
    writer.execute(
        f"INSERT INTO events ({', '.join(names)}) SELECT {', '.join(changed.get(name, name) for name in names)} "
        "FROM events WHERE event_id = %(original)s",
        {"original": original.event_id, "reversal": derive_event_id("reversal", original.event_id.hex)},
    )
    writer.execute("COMMIT")
    assert place.cost() == 3
    place.load()
    assert place.warehouse_rows("SELECT sum(cost), sum(input_tokens) FROM usage_15m WHERE line = 'other'") == [
        (Decimal(0), 0)
    ]


def test_a_dump_restored_to_a_server_that_is_behind(
    place: Place, client: Callable[[], psycopg.Connection[Any]]
) -> None:
    insert(client())
    place.aggregate()
    insert(client())
    client().execute("UPDATE events SET commit_xid = commit_xid + 1000000")
    with pytest.raises(WarehouseError, match="restored from a dump of another server") as refused:
        place.aggregate()
    with pytest.raises(WarehouseError, match="restored from a dump of another server"):
        rebuild_warehouse.fn(place.ledger_url, place.warehouse)
    remedy = re.search("`(UPDATE .*?)`", str(refused.value))
    assert remedy is not None
    client().execute(remedy[1])
    place.cost()
    assert rebuild_warehouse.fn(place.ledger_url, place.warehouse)["loaded"] == 3
    insert(client())
    assert place.aggregate()["loaded"] == 1
    assert_all_is_loaded_once(place)


@pytest.mark.parametrize("lost", ["the last event", "transactions"])
def test_a_ledger_that_went_backwards(place: Place, client: Callable[[], psycopg.Connection[Any]], lost: str) -> None:
    seq = insert(client())
    place.aggregate()
    before = place.warehouse_rows("SELECT * FROM usage_events")
    if lost == "transactions":
        place.tamper("UPDATE load_watermark SET seq = seq + 1000000")
    else:
        for table in (
            "event_ids WHERE event_id = (SELECT event_id FROM events WHERE seq = %s)",
            "events WHERE seq = %s",
        ):
            client().execute(f"DELETE FROM {table}", (seq,))
    with pytest.raises(WarehouseError, match=r"went backwards.* run `python -m flows rebuild`"):
        place.aggregate()
    assert place.warehouse_rows("SELECT * FROM usage_events") == before


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    # Its log is written by commits only, so in a crash it forgets what numbers it gave to others.
    with PostgresServer(password=SECRET, args=("-c", "wal_writer_delay=10s")) as running:
        yield running


@pytest.fixture
def doomed(tmp_path: Path, server: PostgresServer) -> Place:
    """A place whose server will be killed."""
    url = server.database()
    Ledger(url, create=True).close()
    return begun(tmp_path / "home", url)


def test_a_load_that_loses_its_server_tells_nobody_the_password(
    doomed: Place, server: PostgresServer, capfd: pytest.CaptureFixture[str]
) -> None:
    doomed.aggregate()
    doomed.add(event())
    doomed.cost()
    locking = server.client(doomed.ledger_url)
    locking.execute("BEGIN; LOCK TABLE event_costs")
    with ThreadPoolExecutor(1) as thread:
        load = thread.submit(doomed.load)
        with server.client() as watching:
            wait_until(lambda: load.done() or is_loading(watching, "Lock"), "the load to wait")
        started = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
        server.kill()
        locking.close()
        with pytest.raises(WarehouseError, match=r"cannot be read: .* query \"...\": server closed") as failed:
            load.result()
    with pytest.raises(StoreUnavailable) as refused:
        doomed.load()
    server.start()
    wrong = Place(doomed.home, doomed.ledger_url.replace("%40one", "%40two"))
    with pytest.raises(StoreUnavailable, match="password authentication failed") as mistaken:
        wrong.load()
    assert doomed.load()["loaded"] == 1
    assert_all_is_loaded_once(doomed)
    assert any(b"tasks.load_worker" in line for line in started)
    said = [*map(str, (failed.value, refused.value, mistaken.value)), *capfd.readouterr()]
    written = [path.read_bytes() for path in doomed.home.rglob("*") if path.is_file()]
    for secret in (SECRET, "tell%2Fno", "no@two"):
        assert not [text for text in said if secret in text]
        assert not [data for data in (*started, *written) if secret.encode() in data]


def test_numbers_that_a_crash_has_given_out_again_are_loaded(doomed: Place, server: PostgresServer) -> None:
    doomed.cost()
    with server.client(doomed.ledger_url) as client:
        for _ in range(50):
            client.execute("BEGIN; SELECT pg_current_xact_id()")
            client.execute("ROLLBACK")
        doomed.load()
        (given_out,) = client.execute("SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint").fetchone() or ()
    server.kill()
    server.start()
    doomed.add(event())
    assert doomed.newest() < given_out
    doomed.aggregate()
    assert_all_is_loaded_once(doomed)


def test_a_server_killed_in_the_middle_of_anything(doomed: Place, server: PostgresServer) -> None:
    with doomed.meter() as meter:
        secret = meter.keys.create("acme").secret
    acknowledged: list[str] = []
    for number in range(ROUNDS):
        stop = threading.Event()
        with ThreadPoolExecutor(4) as pool:
            names = [f"{number}-{writer}" for writer in range(3)]
            running = [pool.submit(call, doomed.ledger_url, secret, name, acknowledged, stop) for name in names]
            running.append(pool.submit(aggregate, doomed, stop))
            try:
                if number % 2:
                    wait_for_more(acknowledged, chance.randrange(5, 200))
                else:
                    wait_for_a_load(server)
                server.kill()
                server.start()
                wait_for_more(acknowledged, 10)
            finally:
                stop.set()
            for future in running:
                future.result()
        doomed.aggregate()
        assert_all_is_loaded_once(doomed)
        billed = [key for (key,) in doomed.warehouse_rows("SELECT idempotency_key FROM usage_events")]
        assert sorted(filter(None, billed)) == sorted(acknowledged)


def call(url: str, secret: str, name: str, acknowledged: list[str], stop: threading.Event) -> None:
    """One call after the other, each again until it is answered."""
    with Meter(url, timeout_s=10) as meter:

        def is_answered(key: str) -> bool:
            with suppress(StoreUnavailable):
                return meter.consume(secret, line="application", idempotency_key=key).allowed
            return False

        for number in count():
            key = f"{name}-{number}"
            wait_until(lambda: is_answered(key), "an answer")  # noqa: B023
            acknowledged.append(key)
            if stop.is_set():
                return


def aggregate(place: Place, stop: threading.Event) -> None:
    """One load after the other, whether the server is there or not."""

    def is_over() -> bool:
        with suppress(StoreUnavailable, WarehouseError):
            place.aggregate()
        return stop.is_set()

    wait_until(is_over, "the end", 60)


def wait_for_more(acknowledged: list[str], calls: int) -> None:
    enough = len(acknowledged) + calls
    wait_until(lambda: len(acknowledged) >= enough, "calls to be answered")


def wait_for_a_load(server: PostgresServer) -> None:
    with server.client() as watching:
        wait_until(lambda: is_loading(watching), "a load")


def is_loading(watching: psycopg.Connection[Any], waits_for: str | None = None) -> bool:
    """Whether a load is connected, or waits for something."""
    query = "SELECT wait_event_type FROM pg_stat_activity WHERE application_name = 'tallystick load'"
    return any(waits_for in (None, found) for (found,) in watching.execute(query))
