"""Plans: what an account may use, how long its request log is kept, and what its usage costs. Read from plans.toml."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Literal

from metering.billing.money import minor_digits
from metering.billing.pricing import Rate, metric_name
from metering.billing.tables import Table, checked_name, exact_number, moved, written
from metering.checks import MAX_TOKENS
from metering.errors import InvalidPlan
from metering.events import MAX_LINE, MAX_NAME, METRICS
from metering.toml_lines import line_of

__all__ = ["BUILT_IN", "Limit", "Plan", "parse_plans"]

LimitPer = Literal["minute", "hour", "day", "week", "month", "period"]
Scope = Literal["account", "key"]
Reconcile = Literal["none", "traces", "provider"]
Fail = Literal["closed", "open"]

MAX_LIMITS = 32
MAX_RATES = 500
MAX_RETENTION_DAYS = 36_500
MAX_PRICE = 38
"""Of the name of a price, which the ledger keeps with each cost, after the version of the prices, in 64 characters."""

_PER: tuple[LimitPer, ...] = ("minute", "hour", "day", "week", "month", "period")
_SCOPES: tuple[Scope, ...] = ("account", "key")
_RECONCILE: tuple[Reconcile, ...] = ("none", "traces", "provider")
_FAIL: tuple[Fail, ...] = ("closed", "open")
_UNKNOWN_PRICE = ("refuse", "zero_and_flag")
_PRICE = re.compile(r"[a-z0-9][a-z0-9_-]*:[^\s:]\S*")
_RATE = re.compile(r"([1-9][0-9]{0,15})/(second|minute|hour|day)")
_UNIT_S = {"second": 1, "minute": 60, "hour": 3_600, "day": 86_400}
_LIMIT_KEYS = ("metric", "per", "max", "rate", "burst", "scope", "line")
_PLAN_KEYS = (
    "currency",
    "base_fee",
    "minimum",
    "retention_days",
    "reconcile",
    "fail",
    "unknown_price",
    "limits",
    "rates",
)
_ZERO = Decimal(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """How much of a metric may be used: `max` in each calendar window, or a `rate` that refills (GCRA).

    Raises `InvalidPlan`. `Limit(metric="requests", per="month", max=10_000)` is a quota,
    `Limit(metric="requests", rate="120/minute", burst=20)` a rate limit.
    """

    metric: str
    """One of `metering.events.METRICS`."""
    per: LimitPer | None = None
    """`minute` to `month` are UTC; `period` is the account's billing period. None for a rate limit."""
    max: Decimal | None = None
    """Whole, but for `quantity`. None for a rate limit."""
    rate: str | None = None
    """Count and unit, such as `120/minute`; the units are second, minute, hour and day."""
    burst: int = 0
    """Of a rate limit: how much may come at once; the count of the rate where it is not given."""
    scope: Scope = "account"
    line: str = "*"
    """The only line that is counted; `*` counts every line."""
    rate_count: int = field(init=False, default=0)
    rate_period_s: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if self.metric == "spend":
            raise InvalidPlan("limit.metric", "limits in money come in a later version; limit tokens or requests")
        if self.metric not in METRICS:
            raise InvalidPlan("limit.metric", f"got {self.metric!r}, expected one of {', '.join(METRICS)}")
        if self.scope not in _SCOPES:
            raise InvalidPlan("limit.scope", f"got {self.scope!r}, expected one of {', '.join(_SCOPES)}")
        checked_name("limit.line", self.line, MAX_LINE)
        if (self.rate is None) == (self.per is None and self.max is None):
            raise InvalidPlan("limit", "has either per and max, such as 10000 per month, or a rate such as 120/minute")
        if self.rate is None:
            self._check_quota()
        else:
            self._check_rate(self.rate)

    def _check_quota(self) -> None:
        if self.per not in _PER:
            raise InvalidPlan("limit.per", f"got {self.per!r}, expected one of {', '.join(_PER)}")
        if self.max is None:
            raise InvalidPlan("limit", f"max is missing; how much per {self.per}?")
        if self.burst:
            raise InvalidPlan("limit.burst", "only a rate has a burst")
        most = exact_number("limit.max", self.max)
        if self.metric != "quantity" and (most % 1 or most > MAX_TOKENS):
            raise InvalidPlan(
                "limit.max", f"got {most}, expected a whole number of {metric_name(self.metric)} up to 2^53"
            )
        object.__setattr__(self, "max", most)

    def _check_rate(self, rate: str) -> None:
        parts = _RATE.fullmatch(rate) if isinstance(rate, str) else None
        if not parts or int(parts[1]) > MAX_TOKENS:
            raise InvalidPlan(
                "limit.rate", f"got {rate!r}, expected a count and one of {', '.join(_UNIT_S)}: 120/minute"
            )
        count = int(parts[1])
        burst = self.burst or count
        if type(burst) is not int or not 1 <= burst <= MAX_TOKENS:
            raise InvalidPlan("limit.burst", f"got {burst!r}, expected a whole number from 1 to 2^53")
        object.__setattr__(self, "burst", burst)
        object.__setattr__(self, "rate_count", count)
        object.__setattr__(self, "rate_period_s", _UNIT_S[parts[2]])

    @classmethod
    def from_dict(cls, document: object, *, where: str = "limit") -> Limit:
        """A limit as in plans.toml. Raises `InvalidPlan` at `where`."""
        table = Table(where, document, _LIMIT_KEYS)
        given: dict[str, Any] = {key: table.text(key) for key in ("per", "rate", "scope", "line") if key in table}
        given["metric"] = table.text("metric")
        if "max" in table:
            given["max"] = table.number("max") if given["metric"] == "quantity" else Decimal(table.whole("max"))
        if "burst" in table:
            given["burst"] = table.whole("burst")
            if not given["burst"]:
                raise InvalidPlan(f"{where}.burst", "got 0, expected 1 or more")
        try:
            return cls(**given)
        except InvalidPlan as exc:
            raise moved(exc, "limit", where) from None

    def to_dict(self) -> dict[str, Any]:
        """As in plans.toml; `from_dict` gives the same limit again."""
        document: dict[str, Any] = {"metric": self.metric, "scope": self.scope, "line": self.line}
        if self.max is None:
            return document | {"rate": self.rate, "burst": self.burst}
        return document | {"per": self.per, "max": written(self.max) if self.metric == "quantity" else int(self.max)}

    @property
    def counter(self) -> str:
        """What identifies its counter: `requests/month/account/*`. `max` is no part of it, so it may change."""
        return f"{self.metric}/{self._window}/{self.scope}/{self.line}"

    @property
    def _window(self) -> str:
        if self.rate is None:
            return str(self.per)
        return f"{self.rate.replace('/', ' per ')} burst {self.burst}"

    def __str__(self) -> str:
        if self.max is None:
            text = f"{self.rate_count:,} {metric_name(self.metric)} per {str(self.rate).partition('/')[2]}"
            text += f" (burst {self.burst:,})"
        else:
            text = (
                f"{self.max:,f} {metric_name(self.metric)} per {'billing period' if self.per == 'period' else self.per}"
            )
        if self.scope == "key":
            text += " per key"
        return text if self.line == "*" else f"{text} on line {self.line}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A plan, or tier. Money is in `currency`. Raises `InvalidPlan`."""

    name: str
    currency: str = "USD"
    """An active ISO 4217 code."""
    base_fee: Decimal = _ZERO
    """A period; prorated by day."""
    minimum: Decimal = _ZERO
    """What a period's items come to at the least."""
    retention_days: int
    """How long the request log is kept."""
    reconcile: Reconcile = "none"
    """What must agree with the billed tokens before a period closes."""
    fail: Fail = "closed"
    """What becomes of calls while the store is away: refused, or admitted without asking limits and billed later."""
    unknown_price: str = "refuse"
    """What becomes of cost_plus usage whose provider cost is not known: `refuse` issues no invoice, `zero_and_flag`
    bills it at a cost of 0 and counts it, and a named price, such as `openai:gpt-4.1-mini`, costs it by that one."""
    limits: tuple[Limit, ...] = ()
    rates: tuple[Rate, ...] = ()

    def __post_init__(self) -> None:
        root = f"plans.{self.name}"
        checked_name("plans", self.name, MAX_NAME)
        try:
            minor_digits(self.currency)
        except (TypeError, ValueError) as exc:
            raise InvalidPlan(f"{root}.currency", str(exc)) from None
        for key in ("base_fee", "minimum"):
            object.__setattr__(self, key, exact_number(f"{root}.{key}", getattr(self, key)))
        if type(self.retention_days) is not int or not 0 <= self.retention_days <= MAX_RETENTION_DAYS:
            raise InvalidPlan(
                f"{root}.retention_days", f"got {self.retention_days!r}, expected 0 to {MAX_RETENTION_DAYS:,} days"
            )
        if self.reconcile not in _RECONCILE:
            raise InvalidPlan(f"{root}.reconcile", f"got {self.reconcile!r}, expected one of {', '.join(_RECONCILE)}")
        if self.fail not in _FAIL:
            raise InvalidPlan(f"{root}.fail", f"got {self.fail!r}, expected one of {', '.join(_FAIL)}")
        self._check_unknown_price(f"{root}.unknown_price")
        _check_limits(root, self.limits)
        _check_rates(root, self.rates, self.currency)

    def _check_unknown_price(self, where: str) -> None:
        if self.unknown_price in _UNKNOWN_PRICE:
            return
        checked_name(where, self.unknown_price, MAX_PRICE)
        if not _PRICE.fullmatch(self.unknown_price):
            raise InvalidPlan(
                where,
                f"got {self.unknown_price!r}, expected one of {', '.join(_UNKNOWN_PRICE)}, or a provider and its model "
                "such as openai:gpt-4.1-mini",
            )

    @property
    def named_price(self) -> str | None:
        """PROVIDER:MODEL whose price stands in where one is not known; None where `unknown_price` names none."""
        return None if self.unknown_price in _UNKNOWN_PRICE else self.unknown_price

    @classmethod
    def from_dict(cls, name: str, document: object) -> Plan:
        """A plan as under `[plans.NAME]` in plans.toml. Raises `InvalidPlan` with the place of what is wrong."""
        where = f"plans.{name}"
        table = Table(where, document, _PLAN_KEYS)
        return cls(
            name=name,
            currency=table.text("currency", "USD"),
            base_fee=table.number("base_fee", _ZERO),
            minimum=table.number("minimum", _ZERO),
            retention_days=table.whole("retention_days"),
            reconcile=table.text("reconcile", "none"),  # type: ignore[arg-type]  # checked by the record
            fail=table.text("fail", "closed"),  # type: ignore[arg-type]  # checked by the record
            unknown_price=table.text("unknown_price", "refuse"),
            limits=tuple(Limit.from_dict(limit, where=place) for place, limit in table.tables("limits")),
            rates=tuple(Rate.from_dict(rate, where=place) for place, rate in table.tables("rates")),
        )

    def to_dict(self) -> dict[str, Any]:
        """As in plans.toml, without the name; every number that may have decimals is a string."""
        return {
            "currency": self.currency,
            "base_fee": written(self.base_fee),
            "minimum": written(self.minimum),
            "retention_days": self.retention_days,
            "reconcile": self.reconcile,
            # Versions are told apart by this text, and those of before knew no other way.
            **({} if self.fail == "closed" else {"fail": self.fail}),
            **({} if self.unknown_price == "refuse" else {"unknown_price": self.unknown_price}),
            "limits": [limit.to_dict() for limit in self.limits],
            "rates": [rate.to_dict() for rate in self.rates],
        }

    def to_json(self) -> str:
        """`to_dict` as canonical JSON: equal plans give equal text."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    @property
    def digest(self) -> str:
        """32 hex digits of `to_json`: another plan of the same name is another version."""
        return hashlib.blake2b(self.to_json().encode(), digest_size=16).hexdigest()


def parse_plans(text: str) -> dict[str, Plan]:
    """The plans of a plans.toml, by name. Raises `InvalidPlan` with the place and, where it can be found, the line."""
    text = text.removeprefix("\ufeff")
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as exc:
        found = re.search(r"\(at line (\d+),", str(exc))
        at_end = text.count("\n") + 1 if "end of document" in str(exc) else None
        raise InvalidPlan("plans.toml", f"is not TOML: {exc}", line=int(found[1]) if found else at_end) from None
    try:
        plans = Table("plans.toml", document, ("plans",)).value("plans") if document else {}
        return {name: Plan.from_dict(name, plan) for name, plan in _named(plans)}
    except InvalidPlan as exc:
        where = exc.where.removeprefix("plans.toml.")
        raise InvalidPlan(exc.where, exc.problem, line=line_of(text, where)) from None


def _named(plans: object) -> list[tuple[str, object]]:
    if not isinstance(plans, dict):
        raise InvalidPlan("plans", f"got {plans!r}, expected tables such as [plans.pro]")
    return list(plans.items())


def _check_limits(root: str, limits: tuple[Limit, ...]) -> None:
    if len(limits) > MAX_LIMITS:
        raise InvalidPlan(f"{root}.limits", f"got {len(limits)} limits, expected at most {MAX_LIMITS}")
    seen: dict[str, int] = {}
    for index, limit in enumerate(limits):
        first = seen.setdefault(limit.counter, index)
        if first != index:
            raise InvalidPlan(
                f"{root}.limits[{index}]", f"counts the same as limits[{first}]: {limit.counter}; keep one"
            )


def _check_rates(root: str, rates: tuple[Rate, ...], currency: str) -> None:
    if len(rates) > MAX_RATES:
        raise InvalidPlan(f"{root}.rates", f"got {len(rates)} rates, expected at most {MAX_RATES}")
    seen: dict[object, int] = {}
    for index, rate in enumerate(rates):
        if rate.type == "flat":
            continue
        if rate.type == "cost_plus" and currency != "USD":
            raise InvalidPlan(
                f"{root}.rates[{index}]",
                f"a cost_plus rate bills provider cost, which is in USD; the plan is in {currency}",
            )
        first = seen.setdefault((rate.metric, rate.line, rate.match), index)
        if first != index:
            raise InvalidPlan(
                f"{root}.rates[{index}]",
                f"is for the same {rate.metric}, line and match as rates[{first}]: usage would have two prices",
            )


def _tier(name: str, requests_per_month: int | None, retention_days: int) -> Plan:
    limits = (
        () if requests_per_month is None else (Limit(metric="requests", per="month", max=Decimal(requests_per_month)),)
    )
    return Plan(name=name, retention_days=retention_days, limits=limits)


BUILT_IN: dict[str, Plan] = {
    plan.name: plan
    for plan in (
        _tier("free", 1_000, 7),
        _tier("pro", 10_000, 30),
        _tier("premium", 50_000, 90),
        _tier("enterprise", None, 365),
    )
}
"""The plans there are without a plans.toml."""
