"""What redis-py's connections are for: TLS, a login, a database, a cluster; of both meters alike."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from metering.aio import AsyncMeter
from metering.errors import InvalidSetting
from metering.meter import Meter
from tests.proxy import Proxy, certificate
from tests.servers import RedisServer

if TYPE_CHECKING:
    from pathlib import Path


def used_through(ledger_url: str, quota_url: str) -> list[int]:
    """Calls of both meters through one URL; how much of the limit they left used."""
    options: dict[str, Any] = {"quota_url": quota_url, "quota_timeout_s": 5}
    with Meter(ledger_url, **options) as meter:
        secret = meter.keys.create("acme", plan="free").secret
        assert meter.consume(secret, line="a").allowed

        async def awaited() -> bool:
            async with AsyncMeter(ledger_url, **options) as other:
                return (await other.consume(secret, line="a")).allowed

        assert asyncio.run(awaited())
        return [int(status.used) for status in meter.quota("acme")]


def test_tls(ledger_url: str, tmp_path: Path) -> None:
    trusted, _ = pair = certificate(tmp_path)
    with RedisServer() as server, Proxy(server.port, tls=pair) as proxy:
        assert proxy.url.startswith("rediss://")
        assert used_through(ledger_url, f"{proxy.url}?ssl_ca_certs={trusted}") == [2]


def test_a_login_and_a_database(ledger_url: str) -> None:
    with RedisServer(password="p@ss/word") as server:
        assert used_through(ledger_url, f"{server.url}/3") == [2]
        with server.client() as client:
            assert client.dbsize() == 0
            client.select(3)
            assert client.dbsize() > 0


@pytest.mark.parametrize("url", ["postgres://user:secret@localhost", "localhost:6379", "redis+sentinel://localhost"])
def test_a_url_that_cannot_be_is_refused_without_its_password(ledger_url: str, url: str) -> None:
    with pytest.raises(InvalidSetting, match="METERING_QUOTA_URL") as refused:
        Meter(ledger_url, quota_url=url)
    assert "secret" not in str(refused.value)
