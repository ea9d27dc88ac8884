"""A rate of plans.toml, said in words."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Any

from metering.errors import InvalidPlan
from reports.formats import money, number

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["rate_words"]


def rate_words(rate: Mapping[str, Any], currency: str) -> str:
    """`2.50 USD per 1,000,000`, with what is included and the least and most it can come to.

    Takes the rate as written in plans.toml. Raises `InvalidPlan` for a type it does not know.
    """
    kind = rate.get("type")
    if kind not in _WORDS:
        raise InvalidPlan("rate.type", f"got {kind!r}, expected one of {', '.join(_WORDS)}")
    words = [_WORDS[kind](rate, currency)]
    if _of(rate, "included"):
        words.append(f"{number(_of(rate, 'included'))} included")
    if rate.get("minimum") is not None:
        words.append(f"at least {money(_of(rate, 'minimum'), currency)}")
    if rate.get("maximum") is not None:
        words.append(f"at most {money(_of(rate, 'maximum'), currency)}")
    return ", ".join(words)


def _flat(rate: Mapping[str, Any], currency: str) -> str:
    return f"{money(_of(rate, 'amount'), currency)} flat"


def _per_unit(rate: Mapping[str, Any], currency: str) -> str:
    per = _of(rate, "per", 1)
    return f"{money(_of(rate, 'unit_amount'), currency)} {'each' if per == 1 else f'per {number(per)}'}"


def _graduated(rate: Mapping[str, Any], currency: str) -> str:
    words = []
    below = Decimal(0)
    for tier in rate["tiers"]:
        price = _tier_price(tier, currency)
        if tier.get("up_to") is None:
            words.append(f"above {number(below)} {price}" if below else price)
            continue
        up_to = _of(tier, "up_to")
        words.append(f"{'next' if below else 'first'} {number(up_to - below)} {price}")
        below = up_to
    return ", ".join(words)


def _volume(rate: Mapping[str, Any], currency: str) -> str:
    words = []
    below = Decimal(0)
    for tier in rate["tiers"]:
        if tier.get("up_to") is None:
            reached = f" above {number(below)}" if below else ""
        else:
            below = _of(tier, "up_to")
            reached = f" up to {number(below)}"
        words.append(f"{_tier_price(tier, currency)}{reached}")
    return f"all units {', '.join(words)}"


def _tier_price(tier: Mapping[str, Any], currency: str) -> str:
    unit, flat = _of(tier, "unit_amount"), _of(tier, "flat_amount")
    if not unit:
        return f"for {money(flat, currency)}" if flat else "free"
    return f"at {money(unit, currency)} each" + (f" plus {money(flat, currency)}" if flat else "")


def _package(rate: Mapping[str, Any], currency: str) -> str:
    words = f"{money(_of(rate, 'package_amount'), currency)} per package of {number(_of(rate, 'package_size'))}"
    free = _of(rate, "free_units")
    return f"{words}, first {number(free)} free" if free else words


def _cost_plus(rate: Mapping[str, Any], currency: str) -> str:  # noqa: ARG001
    return f"provider cost plus {number(_of(rate, 'markup_percent'))}%"


_WORDS: dict[str, Callable[[Mapping[str, Any], str], str]] = {
    "flat": _flat,
    "per_unit": _per_unit,
    "graduated": _graduated,
    "volume": _volume,
    "package": _package,
    "cost_plus": _cost_plus,
}


def _of(numbers: Mapping[str, Any], name: str, default: int = 0) -> Decimal:
    value = numbers.get(name)
    return Decimal(default if value is None else str(value))
