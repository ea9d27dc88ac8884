"""Which encoding a model has, and what a chat counts as."""

from __future__ import annotations

from typing import Any

import pytest
import tiktoken
import tiktoken.model

from metering.errors import InvalidSetting, UnknownEncoding
from metering.tokens import (
    TokenCount,
    count_chat_tokens,
    count_input_tokens,
    count_tokens,
    encodings,
    estimate_tokens,
    exceeds,
)
from tests.metering.tokens.conftest import IN_THE_WHEEL


def test_models_are_those_of_tiktoken() -> None:
    for model, encoding in tiktoken.model.MODEL_TO_ENCODING.items():
        if encoding in IN_THE_WHEEL:
            assert estimate_tokens("hello", model=model) == TokenCount(tokens=1, encoding=encoding, estimated=False)
    for model, encoding in [
        ("gpt-4-0613", "cl100k_base"),
        ("gpt-4.1-mini", "o200k_base"),
        ("gpt-5-nano", "o200k_base"),
        ("o3-mini", "o200k_base"),
        ("gpt-oss-120b", "o200k_harmony"),
        ("ft:gpt-4o-2024-08-06:acme::id", "o200k_base"),
        ("text-embedding-3-large", "cl100k_base"),
    ]:
        assert encodings.encoding_of_model(model) == encoding


@pytest.mark.parametrize("model", ["claude-sonnet-4-5", "gemini-2.5-pro", "GPT-4o", "openai/gpt-4o", ""])
def test_an_unknown_model_is_an_error_unless_an_estimate_is_asked_for(model: str) -> None:
    for count in (count_tokens, lambda text, **given: exceeds(text, 1, **given)):
        with pytest.raises(UnknownEncoding, match="name an encoding, or ask estimate_tokens"):
            count("hello", model=model)
    with pytest.raises(UnknownEncoding):
        count_chat_tokens([], model=model)
    assert estimate_tokens("hello world", model=model) == TokenCount(tokens=2, encoding="cl100k_base", estimated=True)


def test_an_estimate_says_that_it_is_one() -> None:
    assert estimate_tokens("hello world", encoding="p50k_base").estimated
    assert estimate_tokens("hello world").estimated
    assert not estimate_tokens("hello world", encoding="cl100k_base").estimated


def test_unknown_encodings_and_unclear_questions() -> None:
    with pytest.raises(UnknownEncoding, match="encoding 'cl100k': known are cl100k_base, gpt2, o200k_base"):
        count_tokens("hello", encoding="cl100k")
    with pytest.raises(InvalidSetting, match="an encoding or a model, not both"):
        count_tokens("hello", encoding="o200k_base", model="gpt-4o")
    for text in (b"hello secret", None, ["hello secret"]):
        with pytest.raises(InvalidSetting, match=r"text: got <class '.+'>, expected a str") as refused:
            count_input_tokens(text)  # type: ignore[arg-type]
        assert "secret" not in str(refused.value)


# Chats


JARGON = [
    (
        "system",
        None,
        "You are a helpful, pattern-following assistant that translates corporate jargon into plain English.",
    ),
    ("system", "example_user", "New synergies will help drive top-line growth."),
    ("system", "example_assistant", "Things working well together will increase revenue."),
    (
        "system",
        "example_user",
        "Let's circle back when we have more bandwidth to touch base on opportunities for increased leverage.",
    ),
    ("system", "example_assistant", "Let's talk later when we're less busy about how to do better."),
    ("user", None, "This late pivot means we don't have time to boil the ocean for the client deliverable."),
]
"""OpenAI's own example, with what its API counted: https://cookbook.openai.com/examples/how_to_count_tokens_with_tiktoken"""


@pytest.mark.parametrize(("model", "counted"), [("gpt-3.5-turbo", 129), ("gpt-4-0613", 129), ("gpt-4o", 124)])
def test_a_chat_counts_as_openais_api_counted_it(model: str, counted: int) -> None:
    messages = [{"role": role, "content": content} | ({"name": name} if name else {}) for role, name, content in JARGON]
    assert count_chat_tokens(messages, model=model) == counted
    with_nones = [
        {"role": role, "content": content, "name": name, "tool_calls": None} for role, name, content in JARGON
    ]
    assert count_chat_tokens(iter(with_nones), model=model) == counted


def test_what_a_message_may_hold() -> None:
    def count(**message: object) -> int:
        return count_chat_tokens([{"role": "user", **message}], encoding="cl100k_base")

    assert count_chat_tokens([]) == 3
    assert count() == count(content=None) == count(content="") == count(content=[]) == 7
    assert count(content="hello world") == count(content="hello world", refusal=None, tool_calls=[]) == 9
    assert count(content="hello world", name="joe") == 9 + count_tokens("joe") + 1
    for kind in ("text", "input_text", "output_text"):
        assert count(content=[{"type": kind, "text": "hello"}, {"type": "text", "text": " world"}]) == 9
    assert count(content="<|im_start|>") == 7 + count_tokens("<|im_start|>")


@pytest.mark.parametrize(
    ("messages", "place"),
    [
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "secret"}}]}],
            "messages[0].content[0]",
        ),
        ([{}, {"role": "user", "content": [{"type": "text", "text": None}]}], "messages[1].content[0].text"),
        ([{"role": "user", "content": ["secret"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": {"text": "secret"}}], "messages[0].content"),
        ([{"role": "user", "content": 7}], "messages[0].content"),
        ([{"role": 1, "content": "secret"}], "messages[0].role"),
        ([{"role": "assistant", "tool_calls": [{"id": "secret"}]}], "messages[0].tool_calls"),
        (["secret"], "messages[0]"),
        ("secret", "messages"),
        ({"role": "user", "content": "secret"}, "messages"),
    ],
)
def test_what_has_no_published_count_is_refused(messages: Any, place: str) -> None:
    with pytest.raises(InvalidSetting) as refused:
        count_chat_tokens(messages, model="gpt-4o")
    assert refused.value.field == place
    assert "secret" not in str(refused.value)
