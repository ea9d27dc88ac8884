"""A period's events costed anew: the one way in which a cost that was booked ever changes."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from decimal import Decimal, localcontext
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from prefect import task

from metering.billing.money import EXACT
from metering.billing.tables import written
from metering.ledger import Ledger, admin_log
from metering.ledger.schema import archives, closes, event_costs, events, recosts, replaced_costs
from tasks import costs
from tasks.errors import JobError
from tasks.warehouse import lease

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from datetime import datetime
    from pathlib import Path

    from tasks.costs import Cost

__all__ = ["Act", "CostChange", "recost_period"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Act:
    """Who costs a period anew, when and why. The same again, but for the time, goes on with one that has not ended."""

    period: str
    """The label of the billing periods, such as `2023-11`."""
    actor: str
    reason: str
    made_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class CostChange:
    """What a recost makes of an account's costs in the period, over what is billable."""

    account: str
    events: int
    """How many have another cost, or one by other prices; also those that are not billable."""
    before: Decimal
    """USD, as far as prices were known."""
    after: Decimal
    unpriced_before: int
    """Requests whose cost was not known."""
    unpriced_after: int

    def __str__(self) -> str:
        text = (
            f"{self.account}: {written(self.before)} -> {written(self.after)} USD, {self.events:,} events costed anew"
        )
        if self.unpriced_before or self.unpriced_after:
            text += f", requests without a price: {self.unpriced_before:,} -> {self.unpriced_after:,}"
        return text


@task
def recost_period(ledger_url: str, warehouse: Path, act: Act, *, dry_run: bool) -> list[CostChange]:
    """Cost the period's events that have a cost by today's prices; the accounts that it changes, by name.

    Each batch is one transaction, so one that was killed is finished by the same act again. Loads wait meanwhile, and
    need a rebuild afterwards. A dry run writes nothing. Raises `JobError` where another recost is in the way.
    """
    ledger = Ledger(ledger_url)
    try:
        if dry_run:
            return _recost(ledger, act, dry_run=True)
        with lease(warehouse, exclusive=True):
            return _recost(ledger, act, dry_run=False)
    finally:
        ledger.close()


@dataclass(frozen=True, slots=True)
class _Standing:
    """How the ledger's recosts stand."""

    newest: int
    """0 where there is none."""
    is_ours: bool
    """Whether the newest one is this act, and has not ended."""


def _recost(ledger: Ledger, act: Act, *, dry_run: bool) -> list[CostChange]:
    sums: defaultdict[str, Any] = defaultdict(Counter)
    with ledger.read() as connection:
        archived = sa.select(archives.c.account).where(archives.c.period == act.period).order_by(archives.c.account)
        account = connection.execute(archived.limit(1)).scalar()
        if account is not None:
            raise JobError(f"events of {act.period} are archived, such as those of {account!r}: their costs are final")
        standing = _standing(connection, act)
    for page in _pages(ledger, act.period, standing.newest if standing.is_ours else 0):
        _add_up(sums, page)
        new = {row["seq"]: cost for row, cost in page if cost != (row["cost"], row["price_version"])}
        if new and not dry_run:
            standing = _replace(ledger, act, standing, new)
    if not dry_run:
        _end(ledger, act, standing)
    return [CostChange(account=account, **sums[account]) for account in sorted(sums) if sums[account]["events"]]


def _standing(connection: sa.Connection, act: Act) -> _Standing:
    row = connection.execute(sa.select(recosts).order_by(recosts.c.recost.desc()).limit(1)).one_or_none()
    if row is None or row.ended:
        return _Standing(0 if row is None else row.recost, is_ours=False)
    if row.period != act.period:
        raise JobError(
            f"recost {row.recost} of {row.period} has not ended: run it again before that of {act.period}, with "
            f"--reason {row.reason!r}"
        )
    made = (row.actor, row.reason, row.price_version)
    return _Standing(row.recost, is_ours=made == (act.actor, act.reason, costs.price_version()))


def _pages(ledger: Ledger, period: str, recost: int) -> Iterator[list[tuple[Mapping[str, Any], Cost]]]:
    """The period's events in the order they are costed in, each with its new cost.

    In that order a reversal that is booked meanwhile comes later, or takes the new cost of what it takes back.
    """
    order = costs.commit_order(ledger)
    keys = [f"order_{number}" for number in range(len(order))]
    rows = (
        sa.select(
            events,
            event_costs.c.cost,
            event_costs.c.price_version,
            replaced_costs.c.cost.label("replaced_cost"),
            replaced_costs.c.price_version.label("replaced_version"),
            *(column.label(key) for column, key in zip(order, keys, strict=True)),
        )
        .join_from(events, event_costs, event_costs.c.seq == events.c.seq)
        .outerjoin(replaced_costs, (replaced_costs.c.seq == events.c.seq) & (replaced_costs.c.recost == recost))
        .where(events.c.period == period)
        .order_by(*order)
        .limit(costs.EVENTS_PER_COMMIT)
    )
    after: Sequence[int] | None = None
    while True:
        with ledger.read() as connection:
            query = rows if after is None else rows.where(sa.tuple_(*order) > sa.tuple_(*after))
            page = _priced(connection, connection.execute(query).mappings().all())
        if not page:
            return
        yield page
        after = [page[-1][0][key] for key in keys]


def _priced(connection: sa.Connection, page: Sequence[Mapping[Any, Any]]) -> list[tuple[Mapping[str, Any], Cost]]:
    cost_of = costs.pricing(connection)
    originals = costs.reversed_events(connection, [row for row in page if row["requests"] < 0])

    def new_cost(row: Mapping[str, Any]) -> Cost:
        if row["requests"] >= 0:
            return cost_of(row)
        original = originals.get(row["event_id"])
        return (row["cost"], row["price_version"]) if original is None else costs.negated(cost_of(original))

    return [(row, new_cost(row)) for row in page]


def _add_up(sums: defaultdict[str, Any], page: Sequence[tuple[Mapping[str, Any], Cost]]) -> None:
    with localcontext(EXACT):
        for row, (after, version) in page:
            before = row["cost"], row["price_version"]
            if row["replaced_version"] is not None:  # by this act, before it was killed
                before = row["replaced_cost"], row["replaced_version"]
            counts = row["billable"]
            sums[row["account"]].update(
                events=before != (after, version),
                before=(counts and before[0]) or Decimal(0),
                after=(counts and after) or Decimal(0),
                unpriced_before=row["requests"] * (counts and before[0] is None),
                unpriced_after=row["requests"] * (counts and after is None),
            )


def _replace(ledger: Ledger, act: Act, expected: _Standing, new: Mapping[int, Cost]) -> _Standing:
    """Write a batch, and keep what it replaces; the first one begins the act."""
    with ledger.write() as connection:
        found = _checked(connection, act, expected)
        booked = connection.execute(sa.select(event_costs).where(event_costs.c.seq.in_(new))).mappings().all()
        old = [row for row in booked if (row["cost"], row["price_version"]) != new[row["seq"]]]
        if not old:
            return found
        recost = found.newest if found.is_ours else _begin(connection, act)
        connection.execute(replaced_costs.insert(), [{"recost": recost, **row} for row in old])
        connection.execute(
            event_costs.update().where(event_costs.c.seq == sa.bindparam("of")),
            [
                {"of": row["seq"], "cost": cost, "price_version": version, "costed_at": act.made_at}
                for row, (cost, version) in ((row, new[row["seq"]]) for row in old)
            ],
        )
        return _Standing(recost, is_ours=True)


def _checked(connection: sa.Connection, act: Act, expected: _Standing) -> _Standing:
    found = _standing(connection, act)
    if found.newest != expected.newest:
        raise JobError(f"recost {found.newest} has begun meanwhile, and takes the place of this one")
    return found


def _begin(connection: sa.Connection, act: Act) -> int:
    closed = sa.select(sa.func.count()).select_from(closes).where(closes.c.period == act.period)
    if count := connection.execute(closed).scalar_one():
        raise JobError(
            f"period {act.period} is closed for {count:,} accounts: what was billed stays, and so does what it cost"
        )
    version = costs.price_version()
    result = connection.execute(
        recosts.insert().values(
            made_at=act.made_at,
            actor=act.actor,
            reason=act.reason,
            period=act.period,
            price_version=version,
            ended=False,
        )
    )
    assert result.inserted_primary_key is not None
    recost = int(result.inserted_primary_key[0])
    admin_log.note(
        connection,
        at=act.made_at,
        actor=act.actor,
        action="costs.recost",
        subject=act.period,
        recost=recost,
        price_version=version,
        reason=act.reason,
    )
    return recost


def _end(ledger: Ledger, act: Act, standing: _Standing) -> None:
    """Say that all of the period is costed anew, which also ends what an earlier act on it began."""
    with ledger.write() as connection:
        _checked(connection, act, standing)
        connection.execute(recosts.update().where(recosts.c.recost == standing.newest).values(ended=True))
