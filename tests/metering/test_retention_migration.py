"""A ledger of before 0008: each row of its request log goes by the plan that was in force when it was logged."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from metering.ledger import Ledger, _place_of, log_partitions, migrations, plan_versions
from metering.ledger.schema import account_plans, accounts, request_log
from metering.plans import Plan

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.servers import PostgresServer

START = datetime(2026, 3, 1, tzinfo=UTC)


@pytest.fixture(params=["sqlite", "postgres"])
def bare_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'old.db'}"
        return
    postgres: PostgresServer = request.getfixturevalue("postgres")
    url = postgres.database()
    yield url
    postgres.drop(url)


def make_old(url: str) -> None:
    """At 0007: an account that changed its plan, on a plan that changed as well, and a row of each time."""
    place = _place_of(url, 5.0)
    place.make()
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__path__[0])))
    engine = place.engine()
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0007")
        values = {"time_zone": "UTC", "anchor_day": 1, "created_at": START}
        connection.execute(accounts.insert(), [{"account": name, **values} for name in ("acme", "quiet")])
        for at, days in [(0, 10), (5, 20)]:
            plan = Plan(name="first", retention_days=days)
            plan_versions.apply(connection, [plan], now=START + timedelta(days=at), actor="test")
        plan_versions.ensure(connection, "free", now=START, actor="test")
        for name, at, plan in [("acme", 0, "first"), ("acme", 9, "free"), ("quiet", 0, "free")]:
            connection.execute(
                account_plans.insert().values(account=name, effective_from=START + timedelta(days=at), plan=plan)
            )
        before = sa.table("request_log", *(sa.column(c.name, c.type) for c in request_log.c if c.name != "expires_at"))
        rows = [{"account": "acme", "line": "a", "logged_at": START + timedelta(days=d, seconds=1)} for d in (1, 6, 9)]
        rows.append({"account": "quiet", "line": "a", "logged_at": START + timedelta(days=9, microseconds=7)})
        for row in rows:
            connection.execute(before.insert().values(**row, request='"r"'))
    engine.dispose()


def test_rows_that_are_there_go_by_the_plan_they_were_logged_under(bare_url: str) -> None:
    make_old(bare_url)
    ledger = Ledger(bare_url, upgrade=True)
    with ledger.read() as connection:
        found = connection.execute(sa.select(request_log).order_by(request_log.c.log_id)).all()
        days = log_partitions.partitioned_days(connection) if ledger.dialect == "postgresql" else None
    kept = [(row.account, row.expires_at - row.logged_at, row.request) for row in found]
    assert kept == [
        ("acme", timedelta(days=10), '"r"'),
        ("acme", timedelta(days=20), '"r"'),
        ("acme", timedelta(days=7), '"r"'),
        ("quiet", timedelta(days=7), '"r"'),
    ]
    assert found[3].expires_at == START + timedelta(days=16, microseconds=7)
    if days is not None:
        assert days == sorted({row.expires_at.date() for row in found})
    with ledger.write() as connection:
        row = {"account": "acme", "line": "a", "logged_at": START, "expires_at": START}
        assert connection.execute(request_log.insert().values(**row)).inserted_primary_key[0] == found[-1].log_id + 1
    ledger.close()
