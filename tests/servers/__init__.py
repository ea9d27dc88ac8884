"""Real Redis and Postgres servers on loopback, for the tests and for the processes they start: no pytest in here."""

from __future__ import annotations

from tests.servers.base import DEADLINE_S, HOST, free_port, wait_until
from tests.servers.postgres_server import PostgresServer
from tests.servers.redis_server import SLOTS, RedisCluster, RedisServer, flavours

__all__ = [
    "DEADLINE_S",
    "HOST",
    "SLOTS",
    "PostgresServer",
    "RedisCluster",
    "RedisServer",
    "flavours",
    "free_port",
    "wait_until",
]
