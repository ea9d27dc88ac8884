"""Answers of providers, in payloads/*.json: `recorded` from their APIs, the others as they document them.

A recorded one names the public file, at a commit, that keeps it. Texts are cut, and so is what tells nothing of usage,
whole chunks too; the usage is as it came, with its nulls and zeros. A documented one names the document of its shape;
counts are that document's, unless `numbers_are_ours`.
The makers give the same data as the objects that SDKs return.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import attrs
import msgspec
import pydantic
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CASES = {
    f"{file.stem}: {case['name']}": case
    for file in sorted(Path(__file__).with_name("payloads").glob("*.json"))
    for case in json.loads(file.read_text())
}
WHOLE = {name: case for name, case in CASES.items() if "payload" in case}
STREAMS = {name: case for name, case in CASES.items() if "stream" in case}
KNOWN_TO_GENAI_PRICES = {name: case for name, case in WHOLE.items() if "oracle" in case}

whole = pytest.mark.parametrize("case", WHOLE.values(), ids=WHOLE)
streams = pytest.mark.parametrize("case", STREAMS.values(), ids=STREAMS)


class Plain:
    def __init__(self, **data: Any) -> None:
        self.__dict__.update(data)

    @property
    def output_text(self) -> str:
        raise AssertionError("a property is not read")


class Dumped:
    """Keeps its data where nobody looks, and gives it by pydantic's method."""

    def __init__(self, **data: Any) -> None:
        self._data = data

    def model_dump(self) -> dict[str, Any]:
        return {name: undumped(value) for name, value in self._data.items()}


def undumped(value: Any) -> Any:
    if isinstance(value, list):
        return [undumped(item) for item in value]
    return value.model_dump() if isinstance(value, Dumped) else value


class Extra(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow", protected_namespaces=())


class Lazy(Mapping[str, Any]):
    def __init__(self, **data: Any) -> None:
        self._data = data

    def __getitem__(self, name: str) -> Any:
        return self._data[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._data)

    def __len__(self) -> int:
        return len(self._data)


def declared(**data: Any) -> Any:
    return pydantic.create_model("Declared", **dict.fromkeys(data, (Any, ...)))(**data)


def struct(**data: Any) -> Any:
    return msgspec.defstruct("Struct", list(data))(**data)


def slotted(**data: Any) -> Any:
    return attrs.make_class("Slotted", list(data), slots=True)(**data)


def dataclass(**data: Any) -> Any:
    return dataclasses.make_dataclass("Data", list(data), slots=True)(**data)


def class_values(**data: Any) -> Any:
    return type("Fake", (), data)()


MAKERS: list[Callable[..., Any]] = [
    Plain, SimpleNamespace, Dumped, Extra, Lazy, declared, struct, slotted, dataclass, class_values,
]  # fmt: skip


def made_of(maker: Callable[..., Any], value: Any) -> Any:
    if isinstance(value, list):
        return [made_of(maker, item) for item in value]
    if isinstance(value, dict) and all(str(name).isidentifier() for name in value):
        return maker(**{name: made_of(maker, item) for name, item in value.items()})
    return value
