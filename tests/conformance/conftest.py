"""What every store is tested with."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from metering.events import TokenUsage
from metering.ledger.schema import metadata
from metering.plans import Limit, Plan
from tests.conformance.stores import STORES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime
    from pathlib import Path

    from metering.admission.protocol import Decision, LimitStatus
    from metering.billing.pricing import Rate
    from tests.conformance.stores import RedisPlace, SqlPlace
    from tests.servers import PostgresServer


class Shop:
    """A meter with accounts on plans of the test's own, and short words for what the tests do most."""

    def __init__(self, place: SqlPlace | RedisPlace) -> None:
        self.place = place
        self.meter: Any = place.meter

    def set_plan(self, name: str, *limits: Limit, rates: tuple[Rate, ...] = ()) -> None:
        """Write a plan, or its next version, in force from now."""
        self.meter.apply_plans([Plan(name=name, retention_days=30, limits=limits, rates=rates)])

    def open_account(self, *limits: Limit, account: str = "acme", rates: tuple[Rate, ...] = (), **options: Any) -> str:
        """A new account with a plan of its own, named like it; the secret of its first key."""
        self.set_plan(account, *limits, rates=rates)
        self.meter.accounts.create(account, plan=account, **options)
        return self.meter.keys.create(account).secret

    def consume(self, secret: str, tokens: int | None = None, *, line: str = "a", **options: Any) -> Decision:
        """Consume, with `tokens` as input tokens."""
        usage = None if tokens is None else TokenUsage(input_tokens=tokens)
        return self.meter.consume(secret, line=line, usage=usage, **options)

    def reserve(self, secret: str, tokens: int | None = None, *, line: str = "a", **options: Any) -> Any:
        """Reserve, with `tokens` as estimated input tokens."""
        estimate = None if tokens is None else TokenUsage(input_tokens=tokens)
        return self.meter.reserve(secret, line=line, estimate=estimate, **options)

    def used(self, account: str = "acme", key_id: str | None = None) -> list[int]:
        """Units used of each limit, in the plan's order."""
        return [int(status.used) for status in self.meter.quota(account, key_id=key_id)]

    def standing(self, account: str = "acme", key_id: str | None = None) -> tuple[LimitStatus, ...]:
        """Where the limits stand, without what the last call asked."""
        return tuple(
            replace(status, asked=0, retry_after_s=None) for status in self.meter.quota(account, key_id=key_id)
        )

    def close(self) -> None:
        """Close the meter, after a last look at its counters, before and after what was admitted is in the ledger."""
        assert [check for check in self.place.checks() if not check.agrees] == []
        self.place.drain()
        assert [check for check in self.place.checks() if not check.agrees] == []
        self.place.close()

    def events(self) -> list[Any]:
        """Every event, as the ledger has it, in the order they occurred."""
        self.place.drain()
        with self.meter.ledger.read() as connection:
            query = "SELECT * FROM events ORDER BY occurred_at, seq"
            return list(connection.exec_driver_sql(query).mappings())

    def count(self, table: str, where: str = "true") -> int:
        """Rows of a table of the ledger."""
        self.place.drain()
        with self.meter.ledger.read() as connection:
            return int(connection.exec_driver_sql(f"SELECT count(*) FROM {table} WHERE {where}").scalar_one())

    def log(self, account: str = "acme", **asked: Any) -> list[Any]:
        """The request log of an account."""
        self.place.drain()
        return list(self.meter.log(account, **asked))

    def holds(self, state: str) -> int:
        """How many holds are in a state."""
        return self.place.holds().get(state, 0)

    def kept(self, what: str) -> int:
        """How many `replays`, `counters` or `rate_counters` the store keeps."""
        return self.place.kept()[what]

    def written(self) -> dict[str, Any]:
        """How much there is of what an admission may write."""
        facts = {table: self.count(table) for table in ("events", "event_ids", "request_log")}
        return {**facts, **self.place.kept(), "holds": self.place.holds()}

    def counters(self) -> list[Any]:
        """Every counter and rate counter, as kept."""
        return self.place.counters()


class PostgresLedgers:
    """Migrated ledgers on Postgres, used again: to empty one takes a fiftieth of the time to make it."""

    def __init__(self, server: PostgresServer, empty: str) -> None:
        self._server = server
        self._like = empty
        self._free: list[str] = []

    def take(self) -> str:
        """The URL of one without a row."""
        return self._free.pop() if self._free else self._server.database(like=self._like)

    def give_back(self, url: str) -> None:
        """Nobody uses it any more."""
        with self._server.client(url) as connection:
            found = connection.execute("SELECT sequencename FROM pg_sequences WHERE schemaname = 'public'").fetchall()
            restarts = [f"ALTER SEQUENCE {name} RESTART" for (name,) in found]
            deletions = [f"DELETE FROM {table}" for table in metadata.tables if table != "ledger_info"]
            connection.execute("; ".join(["SET session_replication_role = replica", *deletions, *restarts]))
        self._free.append(url)


@pytest.fixture(scope="session")
def postgres_ledgers(postgres: PostgresServer, empty_postgres: str) -> PostgresLedgers:
    """Ledgers for one store after the other."""
    return PostgresLedgers(postgres, empty_postgres)


@pytest.fixture(params=list(STORES))
def open_shop(
    request: pytest.FixtureRequest, tmp_path: Path, empty_ledger: Path
) -> Iterator[Callable[[Callable[[], datetime]], Shop]]:
    """Opens shops, each on a store of its own. When one closes, its counters must equal what the ledger says."""
    shops: list[Shop] = []
    taken: list[str] = []
    ledgers: PostgresLedgers | None = None
    if "postgres" in request.param:
        ledgers = request.getfixturevalue("postgres_ledgers")

    def new_ledger() -> str:
        if ledgers is None:
            folder = tmp_path / f"shop-{len(shops)}"
            folder.mkdir()
            return f"sqlite:///{shutil.copy(empty_ledger, folder / 'ledger.db')}"
        taken.append(ledgers.take())
        return taken[-1]

    def open_one(clock: Callable[[], datetime]) -> Shop:
        shops.append(Shop(STORES[request.param](new_ledger(), clock)))
        return shops[-1]

    yield open_one
    for shop in shops:
        shop.close()
    for url in taken:
        assert ledgers is not None
        ledgers.give_back(url)


@pytest.fixture
def shop(open_shop: Callable[..., Shop], clock: Any) -> Shop:
    """A shop on each store, on the test's clock."""
    return open_shop(clock)


@pytest.fixture
def requests_limit() -> Callable[..., Limit]:
    """`requests_limit(10)`: that many requests a month."""

    def limit(most: int, per: str = "month", **options: Any) -> Limit:
        return Limit(metric="requests", per=per, max=most, **options)  # type: ignore[arg-type]

    return limit
