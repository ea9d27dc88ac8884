"""What a quantity costs under a rate: exact, never rounded to the currency; that happens once, at the invoice item."""

from __future__ import annotations

from dataclasses import dataclass, replace
from decimal import Decimal, localcontext
from typing import Any, Literal, cast

from metering import checks
from metering.billing.money import EXACT, quotient
from metering.billing.tables import Table, checked_name, exact_number, moved, written
from metering.errors import InvalidPlan
from metering.events import MAX_LINE, MAX_NAME, METRICS

__all__ = ["Match", "Rate", "RateType", "Tier", "metric_name"]

RateType = Literal["flat", "per_unit", "graduated", "volume", "package", "cost_plus"]

MAX_PER = 10**12
MAX_TIERS = 100

_ZERO = Decimal(0)
_MATCH_KEYS = ("provider", "model", "service_tier")
_TIER_KEYS = ("up_to", "unit_amount", "flat_amount")
_COMMON_KEYS = ("line", "metric", "type", "match", "included", "minimum", "maximum")
_OWN_KEYS: dict[str, tuple[str, ...]] = {
    "flat": ("amount",),
    "per_unit": ("unit_amount", "per"),
    "graduated": ("tiers",),
    "volume": ("tiers",),
    "package": ("package_size", "package_amount", "free_units"),
    "cost_plus": ("markup_percent",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """What usage a rate is for, besides its line and metric. None matches any, also usage that does not say."""

    provider: str | None = None
    model: str | None = None
    """A glob as of `fnmatch.fnmatchcase`: `gpt-4.1*`."""
    service_tier: str | None = None

    def __post_init__(self) -> None:
        for key in _MATCH_KEYS:
            if getattr(self, key) is not None:
                checked_name(f"match.{key}", getattr(self, key), MAX_NAME)

    @classmethod
    def from_dict(cls, document: object, *, where: str = "match") -> Match:
        """As in plans.toml. Raises `InvalidPlan` at `where`."""
        table = Table(where, document, _MATCH_KEYS)
        try:
            return cls(**{key: table.text(key) for key in _MATCH_KEYS if key in table})
        except InvalidPlan as exc:
            raise moved(exc, "match", where) from None

    def to_dict(self) -> dict[str, str]:
        """As in plans.toml: only what is given."""
        return {key: getattr(self, key) for key in _MATCH_KEYS if getattr(self, key) is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """One step of a graduated or volume rate."""

    up_to: Decimal | None = None
    """The last unit of the tier, inclusive; None in the last tier, which has no end."""
    unit_amount: Decimal = _ZERO
    flat_amount: Decimal = _ZERO
    """Due once the tier is entered; the first tier's also at zero units."""

    def __post_init__(self) -> None:
        for key in _TIER_KEYS:
            if getattr(self, key) is not None:
                object.__setattr__(self, key, exact_number(f"tier.{key}", getattr(self, key)))

    @classmethod
    def from_dict(cls, document: object, *, where: str = "tier") -> Tier:
        """As in plans.toml. Raises `InvalidPlan` at `where`."""
        table = Table(where, document, _TIER_KEYS)
        if "unit_amount" not in table and "flat_amount" not in table:
            raise InvalidPlan(where, "a tier has a unit_amount, a flat_amount or both")
        return cls(**{key: table.number(key) for key in _TIER_KEYS if key in table})

    def to_dict(self) -> dict[str, str]:
        """As in plans.toml: only what is given or not zero."""
        numbers = {key: getattr(self, key) for key in _TIER_KEYS}
        return {key: written(n) for key, n in numbers.items() if n is not None and (n or key == "unit_amount")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """The price of one metric, over an account's quantity in one period. Money is in the plan's currency.

    Raises `InvalidPlan` where the numbers cannot be a price. A number that is not of its `type` has no effect.
    """

    type: RateType
    line: str = "*"
    """The line it is for; `*` is every line."""
    metric: str | None = None
    """What it counts. `cost` for `cost_plus`; `flat` needs none."""
    match: Match = Match()
    included: Decimal = _ZERO
    """Units that come off the quantity before it is priced."""
    minimum: Decimal | None = None
    maximum: Decimal | None = None
    fixed_amount: Decimal = _ZERO
    """Of `flat`: due once a period. In plans.toml it is `amount`."""
    unit_amount: Decimal = _ZERO
    """Of `per_unit`: the price of `per` units."""
    per: int = 1
    tiers: tuple[Tier, ...] = ()
    """Of `graduated` and `volume`: ascending, the last without end."""
    package_size: Decimal = Decimal(1)
    package_amount: Decimal = _ZERO
    free_units: Decimal = _ZERO
    """Of `package`: units below the first package."""
    markup_percent: Decimal = _ZERO
    """Of `cost_plus`: 20 bills 1.20 times what the provider charges."""

    def __post_init__(self) -> None:
        if self.type not in _OWN_KEYS:
            raise InvalidPlan("rate.type", f"got {self.type!r}, expected one of {', '.join(_OWN_KEYS)}")
        checked_name("rate.line", self.line, MAX_LINE)
        self._check_metric()
        for key in _NUMBERS:
            object.__setattr__(self, key, exact_number(f"rate.{key}", getattr(self, key)))
        for key in ("minimum", "maximum"):
            if getattr(self, key) is not None:
                object.__setattr__(self, key, exact_number(f"rate.{key}", getattr(self, key)))
        if self.minimum is not None and self.maximum is not None and self.minimum > self.maximum:
            raise InvalidPlan("rate.minimum", f"{self.minimum} is above the maximum, which is {self.maximum}")
        if type(self.per) is not int or not 1 <= self.per <= MAX_PER:
            raise InvalidPlan("rate.per", f"got {self.per!r}, expected 1 to {MAX_PER:,} units")
        if not self.package_size:
            raise InvalidPlan("rate.package_size", "got 0, expected more than 0 units")
        if self.type in ("graduated", "volume"):
            _check_tiers(self.tiers)

    def _check_metric(self) -> None:
        if self.type == "cost_plus":
            if self.metric not in (None, "cost"):
                raise InvalidPlan("rate.metric", f"got {self.metric!r}; cost_plus counts cost, so leave the metric out")
            object.__setattr__(self, "metric", "cost")
        elif self.metric is None:
            if self.type != "flat":
                raise InvalidPlan("rate", f"metric is missing; expected one of {', '.join(METRICS)}")
        elif self.metric not in METRICS:
            raise InvalidPlan("rate.metric", f"got {self.metric!r}, expected one of {', '.join(METRICS)}")

    @classmethod
    def from_dict(cls, document: object, *, where: str = "rate") -> Rate:
        """A rate as in plans.toml, money as strings. Raises `InvalidPlan` at `where`."""
        every_key = dict.fromkeys((*_COMMON_KEYS, *(key for keys in _OWN_KEYS.values() for key in keys)))
        kind = Table(where, document, tuple(every_key)).text("type")
        if kind not in _OWN_KEYS:
            raise InvalidPlan(f"{where}.type", f"got {kind!r}, expected one of {', '.join(_OWN_KEYS)}")
        own = _OWN_KEYS[kind]
        table = Table(where, document, (*_COMMON_KEYS, *own))
        given: dict[str, Any] = {key: table.text(key) for key in ("line", "metric") if key in table}
        given |= {key: table.number(key) for key in ("included", "minimum", "maximum") if key in table}
        if "match" in table:
            given["match"] = Match.from_dict(table.value("match"), where=f"{where}.match")
        for key in own:
            if key == "tiers":
                given[key] = tuple(Tier.from_dict(tier, where=place) for place, tier in table.tables(key))
            elif key == "per":
                given[key] = table.whole(key, 1)
            elif key == "free_units":
                given[key] = table.number(key, _ZERO)
            else:
                given["fixed_amount" if key == "amount" else key] = table.number(key)
        try:
            return cls(type=cast("RateType", kind), **given)
        except InvalidPlan as exc:
            raise moved(exc, "rate", where) from None

    def to_dict(self) -> dict[str, Any]:
        """As in plans.toml, numbers as strings; `from_dict` gives the same rate again."""
        document: dict[str, Any] = {"line": self.line, "type": self.type}
        if self.metric is not None:
            document["metric"] = self.metric
        if matched := self.match.to_dict():
            document["match"] = matched
        for key in _OWN_KEYS[self.type]:
            if key == "tiers":
                document[key] = [tier.to_dict() for tier in self.tiers]
            elif key == "per":
                document[key] = self.per
            else:
                document[key] = written(getattr(self, "fixed_amount" if key == "amount" else key))
        if self.included:
            document["included"] = written(self.included)
        for key in ("minimum", "maximum"):
            if getattr(self, key) is not None:
                document[key] = written(getattr(self, key))
        return document

    def amount(self, quantity: Decimal | int) -> Decimal:
        """The exact price of `quantity` units (of provider cost in USD, for `cost_plus`) in one period.

        Raises `InvalidEvent` naming `quantity` for what is not an int or Decimal of 0 or more with at most 12 decimals.
        """
        with localcontext(EXACT):
            units = checks.quantity("quantity", quantity) - self.included
            amount = self._price(units if units > 0 else _ZERO)
            if self.minimum is not None and amount < self.minimum:
                return self.minimum
            if self.maximum is not None and amount > self.maximum:
                return self.maximum
            return amount

    def metered_only(self) -> Rate | None:
        """The rate without what is due once a period: for usage on a plan version no longer in force at period end.

        Included and free units, the minimum and the tiers' flat amounts are gone; nothing is left of a `flat` rate.
        """
        if self.type == "flat":
            return None
        tiers = tuple(replace(tier, flat_amount=_ZERO) for tier in self.tiers)
        return replace(self, included=_ZERO, free_units=_ZERO, minimum=None, tiers=tiers)

    def __str__(self) -> str:
        """For people: `application: input tokens, gpt-4.1*`."""
        match self.type:
            case "flat":
                what = "flat fee"
            case "cost_plus":
                what = f"provider cost plus {written(self.markup_percent)}%"
            case _:
                what = metric_name(str(self.metric))
        line = "All lines" if self.line == "*" else self.line
        return ", ".join([f"{line}: {what}", *self.match.to_dict().values()])

    def _price(self, units: Decimal) -> Decimal:
        match self.type:
            case "flat":
                return self.fixed_amount
            case "per_unit":
                return quotient(units * self.unit_amount, self.per)
            case "graduated":
                return _graduated(self.tiers, units)
            case "volume":
                return _volume(self.tiers, units)
            case "package":
                return self.package_amount * _started_packages(units - self.free_units, self.package_size)
            case "cost_plus":
                return quotient(units * (100 + self.markup_percent), 100)


def metric_name(metric: str) -> str:
    """A metric for people: `input tokens`; `units` for `quantity`."""
    return "units" if metric == "quantity" else metric.replace("_", " ")


_NUMBERS = (
    "included",
    "fixed_amount",
    "unit_amount",
    "package_size",
    "package_amount",
    "free_units",
    "markup_percent",
)


def _graduated(tiers: tuple[Tier, ...], units: Decimal) -> Decimal:
    """Each tier prices the units inside it, and every tier entered adds its flat amount."""
    total = tiers[0].flat_amount
    below = _ZERO
    for tier in tiers:
        end = units if tier.up_to is None else min(units, tier.up_to)
        if end <= below:
            break
        total += (end - below) * tier.unit_amount + (tier.flat_amount if below else _ZERO)
        below = end
    return total


def _volume(tiers: tuple[Tier, ...], units: Decimal) -> Decimal:
    """The tier reached prices all units, and only its flat amount is due."""
    reached = next(tier for tier in tiers if tier.up_to is None or units <= tier.up_to)
    return units * reached.unit_amount + reached.flat_amount


def _started_packages(units: Decimal, size: Decimal) -> Decimal:
    if units <= 0:
        return _ZERO
    whole, rest = divmod(units, size)
    return whole + (1 if rest else 0)


def _check_tiers(tiers: tuple[Tier, ...]) -> None:
    if not 1 <= len(tiers) <= MAX_TIERS:
        raise InvalidPlan("rate.tiers", f"got {len(tiers)} tiers, expected 1 to {MAX_TIERS}")
    below = _ZERO
    for index, tier in enumerate(tiers[:-1]):
        if tier.up_to is None:
            raise InvalidPlan(f"rate.tiers[{index}]", "up_to is missing; only the last tier has no end")
        if tier.up_to <= below:
            raise InvalidPlan(f"rate.tiers[{index}].up_to", f"got {tier.up_to}, expected more than {below}")
        below = tier.up_to
    if tiers[-1].up_to is not None:
        raise InvalidPlan(
            f"rate.tiers[{len(tiers) - 1}].up_to",
            f"got {tiers[-1].up_to}; the last tier has no up_to, so that every quantity has a price",
        )
