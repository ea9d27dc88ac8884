"""The ledger on Postgres, where it is not as in a file: values, transactions, and what it says when it cannot."""

from __future__ import annotations

import gc
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metering import Meter, TokenUsage, doctor
from metering.errors import InvalidSetting, LedgerError, SchemaMismatch, StoreUnavailable, UnknownAccount, UnknownKey
from metering.ledger import SCHEMA, Ledger, outbox
from metering.ledger.log_partitions import PARTITION
from metering.ledger.postgres import connect
from metering.ledger.schema import accounts, metadata_on_postgres
from metering.ledger.types import ExactDecimal, UtcDateTime, Uuid, decimal_text, instant_text
from tests.servers import PostgresServer, free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from uuid import UUID

    from tests.metering.conftest import Ran

PASSWORD = "s3cr&t/w@rd"
ACCOUNT = {"time_zone": "UTC", "anchor_day": 1, "created_at": datetime(2026, 1, 1, tzinfo=UTC)}


@pytest.fixture
def ledger_url(postgres_url: str) -> str:
    return postgres_url


@pytest.fixture
def ledger(ledger_url: str) -> Iterator[Ledger]:
    opened = Ledger(ledger_url, timeout_s=0.5)
    yield opened
    opened.close()


@pytest.fixture
def bare_url(postgres: PostgresServer) -> Iterator[str]:
    """A database without tables."""
    url = postgres.database()
    yield url
    postgres.drop(url)


@pytest.fixture(scope="module")
def locked() -> Iterator[PostgresServer]:
    """A durable server with a password, which tests may kill."""
    with PostgresServer(password=PASSWORD) as server:
        yield server


# What it is made of


def test_migrations_build_exactly_the_schema(ledger: Ledger) -> None:
    with ledger.read() as connection:
        opts = {
            "compare_type": True,
            "compare_server_default": True,
            "include_name": lambda name, kind, _: kind != "table" or not name.startswith(PARTITION),
        }
        context = MigrationContext.configure(connection, opts=opts)
        assert compare_metadata(context, metadata_on_postgres()) == []


def test_an_event_says_which_transaction_wrote_it(ledger_url: str, clock: Any) -> None:
    with Meter(ledger_url, clock=clock) as meter:
        secret = meter.keys.create("acme", plan="pro").secret
        for _ in range(3):
            meter.consume(secret, line="a")
        with meter.ledger.read() as connection:
            written = connection.exec_driver_sql("SELECT commit_xid FROM events ORDER BY seq").scalars().all()
            horizon = "SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint"
            assert written == sorted(set(written))
            assert written[-1] < connection.exec_driver_sql(horizon).scalar_one()


def test_opening_makes_nothing(bare_url: str) -> None:
    for open_it in (Ledger, Meter):
        with pytest.raises(SchemaMismatch, match="has no Tallystick schema; `tallystick init` creates it"):
            open_it(bare_url)
    with psycopg.connect(bare_url.replace("+psycopg", "")) as connection:
        assert connection.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").fetchone() == (0,)


@pytest.mark.parametrize("first", ["init", "migrate"])
def test_the_command_line_makes_it(
    bare_url: str, first: str, command: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METERING_LEDGER_URL", bare_url)
    where = bare_url.replace("+psycopg", "")
    done = {"init": f"ledger {where} created\n", "migrate": f"ledger {where} is at schema {SCHEMA}\n"}
    assert command(first).out.startswith(done[first])
    assert command("init").out == f"ledger {where} is there already\n"
    assert command("migrate").out == done["migrate"]


def test_of_several_that_make_it_at_once_one_does(bare_url: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        ledgers = list(pool.map(lambda _: Ledger(bare_url, timeout_s=30, create=True), range(4)))
    assert sorted(ledger.is_new for ledger in ledgers) == [False, False, False, True]
    with ledgers[0].read() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM ledger_info").scalar_one() == 1
    for ledger in ledgers:
        ledger.close()


@pytest.mark.parametrize(
    ("revision", "message"),
    [("9999", f"schema 9999 is newer than {SCHEMA}"), ("0000", f"schema 0000 is older than {SCHEMA}")],
)
def test_another_schema_is_refused(ledger: Ledger, ledger_url: str, revision: str, message: str) -> None:
    with ledger.write() as connection:
        connection.exec_driver_sql(f"UPDATE alembic_version SET version_num = '{revision}'")
    with pytest.raises(SchemaMismatch, match=message):
        Ledger(ledger_url)


def test_it_may_lie_in_a_schema_of_its_own(postgres: PostgresServer, bare_url: str) -> None:
    with postgres.client(bare_url) as client:
        client.execute("CREATE SCHEMA billing")
    ledger = Ledger(f"{bare_url}?options=-csearch_path%3Dbilling", create=True)
    ledger.close()
    with postgres.client(bare_url) as client:
        places = client.execute("SELECT DISTINCT schemaname FROM pg_tables WHERE tablename = 'events'").fetchall()
    assert places == [("billing",)]


def test_it_has_no_file(ledger: Ledger) -> None:
    with pytest.raises(InvalidSetting, match="expected sqlite:///FILE for what needs the file"):
        _ = ledger.path


# Values

KINDS = sa.Table(
    "kinds",
    sa.MetaData(),
    sa.Column("id", sa.BigInteger, primary_key=True),
    sa.Column("at", UtcDateTime),
    sa.Column("quantity", ExactDecimal),
    sa.Column("event_id", Uuid),
    sa.Column("yes", sa.Boolean),
    sa.Column("name", sa.String(255)),
    sa.Column("body", sa.LargeBinary),
)


@pytest.fixture(scope="module")
def kinds(postgres: PostgresServer, empty_postgres: str) -> Iterator[tuple[Ledger, psycopg.Connection[Any]]]:
    """A table of every type there is, and a plain connection to it."""
    url = postgres.database(like=empty_postgres)
    ledger = Ledger(url)
    with ledger.write() as connection:
        KINDS.create(connection)
    with connect(url, timeout_s=5) as connection:
        yield ledger, connection
    ledger.close()
    postgres.drop(url)


instants = st.datetimes(timezones=st.just(UTC)) | st.datetimes(
    min_value=datetime(2, 1, 1),  # noqa: DTZ001  Hypothesis adds the zone
    max_value=datetime(9998, 1, 1),  # noqa: DTZ001
    timezones=st.sampled_from([timezone(timedelta(hours=5, minutes=45)), timezone(-timedelta(hours=3, minutes=30))]),
)
quantities = st.integers(-(10**30) + 1, 10**30 - 1).map(lambda units: Decimal(units).scaleb(-12)) | st.integers(
    -(10**26) + 1, 10**26 - 1
).map(Decimal)
names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=255)


@given(
    at=instants,
    quantity=quantities,
    event_id=st.uuids(),
    yes=st.booleans(),
    number=st.integers(-(2**63), 2**63 - 1),
    name=names,
    body=st.binary(max_size=64),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_values_are_the_same_for_core_and_for_statements(
    kinds: tuple[Ledger, psycopg.Connection[Any]],
    at: datetime,
    quantity: Decimal,
    event_id: UUID,
    yes: bool,
    number: int,
    name: str,
    body: bytes,
) -> None:
    ledger, connection = kinds
    values = {"id": number, "at": at, "quantity": quantity, "event_id": event_id}
    values |= {"yes": yes, "name": name, "body": body}
    texts = values | {"at": instant_text(at), "quantity": decimal_text(quantity), "event_id": event_id.hex}
    with ledger.write() as write:
        write.execute(KINDS.delete())
        write.execute(KINDS.insert().values(**values))
    assert connection.execute("SELECT * FROM kinds").fetchall() == [tuple(texts.values())]
    connection.execute("DELETE FROM kinds")
    places = ", ".join(f"%({column})s" for column in texts)
    for _ in range(2):
        connection.execute(
            f"INSERT INTO kinds VALUES ({places}) ON CONFLICT (id) DO UPDATE SET quantity = excluded.quantity", texts
        )
    same = "at = %(at)s AND quantity = %(quantity)s AND event_id = %(event_id)s AND name = %(name)s AND yes = %(yes)s"
    assert connection.execute(f"SELECT count(*) FROM kinds WHERE {same}", texts).fetchone() == (1,)
    with ledger.read() as read:
        row = read.execute(sa.select(KINDS)).mappings().one()
        assert dict(row) == values
        assert row["quantity"].as_tuple() == Decimal(decimal_text(quantity)).as_tuple()
        assert row["at"].tzinfo is UTC


def test_what_postgres_would_round_is_refused(kinds: tuple[Ledger, psycopg.Connection[Any]]) -> None:
    ledger, _ = kinds
    with (
        pytest.raises(sa.exc.StatementError, match="Postgres would round it, the ledger there keeps 12 decimals"),
        ledger.write() as connection,
    ):
        connection.execute(KINDS.insert().values(id=1, quantity=Decimal("0.1234567890123")))
    with pytest.raises(LedgerError, match="numeric field overflow"), ledger.write() as connection:
        connection.execute(KINDS.insert().values(id=1, quantity=Decimal(10) ** 26))


def test_both_databases_answer_alike(sqlite_url: str, postgres_url: str, clock: Any) -> None:
    answers = []
    for url in (sqlite_url, postgres_url):
        with Meter(url, clock=clock, strict_signals=True) as meter:
            for name in ("beta", "acme", "Zeta", "a-b", "ab"):
                meter.accounts.create(name, plan="pro", active_from=clock.now)
            for number, model in enumerate(("gpt", None, "Gpt", "claude", "été")):
                meter.record(
                    account="acme",
                    line="chat",
                    model=model,
                    usage=TokenUsage(input_tokens=2**53, output_tokens=number),
                    quantity=Decimal("0.100000000001"),
                    occurred_at=clock.now + timedelta(hours=7 * number),
                    idempotency_key=str(number),
                )
            totals = [meter.usage("acme", by=by) for by in (None, "line", "model", "day", "key_id", "operation")]
            assert all(type(value) is int for value in (totals[0][0].input_tokens, totals[0][0].requests))
            answers.append((totals, meter.accounts.list(), [v.plan for v in meter.apply_plans([])], meter.log("acme")))
    assert answers[0] == answers[1]


def test_what_cannot_be_a_name_is_not_known(ledger_url: str) -> None:
    bad: list[Any] = ["a\0", "\ud800", 5, None]
    with Meter(ledger_url) as meter:
        for name in bad:
            with pytest.raises(UnknownAccount):
                meter.accounts.get(name)
            with pytest.raises(UnknownAccount):
                meter.usage(name)
            with pytest.raises(UnknownKey):
                meter.keys.revoke(name)
        for name in bad[:-1]:
            assert meter.keys.list(name) == meter.log(key_id=name) == []


# Transactions


def add_account(url: str, name: str) -> None:
    ledger = Ledger(url)
    with ledger.write() as connection:
        connection.execute(accounts.insert().values(account=name, **ACCOUNT))
    ledger.close()


def names_in(connection: sa.Connection) -> list[str]:
    return sorted(connection.execute(sa.select(accounts.c.account)).scalars())


def test_reading_sees_one_moment_and_writes_nothing(ledger: Ledger, ledger_url: str) -> None:
    with ledger.read() as connection:
        assert names_in(connection) == []
        add_account(ledger_url, "acme")
        assert names_in(connection) == []
    with pytest.raises(StoreUnavailable, match="read-only"), ledger.read() as connection:
        connection.execute(accounts.delete())
    with ledger.read() as connection:
        assert names_in(connection) == ["acme"]


def test_cold_writes_take_turns(ledger_url: str) -> None:
    def create(number: int) -> None:
        with Meter(ledger_url, timeout_s=30) as meter:
            meter.keys.create(f"account {number % 3}", plan="pro")

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(create, range(12)))
    with Meter(ledger_url) as meter:
        assert [account.account for account in meter.accounts.list()] == ["account 0", "account 1", "account 2"]
        assert len(meter.keys.list()) == 12
        with meter.ledger.read() as connection:
            assert len(outbox.unsent(connection, 100)) == 3 + 12


def test_a_writer_who_takes_too_long_is_not_waited_for(ledger: Ledger, ledger_url: str) -> None:
    other = Ledger(ledger_url)
    too_long = pytest.raises(StoreUnavailable, match="another writer held it for longer than the timeout")
    with other.write(), too_long, ledger.write():
        pytest.fail("it is not its turn")
    with ledger.write() as connection:
        connection.execute(accounts.insert().values(account="acme", **ACCOUNT))
    other.close()


def test_a_change_waits_for_the_admissions_of_its_account(ledger_url: str, postgres: PostgresServer) -> None:
    with Meter(ledger_url, timeout_s=0.3) as meter, postgres.client(ledger_url) as admission:
        key = meter.keys.create("acme", plan="pro")
        beta = meter.keys.create("beta", plan="pro")
        admission.execute("BEGIN")
        admission.execute("SELECT account FROM accounts WHERE account = 'acme' FOR NO KEY UPDATE")
        changes: tuple[Callable[[], object], ...] = (
            lambda: meter.keys.revoke(key.key_id),
            lambda: meter.keys.rotate(key.key_id),
            lambda: meter.accounts.change_plan("acme", "free"),
            lambda: meter.accounts.update("acme", anchor_day=3),
        )
        for change in changes:
            with pytest.raises(StoreUnavailable, match="another writer held it"):
                change()
        meter.keys.revoke(beta.key_id)
        admission.execute("ROLLBACK")
        assert meter.keys.revoke(key.key_id).revoked_at is not None


# When it cannot be reached


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("w%40rd", "wrong"), 'password authentication failed for user "tally"'),
        (("/postgres", "/nothing"), 'database "nothing" does not exist'),
        (("PORT", "FREE"), "Connection refused"),
    ],
)
def test_a_server_that_cannot_be_used_is_named(locked: PostgresServer, change: tuple[str, str], says: str) -> None:
    old, new = change
    url = locked.url.replace(old, new) if old != "PORT" else locked.url.replace(str(locked.port), str(free_port()))
    with pytest.raises(StoreUnavailable) as caught:
        Ledger(url, create=True)
    assert str(caught.value).startswith("ledger postgresql://tally@127.0.0.1:")
    assert says in str(caught.value)
    assert_hidden(caught.value)


@pytest.mark.parametrize("rest", ["tally:s3cr%t@host/db", "tally:s3cr&t@host/db?nonsense=s3cr", "tally:s3cr@host:x/db"])
def test_a_url_that_cannot_be_read_is_not_shown(rest: str) -> None:
    with pytest.raises((InvalidSetting, StoreUnavailable)) as caught:
        Ledger(f"postgresql+psycopg://{rest}")
    assert_hidden(caught.value)


def assert_hidden(error: BaseException | None) -> None:
    """Neither an error nor what it came from shows the password."""
    while error is not None:
        assert "s3cr" not in str(error)
        assert "s3cr" not in repr(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def test_a_server_killed_in_a_transaction_is_named_and_used_again(locked: PostgresServer) -> None:
    ledger = Ledger(locked.database(), create=True)

    def write_while_it_dies() -> None:
        with ledger.write() as connection:
            connection.execute(accounts.insert().values(account="lost", **ACCOUNT))
            locked.kill()
            connection.execute(accounts.insert().values(account="late", **ACCOUNT))

    with pytest.raises(StoreUnavailable, match="server closed the connection unexpectedly") as caught:
        write_while_it_dies()
    assert_hidden(caught.value)
    with pytest.raises(StoreUnavailable, match="Connection refused"), ledger.read():
        pytest.fail("there is no server")
    locked.start()
    with ledger.write() as connection:
        assert names_in(connection) == []
        connection.execute(accounts.insert().values(account="kept", **ACCOUNT))
    locked.stop()
    locked.start()
    with ledger.read() as connection:
        assert names_in(connection) == ["kept"]
    ledger.close()


def test_a_server_that_does_not_answer_is_given_up(locked: PostgresServer) -> None:
    with connect(locked.url, timeout_s=0.1) as connection:
        with pytest.raises(psycopg.errors.QueryCanceled):
            connection.execute("SELECT pg_sleep(60)")
        locked.freeze()
        try:
            with pytest.raises(psycopg.OperationalError, match=r"has not answered within 1\.1 s"):
                connection.execute("SELECT 1")
        finally:
            locked.thaw()
        assert connection.closed


# Forks


def test_a_child_leaves_its_parents_connections_alone(ledger: Ledger, ledger_url: str) -> None:
    with ledger.read() as connection:
        assert names_in(connection) == []
    own = connect(ledger_url, timeout_s=5)
    own.execute("BEGIN")
    own.execute("UPDATE alembic_version SET version_num = '9999'")
    child = os.fork()
    if not child:
        status = 1
        try:
            closed = own.closed
            own.close()
            gc.collect()
            with ledger.write() as connection:
                connection.execute(accounts.insert().values(account="child", **ACCOUNT))
            ledger.close()
            status = 0 if closed else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert own.execute("SELECT version_num FROM alembic_version").fetchone() == ("9999",)
    own.execute("ROLLBACK")
    own.close()
    with ledger.read() as connection:
        assert names_in(connection) == ["child"]


# The doctor


@pytest.fixture
def findings(ledger_url: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, doctor.Finding]]:
    monkeypatch.setenv("METERING_LEDGER_URL", ledger_url)
    return lambda: {finding.what: finding for finding in doctor.examine()}


def test_the_doctor_knows_the_server(findings: Callable[[], dict[str, doctor.Finding]]) -> None:
    found = findings()
    assert all(finding.ok for finding in found.values())
    assert f", schema {SCHEMA}, PostgreSQL 18" in found["ledger"].says
    assert found["ledger persistence"].warning
    assert found["ledger persistence"].says.startswith("fsync and full_page_writes and synchronous_commit off: ")
    assert (found["long transactions"].warning, found["long transactions"].says) == (
        False,
        "none open for more than 60 s",
    )
    assert found["contents"].says == "0 accounts, events up to number 0, 0 open holds"


def test_the_doctor_names_who_holds_back_the_load(
    findings: Callable[[], dict[str, doctor.Finding]], postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "LONG_S", 0)
    url = postgres.url.replace("+psycopg", "")
    with closing(psycopg.connect(url, application_name="nightly export")) as other:
        other.execute("SELECT 1")
        assert not findings()["long transactions"].warning, "who only reads is not in the way"
        other.execute("SELECT pg_current_xact_id()")
        found = findings()["long transactions"]
        assert (found.ok, found.warning) == (True, True)
        assert found.says.startswith(f"pid {other.info.backend_pid} (nightly export) of database postgres for ")
    assert not findings()["long transactions"].warning


def test_the_doctor_says_what_it_may_not_see(
    findings: Callable[[], dict[str, doctor.Finding]],
    postgres: PostgresServer,
    ledger_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with postgres.client(ledger_url) as client:
        client.execute("CREATE ROLE clerk LOGIN")
        client.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO clerk")
    monkeypatch.setenv("METERING_LEDGER_URL", ledger_url.replace("tally@", "clerk@"))
    found = findings()
    assert found["long transactions"].says.endswith("others: grant it pg_read_all_stats")
    with postgres.client(ledger_url) as client:
        client.execute("DROP OWNED BY clerk; DROP ROLE clerk")
