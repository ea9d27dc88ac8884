"""The shapes of signals, and the rule that says who pays for the model."""

from __future__ import annotations

from collections import ChainMap, UserDict, defaultdict
from configparser import ConfigParser
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metering import InvalidEvent, TokenUsage
from metering.signals import (
    Signal,
    applied_learnings,
    extraction_tokens,
    learnings_generated,
    platform_pays,
)
from metering.tokens import count_input_tokens

# The shapes


def test_the_shapes_of_signals() -> None:
    text = "what the extractor saw, not what was there: 日本語 <|endoftext|>"
    assert extraction_tokens(text) == Signal(
        line="extraction_tokens", usage=TokenUsage(input_tokens=count_input_tokens(text))
    )
    assert extraction_tokens("").usage == TokenUsage()
    assert learnings_generated(3) == Signal(line="learnings_generated", quantity=3)
    assert applied_learnings(["a", "b"]) == Signal(line="application", quantity=2)
    assert applied_learnings({"a": 1}) == Signal(line="application", quantity=1)
    assert learnings_generated(0) is None
    assert [applied_learnings(empty) for empty in ([], (), {}, set())] == [None] * 4


@pytest.mark.parametrize("count", [-1, True, 1.0, None, "3"])
def test_what_is_no_count_is_no_signal(count: Any) -> None:
    with pytest.raises(InvalidEvent, match="count"):
        learnings_generated(count)


@pytest.mark.parametrize("results", ["text", b"text", None, 3, (n for n in range(3))])
def test_what_is_no_list_of_results_is_no_signal(results: Any) -> None:
    with pytest.raises(TypeError):
        applied_learnings(results)


# The platform rule


class Model(pydantic.BaseModel):
    api_key: pydantic.SecretStr | None = None
    llm: dict[str, str] | None = None


class Hostile:
    """Raises whatever is asked of it."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("_"):  # the tools of the tests ask for some
            return object.__getattribute__(self, name)
        raise RuntimeError(name)

    def __bool__(self) -> bool:
        raise RuntimeError

    def __str__(self) -> str:
        raise RuntimeError


class Items:
    """Reads like a mapping, and is none."""

    def __getitem__(self, name: str) -> str:
        return {"api_key": "sk-1"}[name]


def sections(api_key: str) -> ConfigParser:
    parser = ConfigParser()
    parser.read_dict({"llm": {"api_key": api_key}})
    return parser


@pytest.mark.parametrize(
    "config",
    [
        {"api_key": "sk-1"},
        {"llm": {"api_key": "sk-1"}},
        {"api_key": "", "llm": {"api_key": "sk-1"}},
        {"api_key": Hostile(), "llm": {"api_key": "sk-1"}},
        MappingProxyType({"api_key": "sk-1"}),
        ChainMap({}, {"llm": UserDict(api_key="sk-1")}),
        sections("sk-1")["llm"],
        Items(),
        {"llm": Items()},
        Model(api_key="sk-1"),  # type: ignore[arg-type]
        Model(llm={"api_key": "sk-1"}),
        SimpleNamespace(llm=SimpleNamespace(api_key="sk-1")),
    ],
)
def test_an_own_key_is_not_paid_by_the_platform(config: object) -> None:
    assert platform_pays(config) is False


@pytest.mark.parametrize(
    "config",
    [
        None, {}, [], "api_key", b"api_key", 7, dict, object(), Hostile(), {"llm": Hostile()}, {"api_key": Hostile()},
        {"api_key": ""}, {"api_key": " \n"}, {"api_key": None}, {"api_key": True}, {"api_key": ["sk-1"]},
        {"llm": "api_key"}, {"llm": None}, {"llm": {"api_key": None}}, {"search": {"api_key": "sk-1"}},
        [("api_key", "k")], Model(), Model(api_key=""), lambda: None, sections("")["llm"],
    ],
)  # fmt: skip
def test_without_a_sign_the_platform_paid(config: object) -> None:
    assert platform_pays(config) is True


def test_reading_a_configuration_leaves_it_as_it_was() -> None:
    config: dict[str, Any] = defaultdict(dict)
    assert platform_pays(config)
    assert not config


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.binary(max_size=4)
    | st.sampled_from([Hostile(), object(), dict, Items, len]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["api_key", "llm", "x"]) | st.integers(), inner, max_size=3)
    | st.builds(SimpleNamespace, api_key=inner, llm=inner)
    | st.builds(SimpleNamespace, get=inner, llm=inner),
    max_leaves=8,
)  # fmt: skip


@given(ANYTHING)
def test_the_platform_rule_takes_anything(config: object) -> None:
    assert platform_pays(config) in (True, False)


@given(ANYTHING, st.text(min_size=1).filter(str.strip))
def test_an_own_key_counts_whatever_else_is_said(other: Any, key: str) -> None:
    assert platform_pays({"api_key": key, "llm": other}) is False
    assert platform_pays({"api_key": other, "llm": {"api_key": key}}) is False
