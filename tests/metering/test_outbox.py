"""What Redis is told: written with the change, sent after its commit, and a version by its number."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest

from metering.accounts import Accounts, Keys
from metering.corrections import correct, find_event, reversal_row
from metering.errors import Conflict, CorrectionConflict, StoreUnavailable, UnknownKey
from metering.events import TokenUsage
from metering.ledger import outbox, plan_versions
from metering.plans import BUILT_IN, Limit, Plan

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from metering import Meter

ADOPTED = "sk-live-0123456789abcdef"
TOLD_LATER = "the ledger has this change, but Redis could not be told yet: the drain will tell it"


@pytest.fixture
def ledger_url(either_url: str) -> str:
    return either_url


class Herald:
    """Announces: sees what is unsent, in a transaction of its own, and marks it."""

    def __init__(self, meter: Meter, clock: Callable[[], datetime]) -> None:
        self.ledger = meter.ledger
        self.clock = clock
        self.calls = 0
        self.told: list[tuple[str | None, bool]] = []
        self.away = False

    def __call__(self) -> None:
        self.calls += 1
        if self.away:
            raise StoreUnavailable("Redis at nowhere")
        with self.ledger.write() as connection:
            rows = outbox.unsent(connection, 100)
            outbox.mark_sent(connection, [row.seq for row in rows], self.clock())
        self.told += [(row.account, row.recount) for row in rows]

    def news(self) -> list[tuple[str | None, bool]]:
        """What was told since the last time this was asked."""
        told, self.told = self.told, []
        return told


@pytest.fixture
def herald(meter: Meter, clock: Any) -> Herald:
    return Herald(meter, clock)


@pytest.fixture
def accounts(meter: Meter, herald: Herald) -> Accounts:
    return Accounts(meter.ledger, clock=herald.clock, actor="test", announce=herald)


@pytest.fixture
def keys(meter: Meter, accounts: Accounts, herald: Herald) -> Keys:
    return Keys(meter.ledger, accounts, clock=herald.clock, actor="test", pepper=None, announce=herald)


def version_of(meter: Meter, account: str) -> int:
    with meter.ledger.read() as connection:
        return outbox.version_of(connection, account)


def unsent(meter: Meter, most: int = 100) -> list[outbox.OutboxRow]:
    with meter.ledger.read() as connection:
        return outbox.unsent(connection, most)


def test_a_version_is_the_last_number_that_names_the_account_or_all(meter: Meter, clock: Any) -> None:
    assert version_of(meter, "a") == 0
    with meter.ledger.write() as connection:
        for account in ("a", "b", None, "b"):
            outbox.note(connection, account, now=clock.now)
    assert [version_of(meter, account) for account in ("a", "b", "new")] == [3, 4, 3]
    assert meter.ledger.writer.run(lambda cursor: outbox.version_of(cursor, "b")) == 4
    meter.ledger.writer.run(lambda cursor: outbox.note(cursor, "a", recount=True, now=clock.now))
    assert version_of(meter, "a") == 5
    with meter.ledger.write() as connection:
        connection.exec_driver_sql("DELETE FROM outbox")
        outbox.note(connection, "a", now=clock.now)
    assert version_of(meter, "a") == 6, "no number is used again"


def test_a_version_is_found_by_the_index(meter: Meter) -> None:
    statement = outbox._SQL["find_version"]
    with meter.ledger.read() as connection:
        if meter.ledger.dialect == "sqlite":
            plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", {"account": "a"})
            steps = [row.detail for row in plan if "outbox" in row.detail]
            assert steps == ["SEARCH outbox USING COVERING INDEX ix_outbox_account_seq (account=?)"] * 2
        else:
            connection.exec_driver_sql("SET LOCAL enable_seqscan = off")  # an empty table is read faster without
            plan = connection.exec_driver_sql(f"EXPLAIN {statement.on_postgres}", {"account": "a"})
            assert sum("using ix_outbox_account_seq" in row[0] for row in plan) == 2


def test_unsent_rows_come_oldest_first_until_they_are_marked(meter: Meter, clock: Any) -> None:
    with meter.ledger.write() as connection:
        for account in ("a", None, "c"):
            outbox.note(connection, account, recount=account == "c", now=clock.now)
    first, second = unsent(meter, 2)
    assert first == outbox.OutboxRow(seq=1, account="a", recount=False, created_at=clock.now)
    assert second.account is None
    clock.advance(seconds=1)
    with meter.ledger.write() as connection:
        outbox.mark_sent(connection, [1, 2], clock.now)
    [third] = unsent(meter)
    assert (third.account, third.recount) == ("c", True)
    with meter.ledger.write() as connection:
        outbox.mark_sent(connection, [1, 3], clock.advance(seconds=1))
        sent = connection.exec_driver_sql("SELECT sent_at FROM outbox ORDER BY seq").scalars().all()
    assert [at[17:19] for at in sent] == ["01", "01", "02"]
    assert unsent(meter) == []


def test_every_change_that_admissions_depend_on_is_announced_after_its_commit(
    meter: Meter, accounts: Accounts, keys: Keys, herald: Herald
) -> None:
    accounts.create("acme", plan="free")
    assert herald.news() == [("acme", False)]
    accounts.update("acme", name="Acme", address=("1 Road",))
    assert herald.calls == 1, "nothing that an admission asks"
    accounts.update("acme", time_zone="Asia/Kolkata")
    accounts.update("acme", anchor_day=9)
    accounts.change_plan("acme", "pro")
    assert herald.news() == [("acme", False)] * 3
    key = keys.create("acme")
    adopted = keys.adopt(ADOPTED, "acme")
    assert herald.news() == [("acme", False)] * 2
    keys.rotate(key.key_id, grace=timedelta(0))
    keys.revoke(adopted.key_id)
    assert herald.news() == [("acme", False)] * 2
    keys.create("other", plan="pro")
    assert herald.news() == [("other", False)] * 2
    assert version_of(meter, "acme") == 8


def test_what_is_refused_is_not_announced(meter: Meter, accounts: Accounts, keys: Keys, herald: Herald) -> None:
    accounts.create("acme", plan="free")
    calls, version = herald.calls, version_of(meter, "acme")
    for refused in (
        lambda: accounts.create("acme", plan="free"),
        lambda: keys.create("acme", plan="pro"),
    ):
        with pytest.raises(Conflict):
            refused()
    with pytest.raises(UnknownKey):
        keys.revoke("key_none")
    assert (herald.calls, version_of(meter, "acme")) == (calls, version)


def test_plans_that_somebody_is_on_are_news_for_every_account(
    meter: Meter, accounts: Accounts, herald: Herald, clock: Any
) -> None:
    def apply(*plans: Plan) -> list[str | None]:
        with meter.ledger.write() as connection:
            plan_versions.apply(connection, plans, now=clock.advance(days=1), actor="test")
        herald()
        return [account for account, _ in herald.news()]

    mine = Plan(name="mine", retention_days=1)
    assert apply(mine) == [], "nobody is on it"
    accounts.create("acme", plan="mine")
    accounts.create("pros", plan="pro")
    assert [account for account, _ in herald.news()] == ["acme", "pros"], "a built-in plan's first version is no news"
    assert apply(mine, BUILT_IN["pro"]) == [], "both are in force as they are"
    limit = Limit(metric="requests", per="day", max=Decimal(3))
    assert apply(Plan(name="theirs", retention_days=1)) == []
    assert apply(Plan(name="mine", retention_days=1, limits=(limit,)), Plan(name="pro", retention_days=2)) == [None]
    assert version_of(meter, "acme") == version_of(meter, "anyone") == 3


def corrected(meter: Meter, event_id: UUID, quantity: int, announce: Callable[[], None]) -> None:
    correct(
        meter.ledger,
        event_id,
        usage=None,
        quantity=Decimal(quantity),
        model=None,
        provider=None,
        billable=None,
        reason="r",
        now=datetime(2026, 3, 12, 13, tzinfo=UTC),
        announce=announce,
    )


def test_a_correction_that_moves_counters_has_them_counted_anew(meter: Meter, herald: Herald) -> None:
    secret = meter.keys.create("acme", plan="pro").secret
    counted = meter.consume(secret, line="a", quantity=1).event_id
    herald()
    herald.news()
    corrected(meter, counted, 2, herald)
    assert herald.news() == [("acme", True)]
    corrected(meter, counted, 2, herald)
    assert (herald.calls, herald.news()) == (3, []), "asked again, Redis is made sure of"
    with pytest.raises(CorrectionConflict):
        corrected(meter, counted, 3, herald)
    meter.record(account="acme", line="a", quantity=1, idempotency_key="s")
    with meter.ledger.read() as connection:
        signal = connection.exec_driver_sql("SELECT event_id FROM events WHERE kind = 'signal'").scalar_one()
    corrected(meter, type(counted)(signal), 2, herald)
    assert (herald.calls, herald.news()) == (3, []), "a signal asks no limits"


def test_a_change_stands_while_redis_is_away(
    meter: Meter, accounts: Accounts, keys: Keys, herald: Herald, caplog: pytest.LogCaptureFixture
) -> None:
    accounts.create("acme", plan="free")
    known = keys.create("acme")
    event = meter.consume(known.secret, line="a", quantity=1).event_id
    herald.news()
    herald.away = True
    changes: list[Callable[[], Any]] = [
        lambda: accounts.change_plan("acme", "pro"),
        lambda: accounts.create("new", plan="pro"),
        lambda: keys.adopt(ADOPTED, "acme"),
        lambda: keys.revoke(known.key_id),
        lambda: corrected(meter, event, 2, herald),
    ]
    for change in changes:
        with pytest.raises(StoreUnavailable) as caught:
            change()
        assert str(caught.value) == f"{TOLD_LATER} (Redis at nowhere)"
    assert accounts.get("acme").plan == "pro"
    assert keys.lookup(known.secret).revoked_at is not None
    assert meter.usage("acme")[0].quantity == 2

    with caplog.at_level(logging.WARNING, "metering"):
        issued = keys.create("acme")
        successor = keys.rotate(issued.key_id)
    assert keys.lookup(issued.secret).rotated_to == successor.key_id, "a secret that is shown once is not lost"
    assert [record.getMessage() for record in caplog.records] == [
        f"API key {key.key_id} of account 'acme': {TOLD_LATER} (Redis at nowhere)" for key in (issued, successor)
    ]
    with pytest.raises(StoreUnavailable):
        keys.revoke(known.key_id)

    herald.away = False
    assert keys.revoke(known.key_id).revoked_at is not None, "a revoke that returns is known to Redis"
    assert herald.news() == [
        ("acme", False),
        ("new", False),
        ("acme", False),
        ("acme", False),
        ("acme", True),
        ("acme", False),
        ("acme", False),
    ]


def test_what_is_not_redis_being_away_is_not_explained(meter: Meter, clock: Any) -> None:
    def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Accounts(meter.ledger, clock=clock, actor="test", announce=broken).create("acme", plan="pro")
    assert meter.accounts.get("acme").plan == "pro"


def test_usage_of_an_undone_call_cannot_be_corrected(meter: Meter, clock: Any) -> None:
    secret = meter.keys.create("acme", plan="pro").secret
    event_id = meter.consume(secret, line="a", usage=TokenUsage(input_tokens=1)).event_id
    meter.ledger.writer.run(lambda cursor: undo(cursor, event_id, clock.now))
    with pytest.raises(CorrectionConflict, match=f"event {event_id} was undone: nothing is billed for it"):
        corrected(meter, event_id, 2, outbox.no_one)


def undo(cursor: Any, event_id: UUID, now: Any) -> None:
    row = find_event(cursor, event_id)
    assert row is not None
    cursor.execute(outbox._SQL["insert_event"], reversal_row(row, reason="r", now=now))
