"""The admin log is append-only, and chained: what was changed, removed, moved or put in is found, and named."""

from __future__ import annotations

import shutil
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from metering.ledger import Ledger, admin_log, migrations
from metering.ledger.chains import EMPTY, Fault, Head, Link, digest_of, faults
from metering.ledger.postgres import connect

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from metering import Meter
    from tests.metering.conftest import Ran
    from tests.servers import PostgresServer

NOW = datetime(2026, 3, 12, 12, 0, 0, 250_000, tzinfo=UTC)
TEXTS = ("logged_at", "actor", "action", "subject", "details", "previous", "digest")

said = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)
times = st.datetimes(timezones=st.just(UTC))
notes = st.fixed_dictionaries({"at": times, "actor": said, "action": said, "subject": said, "label": said | st.none()})
logs = st.lists(notes, min_size=1, max_size=6)


def write(ledger: Ledger, log: list[dict[str, Any]]) -> None:
    with ledger.write() as connection:
        for entry in log:
            admin_log.note(connection, **entry)


def three(ledger: Ledger) -> None:
    write(ledger, [{"at": NOW, "actor": "ann", "action": "key.revoke", "subject": f"key_{n}"} for n in (1, 2, 3)])


def verified(ledger: Ledger) -> tuple[Head, list[Fault]]:
    with ledger.read() as connection:
        return admin_log.verify(connection)


def named(found: list[Fault]) -> set[int | None]:
    return {fault.entry for fault in found}


# The rule itself


def chain(numbers: list[int]) -> tuple[list[Link], Head]:
    links, head = [], EMPTY
    for number in numbers:
        content = (b"%d" % number, b"what")
        link = Link(number=number, previous=head.digest, digest=digest_of(head.digest, content), content=content)
        links.append(link)
        head = Head(length=head.length + 1, digest=link.digest)
    return links, head


@given(st.sets(st.integers(-5, 60), max_size=9), st.data())
def test_numbers_may_leave_some_out_but_no_link_is_left_out(numbers: set[int], data: st.DataObject) -> None:
    links, head = chain(sorted(numbers))
    assert list(faults(links, head)) == []
    if links:
        gone = data.draw(st.integers(0, len(links) - 1))
        left = links[:gone] + links[gone + 1 :]
        beside = links[gone + 1] if gone < len(left) else left[-1] if left else None
        found = list(faults(left, head))
        assert named(found) == {None, beside.number if beside else None}
        assert found[-1].problem == f"{len(left)} entries are there, {len(links)} were written"


def test_a_digest_is_sha_256_over_netstrings() -> None:
    # printf '64:%064d,1:1,3:ann,0:,' 0 | sha256sum
    assert digest_of(EMPTY.digest, (b"1", b"ann", b"")) == (
        "5ce587ed1a7017bfc65b185f9a1226529f815ece94fb2bad28afc951c6de20f6"
    )
    assert digest_of(EMPTY.digest, (b"1", b"an", b"n")) != digest_of(EMPTY.digest, (b"1", b"ann", b""))


# In a file


@pytest.fixture
def fresh(empty_ledger: Path, tmp_path: Path) -> Callable[[], Ledger]:
    """Makes the test's ledger anew."""

    def make() -> Ledger:
        for path in tmp_path.glob("chain.db*"):
            path.unlink()
        shutil.copy(empty_ledger, tmp_path / "chain.db")
        return Ledger(f"sqlite:///{tmp_path / 'chain.db'}")

    return make


@contextmanager
def tampering(ledger: Ledger) -> Iterator[sqlite3.Connection]:
    """Somebody who can write the file, and takes the triggers away."""
    with closing(sqlite3.connect(ledger.path)) as connection, connection:
        triggers = connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for (name,) in triggers:
            connection.execute(f"DROP TRIGGER {name}")
        yield connection


in_files = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@in_files
@given(log=logs)
def test_a_log_that_nobody_touched_holds(fresh: Callable[[], Ledger], log: list[dict[str, Any]]) -> None:
    with closing(fresh()) as ledger:
        assert verified(ledger) == (EMPTY, [])
        write(ledger, log)
        head, found = verified(ledger)
        assert (head.length, found) == (len(log), [])
        with ledger.read() as connection:
            assert admin_log.entries(connection, limit=1)[0].digest == head.digest


@in_files
@given(log=logs, data=st.data())
def test_a_flipped_byte_is_found_and_named(
    fresh: Callable[[], Ledger], log: list[dict[str, Any]], data: st.DataObject
) -> None:
    with closing(fresh()) as ledger:
        write(ledger, log)
        entry, column = data.draw(st.integers(1, len(log))), data.draw(st.sampled_from(TEXTS))
        with tampering(ledger) as connection:
            query = f"SELECT CAST({column} AS BLOB) FROM admin_log WHERE entry = ?"
            kept = bytearray(connection.execute(query, (entry,)).fetchone()[0])
            if kept:
                kept[data.draw(st.integers(0, len(kept) - 1))] ^= data.draw(st.integers(1, 255))
            else:
                kept = bytearray(b"x")
            connection.execute(f"UPDATE admin_log SET {column} = CAST(? AS TEXT) WHERE entry = ?", (bytes(kept), entry))
        _, found = verified(ledger)
        assert named(found) == {entry}


@in_files
@given(log=logs, data=st.data())
def test_a_changed_number_is_found_and_named(
    fresh: Callable[[], Ledger], log: list[dict[str, Any]], data: st.DataObject
) -> None:
    with closing(fresh()) as ledger:
        write(ledger, log)
        entry = data.draw(st.integers(1, len(log)))
        number = entry ^ (1 << data.draw(st.integers(0, 40)))
        assume(not 1 <= number <= len(log))
        with tampering(ledger) as connection:
            connection.execute("UPDATE admin_log SET entry = ? WHERE entry = ?", (number, entry))
        assert number in named(verified(ledger)[1])


@in_files
@given(log=logs, data=st.data())
def test_a_deleted_entry_is_found_wherever_it_stood(
    fresh: Callable[[], Ledger], log: list[dict[str, Any]], data: st.DataObject
) -> None:
    with closing(fresh()) as ledger:
        write(ledger, log)
        entry = data.draw(st.integers(1, len(log)))
        with tampering(ledger) as connection:
            connection.execute("DELETE FROM admin_log WHERE entry = ?", (entry,))
        beside = entry + 1 if entry < len(log) else entry - 1 or None
        head, found = verified(ledger)
        assert named(found) == {beside, None}
        assert head.length == len(log)
        # What is written afterwards does not heal it.
        write(ledger, log[:1])
        assert verified(ledger)[1]


@in_files
@given(log=logs, data=st.data())
def test_entries_that_change_places_are_found(
    fresh: Callable[[], Ledger], log: list[dict[str, Any]], data: st.DataObject
) -> None:
    assume(len(log) > 1)
    with closing(fresh()) as ledger:
        write(ledger, log)
        pairs = st.lists(st.integers(1, len(log)), min_size=2, max_size=2, unique=True)
        one, other = data.draw(pairs)
        with tampering(ledger) as connection:
            for number, place in ((one, -1), (other, one), (-1, other)):
                connection.execute("UPDATE admin_log SET entry = ? WHERE entry = ?", (place, number))
        assert {one, other} <= named(verified(ledger)[1])


@in_files
@given(log=logs, forged=notes, number=st.integers(-3, 12), data=st.data())
def test_an_entry_that_was_put_in_is_found_though_its_own_digest_holds(
    fresh: Callable[[], Ledger],
    log: list[dict[str, Any]],
    forged: dict[str, Any],
    number: int,
    data: st.DataObject,
) -> None:
    assume(not 1 <= number <= len(log))
    with closing(fresh()) as ledger:
        write(ledger, log)
        with tampering(ledger) as connection:
            digests = [row[0] for row in connection.execute("SELECT digest FROM admin_log ORDER BY entry")]
            previous = data.draw(st.sampled_from([EMPTY.digest, *digests, "f" * 64]))
            row = [number, "2026-01-01T00:00:00.000000Z", forged["actor"], forged["action"], forged["subject"], "{}"]
            own = digest_of(previous, (str(value).encode() for value in row))
            connection.execute("INSERT INTO admin_log VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*row, previous, own))
        found = named(verified(ledger)[1])
        assert None in found
        assert {number, 1} & found if number < 1 else number in found


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("UPDATE chains SET length = 2", {None}),
        ("UPDATE chains SET length = 4", {None}),
        ("UPDATE chains SET digest = 'x'", {3}),
        ("DELETE FROM chains", {1, None}),
        ("DELETE FROM admin_log", {None}),
        ("UPDATE admin_log SET details = '{ }' WHERE entry = 3", {3}),
    ],
)
def test_the_head_is_looked_at_too(fresh: Callable[[], Ledger], statement: str, expected: set[int | None]) -> None:
    with closing(fresh()) as ledger:
        three(ledger)
        with tampering(ledger) as connection:
            connection.execute(statement)
        assert named(verified(ledger)[1]) == expected
        write(ledger, [{"at": NOW, "actor": "ann", "action": "a", "subject": "s"}])
        assert verified(ledger)[1]


def test_an_act_that_is_undone_leaves_no_link(sqlite_url: str) -> None:
    with closing(Ledger(sqlite_url)) as ledger:
        three(ledger)
        with suppress(RuntimeError), ledger.write() as connection:
            admin_log.note(connection, at=NOW, actor="ann", action="a", subject="s")
            raise RuntimeError
        three(ledger)
        assert (verified(ledger)[0].length, verified(ledger)[1]) == (6, [])


# What the database refuses


def test_the_database_refuses_to_change_or_delete(either_url: str) -> None:
    is_file = either_url.startswith("sqlite:")
    statements = [
        "UPDATE admin_log SET actor = 'eve' WHERE entry = 2",
        "UPDATE admin_log SET actor = actor",
        "DELETE FROM admin_log WHERE entry = 3",
        "DELETE FROM admin_log",
        "INSERT OR REPLACE INTO admin_log SELECT * FROM admin_log" if is_file else "TRUNCATE admin_log",
    ]
    with closing(Ledger(either_url)) as ledger:
        three(ledger)
        before = verified(ledger)
        for statement in statements:
            refused = pytest.raises(sa.exc.IntegrityError, match="admin_log is append-only")
            with refused, ledger.write() as connection:
                connection.exec_driver_sql(statement)
        assert verified(ledger) == before
        assert (before[0].length, before[1]) == (3, [])


# On Postgres


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("UPDATE admin_log SET actor = 'Ann' WHERE entry = 2", {2}),
        ("UPDATE admin_log SET logged_at = logged_at + interval '1 microsecond' WHERE entry = 1", {1}),
        ("UPDATE admin_log SET details = details || ' ' WHERE entry = 3", {3}),
        ("UPDATE admin_log SET digest = translate(digest, '0123456789', '1234567890') WHERE entry = 2", {2}),
        ("UPDATE admin_log SET entry = 7 WHERE entry = 1", {7, 2}),
        ("DELETE FROM admin_log WHERE entry = 1", {2, None}),
        ("DELETE FROM admin_log WHERE entry = 2", {3, None}),
        ("DELETE FROM admin_log WHERE entry = 3", {2, None}),
        (
            "UPDATE admin_log a SET (logged_at, actor, action, subject, details, previous, digest) = "
            "(SELECT logged_at, actor, action, subject, details, previous, digest "
            "FROM admin_log b WHERE b.entry = 3 - a.entry) WHERE entry < 3",
            {1, 2, 3},
        ),
        ("INSERT INTO admin_log SELECT 9, logged_at, actor, 'a', subject, '{}', digest, digest FROM admin_log", {9}),
        ("TRUNCATE admin_log", {None}),
    ],
)
def test_tampering_on_postgres_is_found(postgres_url: str, statement: str, expected: set[int | None]) -> None:
    with closing(Ledger(postgres_url)) as ledger:
        three(ledger)
        assert verified(ledger)[1] == []
        with psycopg.connect(postgres_url.replace("+psycopg", "")) as superuser:
            superuser.execute("ALTER TABLE admin_log DISABLE TRIGGER USER")
            superuser.execute(statement + (" WHERE entry = 3" if statement.startswith("INSERT") else ""))
        found = named(verified(ledger)[1])
        assert expected <= found


def test_many_who_write_at_once_make_one_chain(either_url: str) -> None:
    ledgers = [Ledger(either_url, timeout_s=60) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda ledger: [three(ledger) for _ in range(5)], ledgers))
    head, found = verified(ledgers[0])
    assert (head.length, found) == (60, [])
    for ledger in ledgers:
        ledger.close()


def test_the_head_is_locked_whoever_writes(postgres_url: str) -> None:
    """Also one who does not take the advisory lock that cold writers take turns by."""
    with closing(Ledger(postgres_url)) as ledger:
        three(ledger)
        engine = sa.create_engine("postgresql+psycopg://", creator=lambda: connect(postgres_url, timeout_s=60))

        def note(number: int) -> None:
            with engine.connect() as connection:
                connection.exec_driver_sql("BEGIN")
                admin_log.note(connection, at=NOW, actor="ann", action="a", subject=str(number))
                connection.exec_driver_sql("COMMIT")

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(note, range(40)))
        engine.dispose()
        head, found = verified(ledger)
        assert (head.length, found) == (43, [])


# Ledgers from before


@pytest.fixture(params=["sqlite", "postgres"])
def bare_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where a ledger may be made."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'before.db'}"
        return
    server: PostgresServer = request.getfixturevalue("postgres")
    url = server.database()
    yield url
    server.drop(url)


@pytest.mark.parametrize("numbers", [[], [1], [2, 3, 7]])
def test_entries_from_before_the_chain_are_chained(bare_url: str, numbers: list[int]) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__path__[0])))
    engine = sa.create_engine(bare_url)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0006")
        for number in numbers:
            insert = "INSERT INTO admin_log (entry, logged_at, actor, action, subject, details) VALUES "
            connection.exec_driver_sql(f"{insert} ({number}, '2026-03-12T12:00:00.250000Z', 'ann', 'a', 's', '{{}}')")
    engine.dispose()
    with closing(Ledger(bare_url, upgrade=True)) as ledger:
        head, found = verified(ledger)
        assert (head.length, found) == (len(numbers), [])
        three(ledger)
        with ledger.read() as connection:
            shown = [entry.entry for entry in reversed(admin_log.entries(connection, limit=9))]
        first = max(numbers, default=0) + 1
        assert shown == [*numbers, first, first + 1, first + 2]
        assert (verified(ledger)[0].length, verified(ledger)[1]) == (len(numbers) + 3, [])


# On the command line


def test_log_verify_says_where_the_chain_ends(tallystick: Callable[..., Ran], meter: Meter) -> None:
    assert tallystick("log", "verify").out == f"0 entries, head {EMPTY.digest}\n"
    meter.keys.create("acme", plan="pro")
    newest = tallystick("log", "--admin", "--limit", "1", "--json").json[0]
    assert tallystick("log", "verify").out == f"3 entries, head {newest['digest']}\n"
    said = tallystick("log", "verify", "--json")
    assert (said.status, said.json) == (0, [{"entries": 3, "head": newest["digest"], "faults": []}])


def test_log_verify_names_each_fault(tallystick: Callable[..., Ran], meter: Meter) -> None:
    meter.keys.create("acme", plan="pro")
    with tampering(meter.ledger) as connection:
        connection.execute("UPDATE admin_log SET actor = 'eve' WHERE entry = 2")
        connection.execute("DELETE FROM admin_log WHERE entry = 3")
    said = tallystick("log", "verify")
    assert said.status == 1
    assert said.out.splitlines() == [
        "entry 2: is not as it was written: its digest is of other content",
        "entry 2: is the newest there is, but not the last that was written",
        "the log: 2 entries are there, 3 were written",
    ]
    said = tallystick("log", "verify", "--json")
    assert said.status == 1
    assert [fault["entry"] for fault in said.json[0]["faults"]] == [2, 2, None]


def test_an_account_with_the_name_of_a_command_can_be_shown(tallystick: Callable[..., Ran], meter: Meter) -> None:
    secret = meter.keys.create("verify", plan="pro").secret
    meter.consume(secret, line="a", request={"n": 1})
    assert [entry["request"] for entry in tallystick("log", "show", "verify", "--json").json] == [{"n": 1}]
