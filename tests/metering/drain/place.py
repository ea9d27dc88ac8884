"""What the tests of the drain share: a stream written to as the scripts write, links, and reads of the ledger."""

from __future__ import annotations

from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

import msgspec
import pytest
import redis as redis_py

from metering.admission.redis.keys import account_key, shard_key, shard_of
from metering.admission.redis.scripts import script
from metering.admission.redis.stream import Header, StreamedEvent, encode, events_key
from metering.admission.redis.wire import NotDone, OutcomeUnknown
from metering.booking import Counts
from metering.errors import StoreUnavailable
from metering.events import new_event_id

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from decimal import Decimal

    from metering.drain import Drain
    from metering.ledger import Ledger
    from metering.meter import Meter

ACCOUNT = "acme"
SHARD = shard_of(ACCOUNT)
AT = datetime(2026, 3, 12, 11, 59, 30, 123456, tzinfo=UTC)
PLAIN = StreamedEvent(
    account=ACCOUNT,
    key_id=None,
    plan_version=1,
    period="2026-03",
    line="a",
    operation=None,
    provider=None,
    model=None,
    service_tier=None,
    run_id=None,
    request_id=None,
    session_id=None,
    attributes=None,
    platform_paid=True,
    tokens=(0, 0, 0, 0, 0, 0, 0, 0),
    quantity="1",
    estimated=False,
    error=None,
    latency_ms=None,
    idempotency_key=None,
    fingerprint=None,
)


class PlainLink:
    """The least a drain needs of a link, on a client that resends nothing."""

    def __init__(self, client: redis_py.Redis) -> None:
        self.client = client

    def call(self, shard: int, *command: Any, timeout_s: float) -> Any:
        connection = self.client.connection_pool.get_connection()
        try:
            connection.send_command(*command)
            return connection.read_response(disable_decoding=True)
        except redis_py.OutOfMemoryError as exc:
            raise NotDone(str(exc)) from exc
        except redis_py.ConnectionError as exc:
            raise OutcomeUnknown(str(exc)) from exc
        finally:
            self.client.connection_pool.release(connection)

    def script(self, shard: int, name: str, keys: Sequence[str], args: Sequence[Any], timeout_s: float) -> Any:
        return self.call(shard, "EVAL", script(name).text, len(keys), *keys, *args, timeout_s=timeout_s)


class Cut(PlainLink):
    """A link on which a script does not get through, as if the drain had died before it."""

    def script(self, shard: int, name: str, keys: Sequence[str], args: Sequence[Any], timeout_s: float) -> Any:
        if name == "drained":
            raise OutcomeUnknown("cut")
        return super().script(shard, name, keys, args, timeout_s)


class Stream:
    """One account's shard, written to as the scripts write."""

    def __init__(self, client: redis_py.Redis, account: str = ACCOUNT) -> None:
        self.client = client
        self.account = account
        self.shard = shard_of(account)
        self.key = events_key(self.shard)
        self.state = shard_key(self.shard, "shard")
        self.epoch = 1

    def add(
        self,
        event_id: UUID | None = None,
        *,
        kind: Any = "event",
        at: datetime = AT,
        billable: bool = True,
        late: bool = False,
        **said: Any,
    ) -> UUID:
        event_id = event_id or new_event_id()
        said = {"account": self.account, **said}
        seq = self.number()
        occurred_us = (at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
        header = Header(kind, self.epoch, seq, occurred_us, event_id.hex, billable, late)
        self.put(msgspec.json.encode(header), encode(msgspec.structs.replace(PLAIN, **said)))
        return event_id

    def cancel(self, event_id: UUID) -> None:
        self.add(event_id, kind="cancel")

    def number(self) -> int:
        self.client.hset(self.state, "epoch", self.epoch)
        return int(self.client.hincrby(self.state, "seq", 1))

    def put(self, header: bytes, body: bytes, stream_id: bytes | str = "*") -> None:
        self.client.xadd(self.key, {b"h": header, b"e": body}, id=stream_id)

    def begin(self, epoch: int) -> None:
        self.epoch = epoch
        self.client.hset(self.state, mapping={"epoch": epoch, "seq": 0})

    def entries(self) -> list[tuple[bytes, dict[bytes, bytes]]]:
        return self.client.xrange(self.key)

    def generation(self) -> int:
        return int(self.client.hget(account_key(self.shard, "account", self.account), "gen") or 0)

    def fenced(self) -> str | None:
        reason = self.client.hget(self.state, "fenced")
        return None if reason is None else reason.decode()


def rows(ledger: Ledger, table: str = "events", order: str = "1") -> list[dict[str, Any]]:
    with ledger.read() as connection:
        return [dict(row) for row in connection.exec_driver_sql(f"SELECT * FROM {table} ORDER BY {order}").mappings()]


def ids(ledger: Ledger) -> list[UUID]:
    return [UUID(row["event_id"]) for row in rows(ledger)]


def counts(drained: Counts) -> dict[str, int]:
    """What is not 0."""
    return {name: getattr(drained, name) for name in Counts.__slots__ if getattr(drained, name)}


def quantity(meter: Meter, account: str = ACCOUNT) -> Decimal:
    [total] = meter.usage(account)
    return total.quantity


@contextmanager
def cut(drain: Drain) -> Iterator[None]:
    """The ledger commits, and Redis is not told."""
    with pytest.raises(StoreUnavailable, match="cut"):
        yield
    with drain._ledger.read() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM shards").scalar_one()
