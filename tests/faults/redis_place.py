"""A shop on a Redis that fails: its meters, and what the ledger comes to once all is delivered. No pytest in here."""

from __future__ import annotations

import shutil
import threading
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from metering.admission.redis.link import Link
from metering.admission.redis.shards import check_counters, rebuild, shard_states
from metering.admission.redis.verbs import Verbs
from metering.aio import AsyncMeter
from metering.clock import utc_now
from metering.drain import Drain
from metering.errors import StoreUnavailable
from metering.events import TokenUsage
from metering.ledger import Ledger
from metering.meter import Meter
from metering.plans import Limit, Plan
from metering.spool import Spool
from tests.conformance.stores import Awaited
from tests.servers import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime
    from pathlib import Path
    from typing import Self

    from metering.admission.verify import CounterCheck
    from metering.drain import Drained

T = TypeVar("T")

DEADLINE_S = 60.0
PATIENT_S = 20.0
"""The timeout of meters in tests where nothing is away: a busy machine is no outage."""


class Billed(NamedTuple):
    """What one call comes to in the ledger, reversals included."""

    requests: int
    tokens: int
    rows: int


class Place:
    """A ledger and a spool in a folder, and a Redis at a URL. Closes the meters that it opened.

    `meter` is the shop's own; another one shares nothing with it but ledger, Redis and spool, as another process would.
    `options` are those of every meter.
    """

    def __init__(
        self,
        folder: Path,
        empty_ledger: Path,
        redis_url: str,
        *,
        clock: Callable[[], datetime] = utc_now,
        **options: Any,
    ) -> None:
        self.folder = folder
        self.ledger_url = f"sqlite:///{shutil.copy(empty_ledger, folder / 'ledger.db')}"
        self.redis_url = redis_url
        self._clock = clock
        self._options = options
        self._opened: list[Any] = []
        self.meter = self.open_meter()
        self.ledger = self.meter.ledger
        self._store: Any = self.meter._redis

    def open_meter(self, timeout_s: float = PATIENT_S, **options: Any) -> Meter:
        """Another meter on the same ledger, Redis and spool."""
        meter = Meter(self.ledger_url, **{**self.settings(timeout_s), **options})
        self._opened.append(meter)
        return meter

    def open_async_meter(self, timeout_s: float = PATIENT_S, **options: Any) -> Any:
        """An AsyncMeter on the same, in the words of the blocking one: calls of many threads share its event loop."""
        meter = Awaited(AsyncMeter(self.ledger_url, **{**self.settings(timeout_s), **options}), self._clock)
        meter.accounts.list()  # the first call begins the loop, and there are no threads yet
        self._opened.append(meter)
        return meter

    def settings(self, timeout_s: float) -> dict[str, Any]:
        """What both meters are opened with."""
        return {"quota_url": self.redis_url, "quota_timeout_s": timeout_s, "clock": self._clock, **self._options}

    def open_account(self, *limits: Limit, account: str = "acme") -> str:
        """A new account with a plan of its own, named like it; the secret of its first key."""
        self.set_plan(account, *limits)
        self.meter.accounts.create(account, plan=account)
        return self.meter.keys.create(account).secret

    def set_plan(self, name: str, *limits: Limit) -> None:
        """Write a plan, or its next version."""
        self.meter.apply_plans([Plan(name=name, retention_days=30, limits=limits)])

    def drain(self) -> Drained:
        """Bring what stands in the streams into the ledger."""
        with closing(self._link()) as link:
            return Drain(self.ledger, link, announce=self._store.announce).run()

    @contextmanager
    def draining(self, redis_url: str) -> Iterator[None]:
        """A block in which somebody else drains all the time, as `tallystick drain --follow` does."""
        stop = threading.Event()
        ledger = Ledger(self.ledger_url, timeout_s=DEADLINE_S)
        with closing(ledger), closing(Link(redis_url, timeout_s=PATIENT_S)) as link:
            drain = Drain(ledger, link)
            thread = threading.Thread(target=drain.follow, args=(stop,), kwargs={"every_s": 0.02}, daemon=True)
            thread.start()
            try:
                yield
            finally:
                stop.set()
                thread.join(DEADLINE_S)

    def deliver(self) -> Drained:
        """Bring all that waits into the ledger, from the spool through Redis, and from Redis."""
        wait_until(self._has_shipped, "an empty spool", DEADLINE_S)
        return self.drain()

    def _has_shipped(self) -> bool:
        # Each carries its own; while its thread is at it, `flush` leaves that to it.
        for meter in self._opened:
            meter.flush()
        return not self.waiting()

    def waiting(self) -> int:
        """Lines in the spool."""
        return Spool(self.folder / "spool").pending().lines

    def bill(self) -> dict[str, Billed]:
        """What each call comes to, by its `request_id`."""
        query = "SELECT request_id, sum(requests), sum(input_tokens), count(*) FROM events WHERE billable GROUP BY 1"
        with self.ledger.read() as connection:
            return {name: Billed(*sums) for name, *sums in connection.exec_driver_sql(query)}

    def rows(self, query: str) -> list[Any]:
        """Rows of the ledger."""
        with self.ledger.read() as connection:
            return list(connection.exec_driver_sql(query).all())

    def billed(self, account: str = "acme") -> int:
        """Requests that the ledger bills an account."""
        [(total,)] = self.rows(f"SELECT coalesce(sum(requests), 0) FROM events WHERE account = '{account}'")
        return int(total)

    def lost(self) -> int:
        """Events that the ledger knows it will never have."""
        [(total,)] = self.rows("SELECT coalesce(sum(lost), 0) FROM shards")
        return int(total)

    def used(self, account: str = "acme") -> list[int]:
        """Units used of each limit, in the plan's order."""
        return [int(status.used) for status in self.meter.quota(account)]

    def rebuild(self, shards: list[int] | None = None) -> list[int]:
        """As `tallystick quota rebuild` does it."""
        with closing(self._link()) as link:
            return rebuild(self.ledger, link, clock=utc_now, shards=shards)

    def states(self) -> dict[int, str]:
        """How each shard is that was ever used."""
        with closing(self._link()) as link:
            found = shard_states(self.ledger, link)
        return {state.shard: state.state for state in found if state.state != "unused"}

    def assert_sound(self, *, lost: int = 0) -> None:
        """Each counter equals the ledger, before and after the drain, and nothing is in dead letters."""
        for _ in range(2):
            for account in self.meter.accounts.list():
                self.meter.quota(account.account)
            checks = self._checks()
            assert checks
            assert [check for check in checks if not check.agrees] == []
            self.deliver()
        assert self.rows("SELECT * FROM dead_letters") == []
        assert self.lost() == lost

    def _checks(self) -> list[CounterCheck]:
        with closing(self._link()) as link:
            return check_counters(link, Verbs(self.ledger, link, timeout_s=PATIENT_S))

    def _link(self) -> Link:
        """New connections, as those of another process."""
        return Link(self.redis_url, timeout_s=PATIENT_S, allow_eviction=True)

    def close(self) -> None:
        """Close every meter that was opened here. Redis should still be there: what waits in the spool is shipped."""
        for meter in self._opened:
            meter.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def per(window: str, most: int, metric: str = "requests", **options: Any) -> Limit:
    """A limit: so much per `minute`, `hour`, `day`, `month`."""
    return Limit(metric=metric, per=window, max=most, **options)  # type: ignore[arg-type]


def tokens(count: int) -> TokenUsage:
    """Usage of so many input tokens."""
    return TokenUsage(input_tokens=count)


def patiently(ask: Callable[[], T]) -> T:
    """What is answered in the end, where a busy machine or an outage that is over may still cost some calls theirs."""
    answers: list[T] = []

    def is_answered() -> bool:
        try:
            answers.append(ask())
        except StoreUnavailable:
            return False
        return True

    wait_until(is_answered, "an answer", DEADLINE_S)
    return answers[0]


def in_threads(work: Callable[[int], None], count: int, *, deadline_s: float = DEADLINE_S) -> None:
    """Run `work(0)`, `work(1)`... at once. Raises the first error of any, and TimeoutError for one that hangs."""
    errors: list[BaseException] = []

    def run(index: int) -> None:
        try:
            work(index)
        except BaseException as exc:  # noqa: BLE001  raised below
            errors.append(exc)

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(deadline_s)
    if errors:
        raise errors[0]
    if any(thread.is_alive() for thread in threads):
        raise TimeoutError(f"a thread is still at work after {deadline_s} s")
