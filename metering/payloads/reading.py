"""Dicts and SDK objects read alike, one level at a time. Nothing is changed, and none of an object's code is run but a
mapping's own, and `model_dump` where there is nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from itertools import islice
from types import FunctionType, GetSetDescriptorType, MemberDescriptorType, ModuleType
from typing import Any, cast

from metering import checks
from metering.errors import InvalidUsage
from metering.events import MAX_NAME

__all__ = ["Part", "data_of", "names_in", "opened", "text_in", "walk"]

MAX_NAMES = 1_000
"""More than that in one mapping is not read."""

MAX_NAMES_SHOWN = 12
MAX_NAME_SHOWN = 40

_NOT_OBJECTS = (str, bytes, bytearray, int, float, complex, list, tuple, set, frozenset, type, ModuleType, FunctionType)


def data_of(value: object) -> Mapping[Any, object] | None:
    """What a mapping or an object holds by name; None for what holds nothing.

    Of an object that is its `__dict__`, its slots and pydantic's extra fields, or else plain values of its class; a
    property is code, and not read.
    """
    kind: Any = type(value)
    if kind is dict:
        return cast("dict[Any, object]", value)
    if value is None or issubclass(kind, _NOT_OBJECTS):
        return None
    if issubclass(kind, Mapping):
        return dict(islice(cast("Mapping[Any, object]", value).items(), MAX_NAMES))
    own_dict, slots = _layout(kind)
    data: dict[Any, object] = dict(own_dict.__get__(value)) if own_dict is not None else {}
    for name, slot in slots:
        try:
            held = slot.__get__(value)
        except AttributeError:
            continue  # never assigned
        if name != _EXTRA:
            data[name] = held
        elif type(held) is dict:
            data.update(held)
    return data or _class_values(kind) or None


_EXTRA = "__pydantic_extra__"
"""Where pydantic keeps fields that a model does not declare: those of another provider than the SDK's own."""


@lru_cache(maxsize=512)
def _layout(
    kind: type[Any],
) -> tuple[GetSetDescriptorType | MemberDescriptorType | None, tuple[tuple[str, MemberDescriptorType], ...]]:
    """Where instances of a class keep their data: the descriptor of `__dict__`, and those of its slots."""
    own_dict = None
    slots = {}
    for base in reversed(kind.__mro__):
        for name, attribute in vars(base).items():
            if name == "__dict__" and type(attribute) in (GetSetDescriptorType, MemberDescriptorType):
                own_dict = attribute
            elif type(attribute) is MemberDescriptorType and (name == _EXTRA or not name.startswith("_")):
                slots[name] = attribute
    return own_dict, tuple(slots.items())


def _class_values(kind: type) -> dict[Any, object]:
    return {
        name: attribute
        for base in reversed(kind.__mro__)
        for name, attribute in vars(base).items()
        if not name.startswith("_") and not hasattr(type(attribute), "__get__")
    }


def opened(value: object) -> Mapping[Any, object] | None:
    """The same of an answer or a chunk, which may keep its data to itself and give it by pydantic's `model_dump`."""
    data = data_of(value)
    if data is None or all(str(name).startswith("_") for name in data):
        for base in type(value).__mro__:
            if isinstance(vars(base).get("model_dump"), FunctionType):
                return data_of(cast("Any", value).model_dump())
    return data


def walk(data: Mapping[Any, object], path: tuple[str, ...]) -> Mapping[Any, object] | None:
    """What lies at a path of names; None where there is nothing, null, or no object."""
    found: Mapping[Any, object] | None = data
    for name in path:
        if found is None:
            return None
        found = data_of(found.get(name))
    return found


def text_in(data: Mapping[Any, object], *names: str) -> str | None:
    """The first of these names that holds a text an event could keep; None where none does."""
    for name in names:
        value = data.get(name)
        if type(value) is str and 1 <= len(value) <= MAX_NAME and value.isprintable():
            return value
    return None


def names_in(data: Mapping[Any, object]) -> str:
    """The names in it for an error, never the values: those may be private."""
    names = [name[:MAX_NAME_SHOWN] for name in islice(data, MAX_NAMES) if type(name) is str]
    more = f" and {len(names) - MAX_NAMES_SHOWN} more" if len(names) > MAX_NAMES_SHOWN else ""
    return (", ".join(names[:MAX_NAMES_SHOWN]) or "none") + more


class Part:
    """A block of counts and further blocks, by name. A name that holds null is as good as left out.

    Raises `InvalidUsage`, naming the place, for a count that is not a whole number from 0 to 2^53, and for what should
    be a block and is none.
    """

    __slots__ = ("_data", "_place")

    def __init__(self, data: Mapping[Any, object], place: str = "") -> None:
        self._data = data
        self._place = place

    def __contains__(self, name: str) -> bool:
        return self._data.get(name) is not None

    def has_any(self, *names: str) -> bool:
        """Whether one of these names holds something."""
        data = self._data
        for name in names:  # noqa: SIM110  asked of every rule there is; any() takes twice as long
            if data.get(name) is not None:
                return True
        return False

    def count(self, name: str) -> int:
        """A count that has to be there."""
        value = self._data.get(name)
        if value is None:
            raise InvalidUsage(
                self._place + name, None, f"a whole number of tokens; names seen: {names_in(self._data)}"
            )
        if type(value) is not int:
            raise InvalidUsage(self._place + name, type(value), "a whole number of tokens")
        return checks.tokens(self._place + name, value)

    def optional(self, *names: str) -> int:
        """A count that its provider leaves out or sets to null where there is none; the first of these that is said."""
        for name in names:
            if name in self:
                return self.count(name)
        return 0

    def whole(self, name: str) -> int:
        """A count that has to be there, of a provider that documents doubles: also 71.0."""
        value = self._data.get(name)
        if type(value) is float and value.is_integer():
            return checks.tokens(self._place + name, int(value))
        return self.count(name)

    def block(self, *names: str) -> Part:
        """A block within; an empty one where none of these names holds one."""
        for name in names:
            if name in self:
                return Part(self._data_of(self._data[name], name), f"{self._place}{name}.")
        return Part({}, f"{self._place}{names[0]}.")

    def blocks(self, *names: str) -> list[Part]:
        """A list of blocks; an empty one where none of these names holds one."""
        for name in names:
            if name in self:
                value = self._data[name]
                if type(value) not in (list, tuple):
                    raise InvalidUsage(self._place + name, type(value), "a list")
                return [
                    Part(self._data_of(item, f"{name}[{at}]"), f"{self._place}{name}[{at}].")
                    for at, item in enumerate(cast("list[object]", value))
                ]
        return []

    def word(self, name: str) -> str | None:
        """A word such as a kind; None where it is left out. An enum that is a text too is that text."""
        value = self._data.get(name)
        return cast("str", value) if issubclass(type(value), str) else None

    def refused(self, name: str, value: object, expected: str) -> InvalidUsage:
        """The error for a value of this block."""
        return InvalidUsage(self._place + name, value, expected)

    def _data_of(self, value: object, name: str) -> Mapping[Any, object]:
        data = data_of(value)
        if data is None:
            raise InvalidUsage(self._place + name, type(value), "an object")
        return data
