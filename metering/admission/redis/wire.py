"""What both ways of talking to Redis share: addresses, slots of a cluster, what an error means, what a greeting tells.

redis-py's clients resend by themselves, so that a caller cannot tell what was done. Here its connections alone are used
(reconnects, TLS, authentication), and the one who asks decides what is sent again.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

from redis import crc
from redis import exceptions as errors
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from metering.admission.redis.keys import SHARDS, shard_key
from metering.errors import InvalidSetting, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "GREETING",
    "Address",
    "Greeting",
    "NotDone",
    "OutcomeUnknown",
    "Servers",
    "Topology",
    "checked_policy",
    "meaning_of",
    "read_greeting",
]

_CLUSTER = "redis+cluster://"
_FAILURES = (RedisConnectionError, RedisTimeoutError, OSError)
_NOTHING_DONE = (
    errors.AskError,
    errors.BusyLoadingError,
    errors.ClusterDownError,
    errors.MasterDownError,
    errors.MovedError,
    errors.OutOfMemoryError,
    errors.ReadOnlyError,
    errors.TryAgainError,
)


class NotDone(Exception):
    """The server did nothing: it could not be reached, or refused before it began. Asking again is safe."""


class Greeted(NotDone):
    """The server turned out to be another one than before: what it must have is to be looked up first."""


class OutcomeUnknown(Exception):
    """It was sent, and no answer came."""


class Address(NamedTuple):
    """A server: what redis-py's connections are made with."""

    host: str
    port: int


class Greeting(NamedTuple):
    """What a server says of itself on a new connection."""

    run_id: str
    policy: str
    now_us: int


GREETING: tuple[tuple[str, ...], ...] = (("INFO", "server"), ("INFO", "memory"), ("TIME",))


def read_greeting(replies: list[Any]) -> Greeting:
    """What the replies to `GREETING` say."""
    server, memory, (seconds, microseconds) = replies
    return Greeting(
        run_id=_field(server, b"run_id"),
        policy=_field(memory, b"maxmemory_policy"),
        now_us=int(seconds) * 1_000_000 + int(microseconds),
    )


def checked_policy(greeting: Greeting, *, allow_eviction: bool) -> None:
    """Raise `InvalidSetting` for a server that may throw counters away when its memory is full."""
    if greeting.policy not in ("", "noeviction") and not allow_eviction:
        raise InvalidSetting(
            "maxmemory-policy", greeting.policy, "noeviction on the Redis server, or METERING_ALLOW_EVICTION=1"
        )


def _field(info: bytes, name: bytes) -> str:
    for line in info.splitlines():
        key, _, value = line.partition(b":")
        if key == name:
            return value.decode()
    return ""


def meaning_of(error: Exception, where: object) -> Exception:
    """What an error of redis-py means for the one who asked."""
    if isinstance(error, errors.AuthenticationError | errors.NoPermissionError):
        return StoreUnavailable(f"Redis at {where} refuses this login: {error}")
    if isinstance(error, _NOTHING_DONE) or str(error).startswith(("MISCONF", "NOREPLICAS", "BUSY")):
        return NotDone(f"Redis at {where}: {error}")
    if isinstance(error, _FAILURES):
        return OutcomeUnknown(f"Redis at {where} did not answer: {error}")
    return StoreUnavailable(f"Redis at {where}: {error}")


class Servers:
    """What is known of the servers that were talked to."""

    def __init__(self, *, allow_eviction: bool) -> None:
        self.era = 0
        """Goes up whenever a server turns out to be another one than before."""
        self.ahead_us: int | None = None
        """How far the servers' clock is ahead of `time.monotonic`, at least; None until one was asked."""
        self._allow_eviction = allow_eviction
        self._run_ids: dict[Address, str] = {}

    def heard(self, server_us: int) -> None:
        """Take in what a server's clock showed a moment ago."""
        ahead_us = server_us - time.monotonic_ns() // 1000
        self.ahead_us = ahead_us if self.ahead_us is None else max(self.ahead_us, ahead_us)

    def greeted(self, address: Address, greeting: Greeting) -> None:
        """Take in what a server said of itself. Raises `InvalidSetting` for one that may evict."""
        checked_policy(greeting, allow_eviction=self._allow_eviction)
        self.heard(greeting.now_us)
        if self._run_ids.get(address) != greeting.run_id:
            self._run_ids[address] = greeting.run_id
            self.era += 1


class Topology:
    """Which server has which shard: one server, or the nodes of a cluster by slot."""

    def __init__(self, url: str) -> None:
        self.clustered = url.startswith(_CLUSTER)
        plain = "redis://" + url.removeprefix(_CLUSTER) if self.clustered else url
        try:
            options: dict[str, Any] = parse_url(plain)
        except ValueError as exc:
            raise InvalidSetting(
                "METERING_QUOTA_URL", _without_password(url), "redis://, rediss:// or redis+cluster:// and a host"
            ) from exc
        self.seed = Address(options.pop("host", "localhost"), options.pop("port", 6379))
        self.connection_class: Any = options.pop("connection_class", None)
        self.options: Mapping[str, Any] = options
        self._nodes: dict[int, Address] = {}
        self._slots = [crc.key_slot(shard_key(shard, "shard").encode()) for shard in range(SHARDS)]

    def node_of(self, shard: int) -> Address | None:
        """The server that has a shard; None where the cluster has not been asked yet."""
        return self._nodes.get(shard) if self.clustered else self.seed

    def nodes(self) -> list[Address]:
        """Every server known to have a shard."""
        return sorted(set(self._nodes.values())) or [self.seed]

    def forget(self) -> None:
        """Ask the cluster again before the next call."""
        self._nodes = {}

    def learn(self, slots: list[Any], asked: Address) -> None:
        """Take in the reply to CLUSTER SLOTS. Raises `NotDone` where a shard has no server."""
        nodes = {}
        for start, end, master, *_ in slots:
            address = Address(master[0].decode() or asked.host, int(master[1]))
            nodes.update({shard: address for shard, slot in enumerate(self._slots) if start <= slot <= end})
        if len(nodes) < SHARDS:
            raise NotDone(f"Redis Cluster at {asked.host}:{asked.port} has slots that nobody serves")
        self._nodes = nodes

    def connection_options(self, timeout_s: float) -> dict[str, Any]:
        """What a connection of redis-py is made with: parts of the timeout, since a call may connect and read in it."""
        return {
            **self.options,
            "socket_timeout": 0.45 * timeout_s,
            "socket_connect_timeout": timeout_s / 3,
            "retry": Retry(NoBackoff(), 0),
            "protocol": 2,
            "driver_info": None,
        }


def _without_password(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"
