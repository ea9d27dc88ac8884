"""Spans of every convention, summed so that nothing counts twice, whatever is odd about them."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metering.errors import InvalidUsage
from metering.events import TOKEN_FIELDS, TokenUsage
from metering.traces import UNKNOWN_MODEL, RunTokenTotals, TokenTotals, TraceFlag, read_span, sum_trace_tokens

GEN_AI = "gen_ai.usage."
MODEL = {"gen_ai.response.model": "gpt-4.1-mini", "gen_ai.request.model": "gpt-4.1"}


def span(span_id: str | None, parent: str | None = None, /, **said: Any) -> dict[str, Any]:
    attributes = {f"{GEN_AI}{name}_tokens": count for name, count in said.items() if name in ("input", "output")}
    return {"span_id": span_id, "parent_span_id": parent, "name": "chat", "attributes": MODEL | attributes}


def usage(attributes: dict[str, Any], **fields: Any) -> tuple[str | None, TokenUsage | None, tuple[str, ...]]:
    read = read_span({"span_id": "a", "attributes": attributes, **fields})
    return read.convention, read.usage, read.flags


def kinds(totals: RunTokenTotals) -> list[tuple[str, str | None]]:
    return [(flag.kind, flag.span_id) for flag in totals.flags]


CONVENTIONS: dict[str, tuple[dict[str, Any], str, dict[str, int]]] = {
    "current": (
        {
            f"{GEN_AI}input_tokens": 100,
            f"{GEN_AI}output_tokens": 40,
            f"{GEN_AI}cache_read.input_tokens": 60,
            f"{GEN_AI}cache_creation.input_tokens": 10,
            f"{GEN_AI}reasoning.output_tokens": 30,
        },
        "opentelemetry",
        {"cache_read_tokens": 60, "cache_write_tokens": 10, "reasoning_tokens": 30},
    ),
    "deprecated": ({f"{GEN_AI}prompt_tokens": 100, f"{GEN_AI}completion_tokens": 40}, "opentelemetry", {}),
    "openllmetry": (
        {
            f"{GEN_AI}prompt_tokens": 100,
            f"{GEN_AI}completion_tokens": 40,
            "llm.usage.total_tokens": 140,
            f"{GEN_AI}cache_read_input_tokens": 60,
            f"{GEN_AI}cache_creation_input_tokens": 10,
            f"{GEN_AI}reasoning_tokens": 0,
        },
        "opentelemetry",
        {"cache_read_tokens": 60, "cache_write_tokens": 10},
    ),
    "pydantic-ai": (
        {
            f"{GEN_AI}input_tokens": 100,
            f"{GEN_AI}output_tokens": 40,
            f"{GEN_AI}details.input_tokens": 30,
            f"{GEN_AI}details.cache_read_tokens": 60,
            f"{GEN_AI}details.output_audio_tokens": 5,
            "gen_ai.aggregated_usage.input_tokens": 9_000,
        },
        "opentelemetry",
        {"cache_read_tokens": 60, "output_audio_tokens": 5},
    ),
    "openinference": (
        {
            "llm.token_count.prompt": 100,
            "llm.token_count.completion": 40,
            "llm.token_count.total": 140,
            "llm.token_count.prompt_details.cache_read": 60,
            "llm.token_count.prompt_details.cache_write": 10,
            "llm.token_count.prompt_details.audio": 7,
            "llm.token_count.completion_details.reasoning": 30,
            "llm.token_count.completion_details.audio": 4,
        },
        "openinference",
        {
            "cache_read_tokens": 60,
            "cache_write_tokens": 10,
            "input_audio_tokens": 7,
            "reasoning_tokens": 30,
            "output_audio_tokens": 4,
        },
    ),
    "vercel": (
        {
            f"{GEN_AI}input_tokens": 100,
            f"{GEN_AI}output_tokens": 40,
            "ai.usage.inputTokens": 100,
            "ai.usage.outputTokens": 40,
            "ai.usage.totalTokens": 140,
            "ai.usage.cachedInputTokens": 60,
            "ai.usage.reasoningTokens": 30,
        },
        "vercel",
        {"cache_read_tokens": 60, "reasoning_tokens": 30},
    ),
    "strands on Bedrock": (
        {
            "gen_ai.system": "strands-agents",
            f"{GEN_AI}prompt_tokens": 30,
            f"{GEN_AI}input_tokens": 30,
            f"{GEN_AI}completion_tokens": 40,
            f"{GEN_AI}output_tokens": 40,
            f"{GEN_AI}total_tokens": 140,
            f"{GEN_AI}cache_read_input_tokens": 60,
            f"{GEN_AI}cache_write_input_tokens": 10,
        },
        "strands",
        {"cache_read_tokens": 60, "cache_write_tokens": 10},
    ),
    "strands on Anthropic": (
        {
            "gen_ai.provider.name": "strands-agents",
            f"{GEN_AI}input_tokens": 30,
            f"{GEN_AI}output_tokens": 40,
            f"{GEN_AI}total_tokens": 70,
            f"{GEN_AI}cache_read_input_tokens": 60,
            f"{GEN_AI}cache_write_input_tokens": 10,
        },
        "strands",
        {"cache_read_tokens": 60, "cache_write_tokens": 10},
    ),
    "langfuse": (
        {
            "langfuse.observation.usage_details": json.dumps(
                {
                    "input": 23,
                    "cache_read_input_tokens": 60,
                    "input_cache_creation_5m": 6,
                    "input_cache_creation_1h": 4,
                    "input_audio_tokens": 7,
                    "output": 10,
                    "output_reasoning_tokens": 30,
                    "total": 140,
                }
            )
        },
        "langfuse",
        {
            "cache_read_tokens": 60,
            "cache_write_tokens": 10,
            "cache_write_1h_tokens": 4,
            "input_audio_tokens": 7,
            "reasoning_tokens": 30,
        },
    ),
    "langfuse as OpenAI says it": (
        {
            "langfuse.observation.usage_details": {
                "prompt_tokens": 100,
                "completion_tokens": 40,
                "total_tokens": 140,
                "prompt_tokens_details": {"cached_tokens": 60, "audio_tokens": 7},
                "completion_tokens_details": {"reasoning_tokens": 30},
            }
        },
        "langfuse",
        {"cache_read_tokens": 60, "input_audio_tokens": 7, "reasoning_tokens": 30},
    ),
    "langfuse with its parts within": (
        {
            "langfuse.observation.usage_details": {
                "input": 100,
                "input_cached_tokens": 60,
                "output": 40,
                "output_reasoning_tokens": 30,
                "total": 140,
            }
        },
        "langfuse",
        {"cache_read_tokens": 60, "reasoning_tokens": 30},
    ),
}


@pytest.mark.parametrize("name", CONVENTIONS)
def test_each_convention_means_the_same(name: str) -> None:
    attributes, convention, parts = CONVENTIONS[name]
    assert usage(attributes) == (convention, TokenUsage(input_tokens=100, output_tokens=40, **parts), ())


def test_within_a_span_one_convention_counts_the_one_that_says_most() -> None:
    both = CONVENTIONS["openinference"][0] | {f"{GEN_AI}input_tokens": 30, f"{GEN_AI}output_tokens": 40}
    assert usage(both)[0] == "openinference"
    assert usage(both)[1] == usage(CONVENTIONS["openinference"][0])[1]
    everything = {name: value for said, _, _ in CONVENTIONS.values() for name, value in said.items()}
    assert sum_trace_tokens([{"span_id": "a", "attributes": everything}]).total_tokens == 140


@pytest.mark.parametrize(
    ("said", "input_tokens", "output_tokens", "flags"),
    [
        ({"input": 30, "output": 40, "cache_read": 60, "total": 130}, 90, 40, ()),
        ({"input": 30, "output": 40, "cache_read": 60, "cache_write": 10, "total": 140}, 100, 40, ()),
        ({"input": 30, "output": 40, "cache_read": 60, "total": 70}, 90, 40, ()),
        ({"input": 30, "output": 40, "cache_read": 60}, 90, 40, ()),
        ({"input": 100, "output": 10, "reasoning": 30, "total": 140}, 100, 40, ()),
        ({"input": 100, "output": 10, "reasoning": 5, "total": 115}, 100, 15, ()),
        ({"input": 100, "output": 10, "reasoning": 30}, 100, 40, ()),
        ({"input": 40, "output": 10, "cache_read": 60, "reasoning": 30, "total": 140}, 100, 40, ()),
        ({"input": 100, "output": 40, "cache_read": 60, "total": 140}, 100, 40, ()),
        ({"input": 100, "output": 40, "cache_read": 60, "total": 150}, 100, 40, ("mismatched_total",)),
        ({"input": 100, "total": 100}, 100, 0, ()),
        ({"input": 100, "output": None, "total": None}, 100, 0, ()),
    ],
)
def test_what_a_total_agrees_with_was_meant(
    said: dict[str, Any], input_tokens: int, output_tokens: int, flags: tuple[str, ...]
) -> None:
    names = {
        "input": "prompt",
        "output": "completion",
        "cache_read": "prompt_details.cache_read",
        "cache_write": "prompt_details.cache_write",
        "reasoning": "completion_details.reasoning",
    }
    _, read, odd = usage({f"llm.token_count.{names.get(name, name)}": count for name, count in said.items()})
    assert read is not None
    assert (read.input_tokens, read.output_tokens, odd) == (input_tokens, output_tokens, flags)
    assert read.cache_read_tokens == said.get("cache_read", 0)


@pytest.mark.parametrize("empty", [None, [], (), iter([]), [span("a")], [{"span_id": "a", "attributes": None}]])
def test_nothing_sums_to_zero(empty: Any) -> None:
    assert sum_trace_tokens(empty) == RunTokenTotals()


def test_the_turns_of_a_tool_loop_are_one_run() -> None:
    spans = [span("agent", None, input=600, output=60)]
    for turn in range(3):
        spans.append(span(f"chat{turn}", "agent", input=100 * (turn + 1), output=20))
        spans.append(span(f"tool{turn}", "agent", input=None, output=None))
    spans[1]["attributes"] |= {"gen_ai.response.model": "o3", f"{GEN_AI}reasoning.output_tokens": 5}
    totals = sum_trace_tokens(spans)
    assert totals == RunTokenTotals(
        input_tokens=600,
        output_tokens=60,
        reasoning_tokens=5,
        model_calls=3,
        by_model={
            "gpt-4.1-mini": TokenTotals(input_tokens=500, output_tokens=40, model_calls=2),
            "o3": TokenTotals(input_tokens=100, output_tokens=20, reasoning_tokens=5, model_calls=1),
        },
    )
    assert totals.to_usage() == TokenUsage(input_tokens=600, output_tokens=60, reasoning_tokens=5)
    assert (totals.total_tokens, totals.uncached_input_tokens) == (660, 600)


def test_what_repeats_its_children_is_not_counted_again_however_far_above() -> None:
    spans = [
        span("run", None, input=10, output=5),
        span("agent", "run", input=10, output=5),
        span("step", "agent"),
        span("chat", "step", input=10, output=5),
        span("aside", "run"),
    ]
    assert (sum_trace_tokens(spans).total_tokens, sum_trace_tokens(spans).flags) == (15, ())
    without_step = sum_trace_tokens([span for span in spans if span["span_id"] != "step"])
    assert without_step.total_tokens == 30
    assert kinds(without_step) == [("orphan", "chat")]


def test_zeros_below_a_span_outweigh_nothing() -> None:
    spans = [span("agent", None, input=10, output=5), span("chat", "agent", input=0, output=0)]
    assert sum_trace_tokens(spans).total_tokens == 15
    assert sum_trace_tokens(spans[1:]).model_calls == 1
    spans[0] = span("agent", None, input=0, output=0)
    assert (sum_trace_tokens(spans).total_tokens, sum_trace_tokens(spans).model_calls) == (0, 1)


def test_spans_are_told_apart_by_trace_and_id() -> None:
    one, other = span("a", None, input=10), span("a", None, input=10)
    assert sum_trace_tokens([one, other]).model_calls == 1
    assert sum_trace_tokens([one | {"trace_id": "s"}, other | {"trace_id": "t"}]).model_calls == 2
    assert sum_trace_tokens([span(None, None, input=10), span(None, None, input=10)]).input_tokens == 20
    child = span("b", "a", input=10) | {"trace_id": "t"}
    assert kinds(sum_trace_tokens([one | {"trace_id": "s"}, child])) == [("orphan", "b")]


def test_the_same_id_with_other_contents_counts_once_and_is_flagged() -> None:
    partial, whole = span("a", None, input=10), span("a", None, input=10, output=4)
    for spans in ([partial, whole], [whole, partial]):
        totals = sum_trace_tokens(spans)
        assert (totals.total_tokens, totals.model_calls) == (14, 1)
        assert kinds(totals) == [("conflicting_duplicate", "a")]


def test_cycles_end() -> None:
    spans = [
        span("a", "c", input=1),
        span("b", "a"),
        span("c", "b", input=2),
        span("leaf", "c", input=4),
        span("self", "self", input=8),
    ]
    totals = sum_trace_tokens(spans)
    assert totals.input_tokens == 1 + 4 + 8
    assert kinds(totals) == [("cycle", name) for name in ("a", "b", "c", "self")]


def test_a_chain_of_any_depth() -> None:
    spans = [span(str(n), str(n - 1), input=1) for n in range(1, 20_000)]
    random.Random(5).shuffle(spans)
    assert sum_trace_tokens(spans).input_tokens == 1


def test_what_is_odd_is_flagged_and_never_raised() -> None:
    spans = [
        {"span_id": "a", "attributes": {f"{GEN_AI}input_tokens": -1, f"{GEN_AI}output_tokens": 3}},
        {"span_id": "b", "attributes": {f"{GEN_AI}input_tokens": float("nan")}},
        {"span_id": "c", "attributes": {f"{GEN_AI}input_tokens": True, f"{GEN_AI}output_tokens": "7"}},
        {"span_id": "d", "attributes": {"llm.token_count.total": 5}},
        {"span_id": "e", "attributes": {f"{GEN_AI}input_tokens": 2**53, f"{GEN_AI}cache_read.input_tokens": 2**53 - 1}},
        {"span_id": "f", "attributes": {f"{GEN_AI}input_tokens": 2**53 + 1}},
        {"span_id": "g", "attributes": {"langfuse.observation.usage_details": "{broken"}},
    ]
    totals = sum_trace_tokens(spans)
    assert totals.total_tokens == 3 + 7 + 2**53
    assert totals.by_model.keys() == {UNKNOWN_MODEL}
    assert kinds(totals) == [
        *(("invalid_count", name) for name in "abcfg"),
        ("mismatched_total", "d"),
        *(("unknown_model", name) for name in "ace"),
    ]


@pytest.mark.parametrize(
    "alien", [5, "spans", b"spans", span("a"), [5], [None], [{}], [{"foo": 1}], [{"attributes": 5}]]
)
def test_what_is_not_spans_is_refused(alien: Any) -> None:
    with pytest.raises(InvalidUsage):
        sum_trace_tokens(alien)


def test_spans_of_the_sdk() -> None:
    context = SimpleNamespace(trace_id=0xAB, span_id=0xCD)
    readable = SimpleNamespace(
        context=context,
        parent=SimpleNamespace(trace_id=0xAB, span_id=0xEF),
        name="chat",
        attributes=MODEL | {f"{GEN_AI}input_tokens": 3, "gen_ai.system": "openai", "gen_ai.conversation.id": "talk"},
        resource=SimpleNamespace(attributes={"tallystick.account": "acme", "tallystick.run_id": "all"}),
        instrumentation_scope=SimpleNamespace(name="opentelemetry.instrumentation.openai_v2"),
        start_time=1_700_000_000_123_456_789,
        end_time=None,
    )
    read = read_span(readable)
    assert (read.trace_id, read.span_id, read.parent_span_id) == (f"{0xAB:032x}", f"{0xCD:016x}", f"{0xEF:016x}")
    assert (read.run_id, read.account, read.provider, read.model) == ("talk", "acme", "openai", "gpt-4.1-mini")
    assert read.usage == TokenUsage(input_tokens=3)
    assert (str(read.started_at), read.ended_at) == ("2023-11-14 22:13:20.123456+00:00", None)
    as_json = {
        "name": "chat",
        "context": {"trace_id": f"0x{0xAB:032x}", "span_id": f"0x{0xCD:016X}"},
        "parent_id": None,
        "start_time": "2023-11-14T22:13:20.123456Z",
        "attributes": readable.attributes,
    }
    assert sum_trace_tokens([readable, as_json, read]).model_calls == 1


def test_observations_of_a_langfuse_export() -> None:
    totals = sum_trace_tokens(
        [
            {"id": "o1", "traceId": "t", "type": "SPAN", "usage": {"input": 0, "output": 0, "unit": "TOKENS"}},
            {
                "id": "o2",
                "traceId": "t",
                "parentObservationId": "o1",
                "type": "GENERATION",
                "model": "claude",
                "usageDetails": {"input": 10, "cache_read_input_tokens": 90, "output": 5, "total": 105},
                "usage": {"input": 100, "output": 5, "total": 105},
            },
            {
                "id": "o3",
                "traceId": "t",
                "type": "GENERATION",
                "promptTokens": 7,
                "completionTokens": 1,
                "model": "gpt",
            },
            {"id": "o4", "traceId": "t", "type": "GENERATION", "usageDetails": {}, "promptTokens": 0, "model": "gpt"},
        ]
    )
    assert totals.by_model == {
        "claude": TokenTotals(input_tokens=100, cache_read_tokens=90, output_tokens=5, model_calls=1),
        "gpt": TokenTotals(input_tokens=7, output_tokens=1, model_calls=1),
    }
    assert totals.flags == ()


NAMES = sorted({name for said, _, _ in CONVENTIONS.values() for name in said} | {"gen_ai.response.model"})
VALUES = st.one_of(
    st.integers(-2, 2**54),
    st.integers(0, 500),
    st.sampled_from([None, True, "12", "x", 1.5, 2.0, float("nan"), "gpt", "{}", '{"input": 3, "cache": 9}', [1]]),
)
SPANS = st.lists(
    st.fixed_dictionaries(
        {
            "span_id": st.sampled_from([None, *"abcdef"]),
            "parent_span_id": st.sampled_from([None, *"abcdefz"]),
            "attributes": st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=6),
        }
    ),
    max_size=10,
)


@given(SPANS, st.randoms(use_true_random=False))
def test_the_order_of_spans_changes_nothing(spans: list[dict[str, Any]], chance: random.Random) -> None:
    totals = sum_trace_tokens(spans)
    shuffled = chance.sample(spans, len(spans))
    assert sum_trace_tokens(shuffled) == totals
    assert sum_trace_tokens([*shuffled, *(span for span in spans if span["span_id"])]) == totals


@given(SPANS)
def test_totals_are_never_negative_and_parts_are_within_their_wholes(spans: list[dict[str, Any]]) -> None:
    totals = sum_trace_tokens(spans)
    for one in (totals, *totals.by_model.values()):
        counts = {name: getattr(one, name) for name in TOKEN_FIELDS}
        assert min(counts.values()) >= 0
        assert one.cache_read_tokens + one.cache_write_tokens <= one.input_tokens
        assert one.cache_write_1h_tokens <= one.cache_write_tokens
        assert max(one.input_audio_tokens, 0) <= one.input_tokens
        assert max(one.reasoning_tokens, one.output_audio_tokens) <= one.output_tokens
    for name in (*TOKEN_FIELDS, "model_calls"):
        assert getattr(totals, name) == sum(getattr(one, name) for one in totals.by_model.values())
    assert totals.model_calls <= len(spans)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [*NAMES, "span_id", "attributes", "key", "value", "intValue", "id", "usageDetails", "usage"]
            )
            | st.text(max_size=3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(JSON)
def test_anything_is_summed_or_refused(anything: Any) -> None:
    for spans in (anything, [anything]):
        try:
            totals = sum_trace_tokens(spans)
        except InvalidUsage:
            continue
        assert totals.total_tokens >= 0


def test_a_flag_names_its_span() -> None:
    lost = span("a", "gone", input=1) | {"trace_id": "t"}
    assert sum_trace_tokens([lost]).flags == (TraceFlag("orphan", "t", "a"),)


def test_a_call_above_a_smaller_one_is_flagged_where_it_is_left_out() -> None:
    spans = [
        {"span_id": "a", "attributes": {"gen_ai.usage.input_tokens": 5000, "gen_ai.usage.output_tokens": 500}},
        {"span_id": "b", "parent_span_id": "a", "attributes": {"gen_ai.operation.name": "execute_tool"}},
        {"span_id": "c", "parent_span_id": "b", "attributes": {"gen_ai.usage.input_tokens": 20}},
    ]
    totals = sum_trace_tokens(spans)
    assert totals.input_tokens == 20
    assert {flag.kind for flag in totals.flags} == {"unrepeated", "unknown_model"}
    assert next(flag for flag in totals.flags if flag.kind == "unrepeated").span_id == "a"


def test_zeros_of_one_convention_hide_no_counts_of_another() -> None:
    attributes = {f"llm.token_count.{name}": 0 for name in ("prompt", "completion", "total")}
    attributes |= {"gen_ai.usage.input_tokens": 10, "gen_ai.usage.output_tokens": 5}
    assert sum_trace_tokens([{"span_id": "a", "attributes": attributes}]).total_tokens == 15


@pytest.mark.parametrize(
    ("buckets", "expected"),
    [
        (
            {"cache_creation_input_tokens": 100, "input_cache_creation_5m": 60, "input_cache_creation_1h": 40},
            (110, 100, 40),
        ),
        ({"input_ephemeral_5m_input_tokens": 60, "input_ephemeral_1h_input_tokens": 40}, (110, 100, 40)),
        ({"input_cache_creation_5m": 60}, (70, 60, 0)),
    ],
    ids=["whole and parts", "parts", "one part"],
)
def test_cache_writes_of_langfuse_count_once(buckets: dict[str, int], expected: tuple[int, int, int]) -> None:
    span = {"id": "a", "traceId": "t", "type": "GENERATION", "usageDetails": {"input": 10, "output": 50, **buckets}}
    totals = sum_trace_tokens([span])
    assert (totals.input_tokens, totals.cache_write_tokens, totals.cache_write_1h_tokens) == expected


def test_langfuse_observations_of_every_type_may_say_what_they_used() -> None:
    span = {"id": "a", "traceId": "t", "type": "AGENT", "model": "m", "usageDetails": {"input": 10, "output": 50}}
    assert sum_trace_tokens([span]).total_tokens == 60
