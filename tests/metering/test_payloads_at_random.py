"""Anything at all is read or refused, and nothing in between."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metering import InvalidUsage, TokenUsage
from metering.payloads import usage_of, usage_of_stream
from tests.metering.payload_cases import CASES, Lazy, Plain, made_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


counts = st.integers(0, 2**53) | st.integers(0, 50)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=8,
)


def names_of(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield name
            yield from names_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from names_of(item)


NAMES_SEEN = sorted({name for case in CASES.values() for name in names_of(case.get("payload", case.get("stream")))})


def read_or_refuse(read: Callable[[Any, str | None], TokenUsage], payload: Any, provider: str | None) -> None:
    try:
        usage = read(payload, provider)
    except InvalidUsage:
        return
    assert isinstance(usage, TokenUsage)
    assert min(usage.counts()) >= 0
    assert usage.reasoning_tokens <= usage.output_tokens
    assert usage.uncached_input_tokens >= 0


names = st.none() | st.sampled_from(["openai", "anthropic", "x-ai", "google", "aws", "other"])
blocks = st.dictionaries(
    st.sampled_from(NAMES_SEEN),
    st.recursive(
        counts | anything,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES_SEEN), inner, max_size=4),
        max_leaves=12,
    ),
    max_size=6,
)


@given(anything | blocks, names)
def test_any_json_is_read_or_refused(payload: Any, provider: str | None) -> None:
    read_or_refuse(usage_of, payload, provider)


@given(st.lists(anything | blocks, max_size=4), names)
def test_any_chunks_are_read_or_refused(chunks: Any, provider: str | None) -> None:
    read_or_refuse(usage_of_stream, chunks, provider)


def mutated(value: Any, data: st.DataObject) -> Any:
    """The same with one thing in it changed, left out or added."""
    if isinstance(value, dict) and value:
        name = data.draw(st.sampled_from(list(value)))
        match data.draw(st.sampled_from(["into", "drop", "set", "add"])):
            case "drop":
                return {other: item for other, item in value.items() if other != name}
            case "set":
                return value | {name: data.draw(counts | anything)}
            case "add":
                return value | {data.draw(st.sampled_from(NAMES_SEEN)): data.draw(counts | anything)}
        return value | {name: mutated(value[name], data)}
    if isinstance(value, list) and value:
        at = data.draw(st.integers(0, len(value) - 1))
        return [*value[:at], mutated(value[at], data), *value[at + 1 :]]
    return data.draw(counts | anything)


@given(st.sampled_from(list(CASES.values())), names, st.data())
def test_a_mutated_answer_is_read_or_refused(case: dict[str, Any], provider: str | None, data: st.DataObject) -> None:
    changed = case.get("payload") or case["stream"]
    for _ in range(data.draw(st.integers(1, 3))):
        changed = mutated(changed, data)
    maker = data.draw(st.sampled_from([None, Plain, Lazy, SimpleNamespace]))
    if maker is not None:
        changed = made_of(maker, changed)
    read_or_refuse(usage_of if "payload" in case else usage_of_stream, changed, provider)


class Odd:
    """Whatever is asked of it, it raises; asked for its usage it would never answer."""

    __slots__ = ("error",)

    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError

    @property
    def usage(self) -> Any:
        while True:
            pass

    def __eq__(self, other: object) -> bool:
        raise RuntimeError

    def __hash__(self) -> int:
        raise RuntimeError

    def __repr__(self) -> str:
        raise RuntimeError

    def __bool__(self) -> bool:
        raise RuntimeError

    def __len__(self) -> int:
        raise RuntimeError


class OddMapping(Mapping[str, Any]):
    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def __getitem__(self, name: str) -> Any:
        raise self.error

    def __iter__(self) -> Iterator[str]:
        raise self.error

    def __len__(self) -> int:
        raise self.error


class Endless(Mapping[str, Any]):
    def __getitem__(self, name: str) -> Any:
        return self

    def __iter__(self) -> Iterator[str]:
        n = 0
        while True:
            yield f"n{n}"
            n += 1

    def __len__(self) -> int:
        return 2**40


class OddDump:
    def model_dump(self) -> Any:
        return self.model_dump()


def a_circle() -> dict[str, Any]:
    circle: dict[str, Any] = {}
    circle["usage"] = circle["message"] = circle["response"] = circle["delta"] = circle
    return circle


ODD = [
    *[kind(error) for kind in (Odd, OddMapping) for error in (RuntimeError, RecursionError, AttributeError, KeyError)],
    Endless(),
    OddDump(),
    a_circle(),
    object(),
    Odd,
    json,
    len,
    lambda: None,
    range(5),
    {Odd: 1},
    {(): Odd(RuntimeError)},
]


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: type(odd).__name__)
def test_an_odd_object_is_refused(odd: Any) -> None:
    for payload in (odd, {"usage": odd}, {"prompt_tokens": odd, "completion_tokens": odd, "total_tokens": odd}):
        with pytest.raises(InvalidUsage):
            usage_of(payload)
    fine = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    for name in ("prompt_tokens_details", "total_tokens", "cached_tokens", "input_tokens"):
        read_or_refuse(usage_of, fine | {name: odd}, None)
    read_or_refuse(usage_of, {"input_tokens": 1, "output_tokens": 1, "iterations": odd}, None)
    read_or_refuse(usage_of, {"id": odd, "model": odd, "usage": fine | {odd.__class__.__name__: odd}}, None)
    with pytest.raises(InvalidUsage):
        usage_of_stream([odd, {"usage": odd}, {"message": odd}, {"chunk": {"bytes": odd}}])
