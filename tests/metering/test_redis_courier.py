"""What is told later must not change what was decided."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from metering.aio import AsyncMeter
from metering.ledger.schema import request_log
from metering.meter import Meter
from tests.servers import RedisServer

if TYPE_CHECKING:
    from pathlib import Path


def test_a_call_is_answered_though_its_log_cannot_be_kept(ledger_url: str, tmp_path: Path) -> None:
    in_the_way = tmp_path / "spool"
    in_the_way.write_text("not a folder")
    with RedisServer() as server:
        options: dict[str, Any] = {"quota_url": server.url, "quota_timeout_s": 5, "spool": in_the_way}
        with Meter(ledger_url, **options) as meter:
            secret = meter.keys.create("acme", plan="free").secret
            assert meter.consume(secret, line="a", request={"q": 1}).allowed

            async def awaited() -> bool:
                async with AsyncMeter(ledger_url, **options) as other:
                    return (await other.consume(secret, line="a", request={"q": 1})).allowed

            assert asyncio.run(awaited())
            assert [status.used for status in meter.quota("acme")] == [2]


@pytest.mark.parametrize("url", ["sqlite_url", "postgres_url"])
def test_a_log_that_comes_later_goes_by_the_plan_it_was_made_under(
    request: pytest.FixtureRequest, url: str, tmp_path: Path
) -> None:
    with RedisServer() as server:
        options: dict[str, Any] = {"quota_url": server.url, "quota_timeout_s": 5, "spool": tmp_path / "spool"}
        with Meter(request.getfixturevalue(url), **options) as meter:
            secret = meter.keys.create("acme", plan="pro").secret
            meter.consume(secret, line="a", request={"q": 1})
            # Should it not have been carried yet: the plan of now says something else.
            meter.accounts.change_plan("acme", "free")
            meter.flush()
            meter.consume(secret, line="a", request={"q": 2})
            meter.flush()
            meter.flush()
            with meter.ledger.read() as connection:
                rows = connection.execute(sa.select(request_log).order_by(request_log.c.logged_at)).all()
    assert [(row.request, row.expires_at - row.logged_at) for row in rows] == [
        ('{"q":1}', timedelta(days=30)),
        ('{"q":2}', timedelta(days=7)),
    ]
