"""Reads one table of plans.toml, key by key: each value in its one form, or `InvalidPlan` at the place it stands."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal, localcontext
from typing import Any

from metering import checks
from metering.billing.money import EXACT
from metering.errors import InvalidEvent, InvalidPlan

_NUMBER = re.compile(r"-?\d{1,26}(\.\d+)?", re.ASCII)


class Table:
    """One table and its place, such as `plans.pro.rates[2]`. Raises `InvalidPlan` for a key that is not allowed."""

    __slots__ = ("_values", "where")

    def __init__(self, where: str, values: object, allowed: Sequence[str]) -> None:
        if not isinstance(values, Mapping):
            raise InvalidPlan(where, f"got {values!r}, expected a table")
        for key in values:
            if key not in allowed:
                raise InvalidPlan(f"{where}.{key}", f"unknown key {key!r}; allowed here: {', '.join(allowed)}")
        self.where = where
        self._values: Mapping[str, Any] = values

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def text(self, key: str, default: str | None = None) -> str:
        """A string; `default` where the key is absent, and required where that is None."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise InvalidPlan(f"{self.where}.{key}", f"got {value!r}, expected a string")
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number; its range is for the record to check."""
        value = self._get(key, default)
        if type(value) is not int:
            raise InvalidPlan(f"{self.where}.{key}", f"got {value!r}, expected a whole number")
        return value

    def number(self, key: str, default: Decimal | None = None) -> Decimal:
        """Money or a quantity, exact: a string such as "2.50", or a whole number."""
        return exact_number(f"{self.where}.{key}", self._get(key, default))

    def tables(self, key: str) -> list[tuple[str, Any]]:
        """The elements of an array with the place of each; none where the key is absent."""
        values = self._values.get(key, ())
        if not isinstance(values, (list, tuple)):
            raise InvalidPlan(f"{self.where}.{key}", f"got {values!r}, expected an array of tables")
        return [(f"{self.where}.{key}[{index}]", value) for index, value in enumerate(values)]

    def value(self, key: str) -> object:
        """Whatever stands under a key that is there."""
        return self._values[key]

    def _get(self, key: str, default: object) -> object:
        value = self._values.get(key, default)
        if value is None:
            raise InvalidPlan(self.where, f"{key} is missing")
        return value


def exact_number(where: str, value: object) -> Decimal:
    """`value` as a Decimal of 0 or more, below 10^18, with at most 12 decimals. A float is refused."""
    if isinstance(value, float):
        raise InvalidPlan(where, f'got {value!r}: write money as a string, such as "0.25"; a float is not exact')
    if isinstance(value, str):
        if not _NUMBER.fullmatch(value):
            raise InvalidPlan(where, f'got {value!r}, expected a number such as "2.50"')
        value = Decimal(value)
    if type(value) is not int and not isinstance(value, Decimal):
        raise InvalidPlan(where, f'got {value!r}, expected a number such as "2.50"')
    try:
        with localcontext(EXACT):
            return checks.quantity(where, value)
    except InvalidEvent as exc:
        raise InvalidPlan(where, f"got {value}, expected {exc.expected}") from None


def checked_name(where: str, value: object, max_length: int) -> str:
    """`value` if it is a printable string of 1 to `max_length` characters."""
    try:
        return checks.text(where, value, max_length)
    except InvalidEvent as exc:
        raise InvalidPlan(where, f"got {value!r}, expected {exc.expected}") from None


def moved(error: InvalidPlan, root: str, where: str) -> InvalidPlan:
    """The same problem, with the record's own name `root` replaced by the place it was read from."""
    return InvalidPlan(where + error.where.removeprefix(root), error.problem)


def written(number: Decimal) -> str:
    """A Decimal in the one way it is stored: no exponent, no sign of zero, no zeros at its end, so equal is equal."""
    text = f"{number or Decimal(0):f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
