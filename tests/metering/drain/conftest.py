from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from metering.admission.verify import check_counters
from metering.drain import Drain
from tests.metering.drain.place import (
    ACCOUNT,
    SHARD,
    PlainLink,
    Stream,
)
from tests.servers import RedisServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import redis as redis_py

    from metering.ledger import Ledger
    from metering.meter import Meter


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as running:
        yield running


@pytest.fixture
def client(server: RedisServer) -> Iterator[redis_py.Redis]:
    with server.client() as opened:
        opened.flushall()
        yield opened


@pytest.fixture
def stream(client: redis_py.Redis) -> Stream:
    return Stream(client)


@pytest.fixture
def ledger(meter: Meter) -> Iterator[Ledger]:
    meter.accounts.create(ACCOUNT, plan="pro")
    yield meter.ledger
    assert all(check.agrees for check in check_counters(meter.ledger))


@pytest.fixture
def new_drain(ledger: Ledger, client: redis_py.Redis, clock: Any) -> Callable[..., Drain]:
    def new(link: Any = PlainLink, **options: Any) -> Drain:
        return Drain(ledger, link(client), clock=clock, **{"shards": [SHARD], **options})

    return new


@pytest.fixture
def drain(new_drain: Callable[..., Drain]) -> Drain:
    return new_drain()
