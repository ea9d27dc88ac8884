"""What it costs to read an answer's usage: `python -m benchmarks.payloads`.

A call reads one answer, already decoded, in one thread. The floor takes the same counts from their known places and
checks them, which is a `TokenUsage` made by hand.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from benchmarks.measure import Contender, Target, compare, in_threads
from metering.events import TokenUsage
from metering.payloads import usage_of, usage_of_stream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.measure import Rate, Table

__all__ = ["payload_tables"]

SHAPES = Path(__file__).parents[1] / "tests/metering/payloads"
CHUNKS = 200


def by_hand(answer: dict[str, Any]) -> TokenUsage:
    """The usage of a chat completion, of which everything is known."""
    usage = answer["usage"]
    return TokenUsage(
        input_tokens=usage["prompt_tokens"],
        cache_read_tokens=usage["prompt_tokens_details"]["cached_tokens"],
        output_tokens=usage["completion_tokens"],
        reasoning_tokens=usage["completion_tokens_details"]["reasoning_tokens"],
    )


def payload_tables(*, rounds: int, turn_s: float) -> Iterator[Table]:
    """One table: each shape beside the floor."""

    def turn(call: Callable[[], object], seconds: float) -> Rate:
        return in_threads(call, threads=1, seconds=seconds)

    chat = _case("openai", "chat completion")["payload"]
    assert by_hand(chat) == usage_of(chat)
    *chunks, last = _case("openai", "chat stream")["stream"]
    stream = [*chunks, *[chunks[1]] * CHUNKS, last]
    calls: list[tuple[str, str, Callable[[], object]]] = [
        ("by hand", "a TokenUsage from known places of a chat completion", partial(by_hand, chat)),
        ("chat", "the same chat completion, of whichever shape it be", partial(usage_of, chat)),
        ("chat object", "the same as an object", partial(usage_of, _object(chat))),
    ]
    for file, name in (
        ("openai", "Responses"),
        ("anthropic", "compaction is not in the top level"),
        ("gemini", "cache and audio"),
        ("bedrock", "Converse with caches of both lengths"),
    ):
        calls.append((file, name, partial(usage_of, _case(file, name)["payload"])))
    calls.append(("stream", f"a chat stream of {len(stream)} chunks", partial(usage_of_stream, stream)))
    contenders = [Contender(name=name, does=does, turn=partial(turn, call)) for name, does, call in calls]
    targets = [Target(name="chat", beside="by hand", least=0.1)]
    yield compare("Usage of one answer", contenders, targets, rounds=rounds, turn_s=turn_s)


def _case(file: str, name: str) -> Any:
    return next(case for case in json.loads((SHAPES / f"{file}.json").read_text()) if case["name"] == name)


def _object(value: Any) -> Any:
    if isinstance(value, list):
        return [_object(item) for item in value]
    return SimpleNamespace(**{k: _object(v) for k, v in value.items()}) if isinstance(value, dict) else value


if __name__ == "__main__":
    for table in payload_tables(rounds=5, turn_s=0.3):
        print(f"{table}\n")
