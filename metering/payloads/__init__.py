"""What any provider says of a call's tokens, as one `TokenUsage`.

`TokenUsage.from_payload(answer)` and `TokenUsage.from_stream(chunks)` are these functions. They read dicts as decoded
from JSON, and SDK objects of any kind, whole or only their usage part: Anthropic's messages, Bedrock's Converse,
Cohere, Gemini, Ollama, and what OpenAI made common: chat completions, embeddings, Responses. Nothing is counted twice,
and an explicit zero stays one.

The shape of the counts decides how they are read, whoever sent them: most providers speak several shapes. `provider`
decides only where counts of the same shape may mean two things, as genai-prices or OpenTelemetry name it; a name not
known here leaves it open. All raise `InvalidUsage`: for unknown shapes, naming the names seen and never what they hold;
for counts that are negative, no whole numbers, left out, or larger than what they are part of; and for those that may
mean two things, with no provider that tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from metering.errors import InvalidUsage
from metering.payloads.replies import Reply, guarded, reply_in
from metering.payloads.streams import UsageStream

if TYPE_CHECKING:
    from collections.abc import Iterable

    from metering.events import TokenUsage

__all__ = ["Reply", "UsageStream", "reply_of", "usage_of", "usage_of_stream"]


def usage_of(payload: object, provider: str | None = None) -> TokenUsage:
    """The usage of one answer: the whole of it or its usage part; a `TokenUsage` is itself.

    Of objects only data is read, no property. Raises `InvalidUsage`.
    """
    return reply_of(payload, provider).usage


def usage_of_stream(events: Iterable[object], provider: str | None = None) -> TokenUsage:
    """The usage of one answer from all its chunks in wire order. Raises `InvalidUsage`, and what iterating raises.

    To read chunks that something else consumes, or asynchronous ones, `add` them to a `UsageStream`.
    """
    stream = UsageStream(provider)
    kind = type(events)
    if issubclass(kind, Mapping | str | bytes) or not hasattr(kind, "__iter__"):
        raise InvalidUsage("events", kind, "chunks to iterate over; for async for, a UsageStream")
    for event in events:
        stream.add(event)
    return stream.usage()


def reply_of(payload: object, provider: str | None = None) -> Reply:
    """The same as `usage_of`, with the provider and the model that the answer names; also of a `UsageStream`."""
    if isinstance(payload, UsageStream):
        return payload.reply()
    with guarded(payload):
        return reply_in(payload, provider)
