"""An answer, recorded or as its provider documents it, is read as it is meant; what cannot be read is refused."""

from __future__ import annotations

import copy
import enum
import json
import re
from decimal import Decimal
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from genai_prices.data import providers
from hypothesis import given
from hypothesis import strategies as st

from metering import InvalidUsage, TokenUsage
from metering.events import TOKEN_FIELDS
from metering.payloads import UsageStream, reply_of, usage_of, usage_of_stream
from metering.payloads.registry import RULES
from tests.metering.payload_cases import CASES, KNOWN_TO_GENAI_PRICES, MAKERS, STREAMS, WHOLE, made_of, streams, whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def usage_part(payload: dict[str, Any]) -> Any:
    return next(
        (payload[name] for name in ("usage", "usageMetadata", "usage_metadata", "meta") if name in payload), payload
    )


# What is documented


@whole
def test_an_answer_is_read_as_documented(case: dict[str, Any]) -> None:
    before = copy.deepcopy(case["payload"])
    reply = reply_of(case["payload"])
    assert reply.usage == TokenUsage(**case["usage"])
    assert TokenUsage.from_payload(case["payload"]) == reply.usage
    assert (reply.provider, reply.model) == (case.get("provider", reply.provider), case.get("model", reply.model))
    assert case["payload"] == before


@whole
def test_its_usage_part_alone_says_the_same(case: dict[str, Any]) -> None:
    assert usage_of(usage_part(case["payload"])) == TokenUsage(**case["usage"])


@whole
@pytest.mark.parametrize("provider", ["openai", "anthropic", "google", "xai", "aws.bedrock", "my-gateway"])
def test_what_the_counts_tell_no_provider_changes(case: dict[str, Any], provider: str) -> None:
    assert usage_of(case["payload"], provider) == TokenUsage(**case["usage"])


@streams
def test_a_stream_is_read_as_documented(case: dict[str, Any]) -> None:
    stream = UsageStream()
    for chunk in case["stream"]:
        stream.add(chunk)
    reply = reply_of(stream)
    assert reply.usage == stream.usage() == TokenUsage.from_stream(iter(case["stream"])) == TokenUsage(**case["usage"])
    assert (reply.provider, reply.model) == (case.get("provider", reply.provider), case.get("model", reply.model))


def test_every_provider_has_a_stream_and_every_rule_a_case() -> None:
    files = {name.split(":")[0] for name in CASES}
    assert {name.split(":")[0] for name in STREAMS} == files
    assert all(case["source"].startswith("http") for case in CASES.values())
    read = [rule for rule in RULES for case in WHOLE.values() if rule.reads(part_of(case["payload"]))]
    assert set(read) == set(RULES)


def test_every_provider_has_a_recorded_answer_and_a_recorded_stream() -> None:
    for cases in (WHOLE, STREAMS):
        assert {name.split(":")[0] for name, case in cases.items() if case.get("recorded")} == PROVIDERS
    recorded = [case for case in CASES.values() if case.get("recorded")]
    assert all(re.search("/blob/[0-9a-f]{40}/", case["source"]) for case in recorded)
    assert not any(case.get("numbers_are_ours") for case in recorded)


PROVIDERS = {
    "anthropic", "azure", "bedrock", "cohere", "deepseek", "gemini", "groq", "mistral", "ollama", "openai",
    "openrouter", "others", "vertex", "xai",
}  # fmt: skip


def part_of(payload: dict[str, Any]) -> Any:
    from metering.payloads.reading import Part

    return Part(usage_part(payload))


# SDK objects


@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
def test_an_object_is_read_as_its_dict(maker: Callable[..., Any]) -> None:
    for name, case in WHOLE.items():
        assert usage_of(made_of(maker, case["payload"])) == TokenUsage(**case["usage"]), name
    for name, case in STREAMS.items():
        assert usage_of_stream(made_of(maker, case["stream"])) == TokenUsage(**case["usage"]), name


def test_a_kind_may_be_an_enum() -> None:
    class Modality(str, enum.Enum):  # noqa: UP042  as google-genai has it
        AUDIO = "AUDIO"

    kind = SimpleNamespace(modality=Modality.AUDIO, token_count=7)
    payload = SimpleNamespace(prompt_token_count=9, total_token_count=9, prompt_tokens_details=[kind])
    assert usage_of(payload) == TokenUsage(input_tokens=9, input_audio_tokens=7)


def test_a_token_usage_is_itself() -> None:
    usage = TokenUsage(input_tokens=5, cache_read_tokens=2)
    assert usage_of(usage) is usage


# The other implementation

THEY_READ_OTHERWISE = {
    # Anthropic's `iterations` are not read, so what they alone tell is not counted.
    "anthropic: compaction is not in the top level": {"input_tokens": 23_000, "output_tokens": 1_000},
    "anthropic: an advisor's run is not in the top level, two runs of the model are": {
        "input_tokens": 987_954,
        "output_tokens": 900,
    },
    "anthropic: a fallback answered, after a decline that had begun to write": {
        "input_tokens": 412,
        "output_tokens": 205,
    },
    # What InvokeModel calls the cache's counts is not known.
    "bedrock: Nova by InvokeModel": {"input_tokens": 9, "cache_read_tokens": 0},
    # Nor are DeepSeek's own names, which came before OpenAI's.
    "deepseek: cache hit, told in DeepSeek's own names alone": {"cache_read_tokens": 0},
    # The total is not asked where reasoning was counted, so here it counts twice.
    "gemini: thoughts counted among the candidates": {"output_tokens": 80},
    "xai: through a gateway that puts reasoning inside, and zeros into names of another shape": {"output_tokens": 235},
}

THEIR_NAMES = {"reasoning_tokens": "output_reasoning_tokens"}


@pytest.mark.parametrize("name", KNOWN_TO_GENAI_PRICES)
def test_genai_prices_reads_the_same(name: str) -> None:
    case = KNOWN_TO_GENAI_PRICES[name]
    provider_id, flavor = case["oracle"]
    [provider] = [provider for provider in providers if provider.id == provider_id]
    _, theirs = provider.extract_usage(case["payload"], api_flavor=flavor)
    expected = TokenUsage(**case["usage"]).to_dict() | THEY_READ_OTHERWISE.get(name, {})
    assert {field: getattr(theirs, THEIR_NAMES.get(field, field)) or 0 for field in TOKEN_FIELDS} == expected


# What the shape leaves open


def test_an_absent_total_leaves_reasoning_to_the_provider() -> None:
    counts = {"prompt_tokens": 10, "completion_tokens": 8, "completion_tokens_details": {"reasoning_tokens": 5}}
    assert usage_of(counts, "openai").output_tokens == 8
    for xai in ("x-ai", "xai", "xAI", "x_ai"):
        assert usage_of(counts, xai).output_tokens == 13
    for unsaid in (None, "my-gateway"):
        with pytest.raises(InvalidUsage, match=r"total_tokens: got None, expected 18, or 23 .* with provider="):
            usage_of(counts, unsaid)
    assert usage_of(counts | {"num_sources_used": 0}).output_tokens == 13


def test_a_total_that_fits_neither_is_read_by_the_provider_s_rule_or_not_at_all() -> None:
    # Gemini's endpoint of this shape hides thoughts in the total.
    counts = {"prompt_tokens": 10, "completion_tokens": 8, "total_tokens": 118}
    assert usage_of(counts, "gemini") == TokenUsage(input_tokens=10, output_tokens=108, reasoning_tokens=100)
    assert usage_of(counts | {"total_tokens": 9}, "mistral") == TokenUsage(input_tokens=10, output_tokens=8)
    for provider in (None, "mistral"):
        with pytest.raises(InvalidUsage, match=r"total_tokens: got 118, expected 18; .* provider="):
            usage_of(counts, provider)


@pytest.mark.parametrize(
    "cached", [{"num_cached_tokens": 64}, {"prompt_token_details": {"cached_tokens": 64}}], ids=["count", "block"]
)
def test_mistral_names_cached_tokens_in_its_own_way(cached: dict[str, Any]) -> None:
    counts = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
    assert usage_of(counts | cached) == TokenUsage(input_tokens=100, cache_read_tokens=64, output_tokens=20)


def test_counts_of_two_conventions_are_left_to_the_provider() -> None:
    mixed = {"input_tokens": 10, "output_tokens": 5, "total_tokens": 15, "cache_read_input_tokens": 90}
    assert usage_of(mixed, "anthropic").input_tokens == 100
    assert usage_of(mixed, "azure").input_tokens == 10
    with pytest.raises(InvalidUsage, match=r"provider: got None, .* OpenAI Responses or Anthropic messages"):
        usage_of(mixed)
    both = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15, "input_tokens": 10, "output_tokens": 5}
    assert usage_of(both) == TokenUsage(input_tokens=10, output_tokens=5)
    with pytest.raises(InvalidUsage, match="OpenAI chat completions or embeddings or OpenAI Responses"):
        usage_of(both | {"input_tokens": 11, "total_tokens": 16, "completion_tokens": 6})


@pytest.mark.parametrize("provider", [5, b"openai", ["openai"]])
def test_a_provider_is_a_name(provider: Any) -> None:
    for read in (usage_of, usage_of_stream):
        with pytest.raises(InvalidUsage, match="provider: got <class"):
            read({"prompt_tokens": 1}, provider)  # type: ignore[operator]


def test_thoughts_are_not_among_fewer_candidates() -> None:
    # A total without thoughts looks like one in which they are candidates.
    counts = {"promptTokenCount": 10, "candidatesTokenCount": 5, "thoughtsTokenCount": 90, "totalTokenCount": 15}
    assert usage_of(counts) == TokenUsage(input_tokens=10, output_tokens=95, reasoning_tokens=90)


def test_an_iteration_of_an_unknown_kind_is_counted_unless_it_is_in_the_whole() -> None:
    run = {"type": "rethink", "input_tokens": 5, "output_tokens": 2}
    message = {"type": "message", "input_tokens": 7, "output_tokens": 3}
    assert usage_of({"input_tokens": 7, "output_tokens": 3, "iterations": [run, message]}).total_tokens == 17
    assert usage_of({"input_tokens": 12, "output_tokens": 5, "iterations": [run, message]}).total_tokens == 17


# What is refused


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ({}, "names seen: none"),
        ({"id": "x", "secret": "hunter2"}, "names seen: id, secret$"),
        ({"usage": {"tokens_used": 5}}, "names seen: tokens_used$"),
        ({"usage": {}}, "names seen: usage$"),
        ({"usage": None, "choices": []}, "names seen: usage, choices$"),
        ({f"n{i}": i for i in range(20)}, "n11 and 8 more$"),
        ({"x" * 99: 1}, "names seen: x{40}$"),
        ([{"usage": {}}], "payload: got <class 'list'>"),
        ('{"usage": {"prompt_tokens": 5}}', "payload: got <class 'str'>, .* decoded JSON"),
        (None, "payload: got <class 'NoneType'>"),
        ({"prompt_tokens": 5}, "completion_tokens: got None"),
        ({"prompt_tokens": 5, "total_tokens": 6}, "completion_tokens: got None"),
        ({"prompt_tokens": None, "completion_tokens": 5}, "prompt_tokens: got None"),
        ({"usage": {"input_tokens": 5}}, "output_tokens: got None"),
        ({"usageMetadata": {"promptTokenCount": 5}}, "totalTokenCount: got None"),
        ({"usageMetadata": {"promptTokenCount": 5, "totalTokenCount": 9}}, "totalTokenCount: got 9, .* the 5 tokens"),
        ({"prompt_token_count": 5, "generation_token_count": 9}, "totalTokenCount: got None"),
        ({"model": "m", "done": True, "eval_count": 3, "eval_duration": 9}, "prompt_eval_count: got None, .* cached"),
        ({"model": "m", "done": True, "prompt_eval_count": 3}, "eval_count: got None"),
        ({"usage": {"tokens": {"input_tokens": 5}}}, "output_tokens: got None"),
        ({"usage": {"tokens": {"input_tokens": 5, "output_tokens": 1.5}}}, "tokens.output_tokens: got <class 'float'>"),
        ({"meta": {"billed_units": {"search_units": 1}}}, "input_tokens: got None"),
        # The Vercel AI SDK's: not Bedrock's, though the names are.
        ({"inputTokens": 9, "outputTokens": 1, "cachedInputTokens": 5}, "names seen: inputTokens, outputTokens"),
        ({"inputTokens": 5, "outputTokens": 1, "cacheDetails": {"ttl": "1h"}}, "cacheDetails: got <class 'dict'>"),
        ({"input_tokens": 5, "output_tokens": 1, "iterations": [7]}, r"iterations\[0\]: got <class 'int'>"),
        (
            {"prompt_tokens": 5, "completion_tokens": 1, "prompt_tokens_details": 7},
            "prompt_tokens_details: got <class 'int'>, expected an object",
        ),
        (
            {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6, "cached_tokens": 9},
            "cache_read_tokens: got 9, expected at most input_tokens, which is 5",
        ),
        (
            {"input_tokens": 5, "output_tokens": 1, "cache_creation_input_tokens": 3,
             "cache_creation": {"ephemeral_1h_input_tokens": 4}},
            "cache_write_1h_tokens: got 4, expected at most cache_write_tokens, which is 3",
        ),
        (TokenUsage(input_tokens=5).to_dict(), "names seen: input_tokens, cache_read_tokens"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused(payload: Any, message: str) -> None:
    with pytest.raises(InvalidUsage, match=message) as caught:
        usage_of(payload)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "count", [-1, 1.0, 1.5, float("nan"), True, "17", Decimal(17), [17], 2**53 + 1, 10**5000], ids=range(10)
)
@pytest.mark.parametrize(
    "counts",
    [
        {"prompt_tokens": 5, "completion_tokens": "?", "total_tokens": 6},
        {
            "prompt_tokens": 5,
            "completion_tokens": 6,
            "total_tokens": 11,
            "prompt_tokens_details": {"cached_tokens": "?"},
        },
        {"input_tokens": "?", "output_tokens": 6},
        {"input_tokens": 1, "output_tokens": 6, "iterations": [{"type": "message", "input_tokens": "?"}]},
        {"promptTokenCount": 1, "candidatesTokenCount": "?", "totalTokenCount": 1},
        {"inputTokens": "?", "outputTokens": 6},
        {"prompt_eval_count": 5, "eval_count": "?"},
    ],
)
def test_a_count_is_a_whole_number(counts: dict[str, Any], count: Any) -> None:
    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: filled(item) for name, item in value.items()}
        if isinstance(value, list):
            return [filled(item) for item in value]
        return count if value == "?" else value

    with pytest.raises(InvalidUsage) as caught:
        usage_of(filled(counts))
    assert "17" not in str(caught.value)


def test_a_count_too_large_to_write_down_is_refused() -> None:
    with pytest.raises(InvalidUsage, match="prompt_tokens: got <int>"):
        usage_of({"prompt_tokens": 10**5000, "completion_tokens": 1})


def test_a_zero_stays_zero() -> None:
    zeros = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    assert usage_of({"usage": zeros}) == TokenUsage()
    assert usage_of({"input_tokens": 0, "output_tokens": 0}) == TokenUsage()


# Streams


def test_a_stream_without_usage_says_how_to_ask_for_it() -> None:
    chunks = [chunk for chunk in STREAMS["openai: chat stream"]["stream"] if chunk["choices"]]
    with pytest.raises(InvalidUsage, match=r'stream_options={"include_usage": true}'):
        usage_of_stream(chunks)
    with pytest.raises(InvalidUsage, match="names seen in the last one: type, index"):
        usage_of_stream([{"type": "content_block_stop", "index": 0}, "[DONE]", None])
    with pytest.raises(InvalidUsage, match="names seen in the last one: none"):
        usage_of_stream([])


def test_a_stream_that_broke_after_its_start_has_no_usage() -> None:
    start = STREAMS["anthropic: stream"]["stream"][:-2]
    with pytest.raises(InvalidUsage, match="a message_delta, which says what was made"):
        usage_of_stream(start)


def test_a_null_later_in_a_stream_takes_nothing_back() -> None:
    start, *_, delta, _ = copy.deepcopy(STREAMS["anthropic: stream"]["stream"])
    delta["usage"] |= {"input_tokens": None, "cache_read_input_tokens": None}
    assert usage_of_stream([start, delta]) == TokenUsage(input_tokens=25, output_tokens=15)


def test_a_stream_of_bedrock_holds_json_as_bytes() -> None:
    case = STREAMS["bedrock: recorded: Anthropic by InvokeModelWithResponseStream, decoded"]
    events = [{"chunk": {"bytes": json.dumps(event).encode()}} for event in case["stream"]]
    assert usage_of_stream(events) == TokenUsage(**case["usage"])
    with pytest.raises(InvalidUsage, match="DecodeError"):
        usage_of_stream([{"chunk": {"bytes": b"{"}}, *events])


def test_what_is_no_stream_is_refused() -> None:
    async def chunks() -> Any:
        yield {}

    for events in ({"usage": {}}, "[DONE]", b"", 5, None, chunks()):
        with pytest.raises(InvalidUsage, match="chunks to iterate over; for async for, a UsageStream"):
            usage_of_stream(events)  # type: ignore[arg-type]


def test_an_error_of_the_stream_is_not_hidden() -> None:
    def chunks() -> Iterator[dict[str, Any]]:
        yield {"choices": []}
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        usage_of_stream(chunks())


@given(st.sampled_from(list(STREAMS.values())), st.data())
def test_splitting_a_stream_anywhere_gives_the_same_usage(case: dict[str, Any], data: st.DataObject) -> None:
    chunks = case["stream"]
    at = data.draw(st.integers(0, len(chunks)))
    fillers = st.lists(
        st.sampled_from([None, {}, "[DONE]", {"type": "ping"}, {"usage": None}, {"usage": {}}]), max_size=2
    )
    stream = UsageStream()
    for part in (chunks[:at], chunks[at:]):
        for chunk in [*data.draw(fillers), *part]:
            stream.add(chunk)
    assert stream.usage() == TokenUsage(**case["usage"])
