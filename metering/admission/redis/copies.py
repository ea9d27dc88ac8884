"""What a process knows of an account: read from the ledger on a miss, good for as long as Redis agrees with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import sqlalchemy as sa

from metering.admission.decide import Counter, RateCounter, counter_of, rate_counter_of
from metering.admission.redis.keys import account_keys, counter_key, rate_key, shard_of
from metering.billing.money import EXACT
from metering.ledger import outbox
from metering.ledger.schema import account_plans, accounts, api_keys, plan_versions
from metering.ledger.transactions import cursor_of
from metering.plans import Plan
from metering.windows import period_label, period_window

if TYPE_CHECKING:
    from metering.admission.directory import Directory
    from metering.ledger import Ledger
    from metering.plans import Limit

__all__ = [
    "AccountCopy",
    "Frame",
    "KnownKey",
    "from_us",
    "rate_increment",
    "rate_keys",
    "rate_multiplier",
    "read_account",
    "read_key",
    "read_plan",
    "scaled",
    "to_us",
    "unscaled",
]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_NEVER_US = 2**53
_PLACES = 12


def to_us(at: datetime) -> int:
    """A moment as microseconds since 1970."""
    return (at - _EPOCH) // _MICROSECOND


def from_us(us: int) -> datetime:
    """The moment that `to_us` was told."""
    return _EPOCH + timedelta(microseconds=us)


def scaled(metric: str, amount: int | Decimal) -> str:
    """An amount of a metric as a whole number: quantities in units of 10^-12."""
    return str(int(EXACT.scaleb(Decimal(amount), _PLACES) if metric == "quantity" else amount))


def unscaled(metric: str, text: str | bytes) -> int | Decimal:
    """The amount that `scaled` was told."""
    return EXACT.scaleb(Decimal(int(text)), -_PLACES) if metric == "quantity" else int(text)


def rate_multiplier(rate: RateCounter) -> str:
    """What microseconds are multiplied by to be an arrival time of a rate."""
    return scaled(rate.metric, rate.units)


def rate_increment(rate: RateCounter, amount: int | Decimal) -> str:
    """How far an amount moves the arrival time of a rate."""
    return str(int(scaled(rate.metric, amount)) * rate.period_us)


def rate_keys(account: str, plan: Plan, line: str, key_id: str) -> dict[RateCounter, str]:
    """The rates of a plan that count a call on a line, with their keys."""
    rates = [rate_counter_of(limit, key_id) for limit in plan.limits if limit.per is None and limit.line in ("*", line)]
    return {rate: _rate_key(shard_of(account), account, rate) for rate in rates}


def _rate_key(shard: int, account: str, rate: RateCounter) -> str:
    return rate_key(shard, account, rate.metric, rate.line, rate.key_id, rate.units, rate.period_us)


class KnownKey(NamedTuple):
    """Whose key a digest is. It never becomes another's."""

    account: str
    key_id: str


class Frame:
    """The limits of one line and key in one stretch of time, as Redis is told of them."""

    __slots__ = (
        "closes_us",
        "counters",
        "gen",
        "keys",
        "of_plan",
        "opens_us",
        "period",
        "period_label",
        "rates",
        "said",
    )

    def __init__(self, copy: AccountCopy, limits: list[Limit], key_id: str, at: datetime) -> None:
        self.of_plan = limits
        shard = copy.shard
        # Read once: another thread may agree on newer counters meanwhile, and names must be of what is said of them.
        epoch, self.gen = copy.epoch, copy.gen
        generation = f"{epoch}.{self.gen}"
        self.period = period_window(at, time_zone=copy.time_zone, anchor_day=copy.anchor_day)
        self.period_label = period_label(self.period, copy.time_zone)
        self.opens_us = max(to_us(self.period.start), copy.placed_us)
        self.closes_us = min(to_us(self.period.end), copy.closes_us)
        self.counters: dict[Counter, str] = {}
        """The key of each counter."""
        self.rates: dict[RateCounter, str] = {}
        """The key of each rate."""
        allowed: list[tuple[int, str]] = []
        tolerances: dict[RateCounter, int] = {}
        for limit in limits:
            if limit.per is None:
                rate = rate_counter_of(limit, key_id)
                self.rates[rate] = _rate_key(shard, copy.account, rate)
                # Two limits on one rate differ in their burst only: the smaller one decides.
                tolerance = int(rate_increment(rate, limit.burst))
                tolerances[rate] = min(tolerance, tolerances.get(rate, tolerance))
                continue
            counter = counter_of(limit, key_id, at, self.period)
            start_us, end_us = to_us(counter.window.start), to_us(counter.window.end)
            self.opens_us, self.closes_us = max(self.opens_us, start_us), min(self.closes_us, end_us)
            self.counters[counter] = counter_key(
                shard, copy.account, generation, counter.metric, counter.line, counter.key_id, start_us, end_us
            )
            assert limit.max is not None
            allowed.append((list(self.counters).index(counter) + 1, scaled(limit.metric, limit.max)))
        self.keys = (
            *account_keys(shard, copy.account, "shard", "events"),
            *self.counters.values(),
            *self.rates.values(),
        )
        windows = [(to_us(counter.window.start), to_us(counter.window.end)) for counter in self.counters]
        of_rates = [(rate_multiplier(rate), str(tolerances[rate])) for rate in self.rates]
        said = (
            key_id,
            str(copy.version),
            str(copy.plan_version),
            str(epoch),
            str(self.gen),
            self.opens_us,
            self.closes_us,
            [*chain.from_iterable(windows)],
            # Of each calendar limit, the place of its counter as Lua counts, and how much it allows.
            [*chain.from_iterable(allowed)],
            [*chain.from_iterable(of_rates)],
        )
        self.said = msgspec.Raw(msgspec.msgpack.encode(said))
        """All that the script is told of it, encoded once."""


@dataclass(slots=True, kw_only=True)
class AccountCopy:
    """An account at one version of it. `epoch` and `gen` are Redis's: which of its counters are the current ones."""

    account: str
    version: int
    plan_version: int
    plan: Plan
    time_zone: str
    anchor_day: int
    placed_us: int
    """Since when the plan version is in force for it."""
    closes_us: int
    """Until when, as far as is known."""
    keys: dict[str, str]
    """Of each key, empty, `revoked`, or when its grace time ends in microseconds."""
    epoch: int = 0
    gen: int = 0
    era: int = 0
    """Of the link, when it was read."""
    shard: int = field(init=False)
    _frames: dict[tuple[str, str], Frame] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.shard = shard_of(self.account)

    def agree(self, epoch: int, gen: int) -> None:
        """Take over which counters are the current ones."""
        self.epoch, self.gen = epoch, gen
        self._frames = {}

    def frame(self, line: str, key_id: str, at: datetime) -> Frame:
        """The frame of a call on a line at a moment."""
        frame = self._frames.get((line, key_id))
        if frame is None or not frame.opens_us <= to_us(at) < frame.closes_us:
            limits = [limit for limit in self.plan.limits if limit.line in ("*", line)]
            frame = self._frames[line, key_id] = Frame(self, limits, key_id, at)
        return frame

    def covers(self, at: datetime) -> bool:
        """Whether its plan version is the one in force at a moment."""
        return self.placed_us <= to_us(at) < self.closes_us


def read_key(ledger: Ledger, digest: str) -> KnownKey | None:
    """Whose key a digest is, as the ledger has it."""
    with ledger.read() as connection:
        query = sa.select(api_keys.c.account, api_keys.c.key_id).where(api_keys.c.digest == digest)
        found = connection.execute(query).first()
    return None if found is None else KnownKey(found.account, found.key_id)


def read_account(ledger: Ledger, directory: Directory, account: str, at: datetime) -> AccountCopy:
    """An account as the ledger has it, in one moment of the ledger. Raises `UnknownAccount`."""
    with ledger.read() as connection:
        cursor = cursor_of(connection)
        placed = directory.place(cursor, account, at)
        zone = connection.execute(
            sa.select(accounts.c.time_zone, accounts.c.anchor_day).where(accounts.c.account == account)
        ).one()
        plan_froms = connection.execute(
            sa.select(account_plans.c.effective_from).where(account_plans.c.account == account)
        ).scalars()
        version_froms = connection.execute(
            sa.select(plan_versions.c.effective_from).where(plan_versions.c.plan == placed.plan.name)
        ).scalars()
        changes = [to_us(change) for change in (*plan_froms, *version_froms)]
        now_us = to_us(at)
        keys = connection.execute(
            sa.select(api_keys.c.key_id, api_keys.c.revoked_at, api_keys.c.expires_at).where(
                api_keys.c.account == account
            )
        )
        return AccountCopy(
            account=account,
            version=outbox.version_of(connection, account),
            plan_version=placed.plan_version,
            plan=placed.plan,
            time_zone=zone.time_zone,
            anchor_day=zone.anchor_day,
            placed_us=max(change for change in changes if change <= now_us),
            closes_us=min((change for change in changes if change > now_us), default=_NEVER_US),
            keys={row.key_id: _state(row.revoked_at, row.expires_at) for row in keys},
        )


def read_plan(ledger: Ledger, plan_version: int) -> Plan:
    """A plan as of one version of it."""
    with ledger.read() as connection:
        query = sa.select(plan_versions.c.plan, plan_versions.c.document)
        row = connection.execute(query.where(plan_versions.c.plan_version == plan_version)).one()
    return Plan.from_dict(row.plan, msgspec.json.decode(row.document))


def _state(revoked_at: datetime | None, expires_at: datetime | None) -> str:
    if revoked_at is not None:
        return "revoked"
    return "" if expires_at is None else str(to_us(expires_at))
