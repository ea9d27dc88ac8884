"""What is told later must not change what was decided."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from metering.aio import AsyncMeter
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
