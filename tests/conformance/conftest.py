"""What every store is tested with. A store joins by an entry in STORES: how to open a meter that decides on it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from metering.admission.verify import check_counters
from metering.events import TokenUsage
from metering.ledger import plan_versions
from metering.meter import Meter
from metering.plans import Limit, Plan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime
    from pathlib import Path

    from metering.admission.protocol import Decision, LimitStatus
    from metering.billing.pricing import Rate


def _sqlite(folder: Path, empty_ledger: Path, clock: Callable[[], datetime]) -> Meter:
    path = shutil.copy(empty_ledger, folder / "ledger.db")
    return Meter(f"sqlite:///{path}", clock=clock, strict_signals=True)


STORES: dict[str, Callable[[Path, Path, Callable[[], datetime]], Meter]] = {"sqlite": _sqlite}


class Shop:
    """A meter with accounts on plans of the test's own, and short words for what the tests do most."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def set_plan(self, name: str, *limits: Limit, rates: tuple[Rate, ...] = ()) -> None:
        """Write a plan, or its next version, in force from now."""
        with self.meter.ledger.write() as connection:
            plan = Plan(name=name, retention_days=30, limits=limits, rates=rates)
            plan_versions.apply(connection, [plan], now=self.meter._clock(), actor="test")

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
        """Close the meter, after a last look at its counters."""
        assert [check for check in check_counters(self.meter.ledger) if not check.agrees] == []
        self.meter.close()

    def count(self, table: str, where: str = "1") -> int:
        """Rows of a table of the ledger."""
        with self.meter.ledger.read() as connection:
            return int(connection.exec_driver_sql(f"SELECT count(*) FROM {table} WHERE {where}").scalar_one())

    def written(self) -> dict[str, int]:
        """How many rows there are of what an admission may write."""
        tables = ("events", "event_ids", "holds", "replays", "request_log", "counters", "rate_counters")
        return {table: self.count(table) for table in tables}

    def counters(self) -> list[tuple[Any, ...]]:
        """Every counter and rate counter, as kept."""
        with self.meter.ledger.read() as connection:
            rows = connection.exec_driver_sql("SELECT * FROM counters ORDER BY 1, 2, 3, 4, 5, 6").all()
            rows += connection.exec_driver_sql("SELECT * FROM rate_counters ORDER BY 1, 2, 3, 4, 5, 6").all()
            return [tuple(row) for row in rows]


@pytest.fixture(params=list(STORES))
def open_shop(
    request: pytest.FixtureRequest, tmp_path: Path, empty_ledger: Path
) -> Iterator[Callable[[Callable[[], datetime]], Shop]]:
    """Opens shops, each on a store of its own. When one closes, its counters must equal what the ledger says."""
    shops: list[Shop] = []

    def open_one(clock: Callable[[], datetime]) -> Shop:
        folder = tmp_path / f"shop-{len(shops)}"
        folder.mkdir()
        shops.append(Shop(STORES[request.param](folder, empty_ledger, clock)))
        return shops[-1]

    yield open_one
    for shop in shops:
        shop.close()


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
