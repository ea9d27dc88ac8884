"""The usage of an answer that comes in chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from metering.errors import InvalidUsage
from metering.payloads.bedrock import invoked_chunk
from metering.payloads.reading import Part, names_in, opened, walk
from metering.payloads.registry import CHUNK_PLACES, known_provider
from metering.payloads.replies import Reply, guarded, reply_from

if TYPE_CHECKING:
    from collections.abc import Mapping

    from metering.events import TokenUsage

__all__ = ["UsageStream"]

_WITHIN = ("message", "response")
"""Where an event of Anthropic's and of Responses holds the answer."""


class UsageStream:
    """Gathers the usage of one answer while its chunks go by: `add` each in wire order, then ask for `usage()`.

    Of every count the last value that was said holds: what is sent more than once in a stream is cumulative with all
    providers. `provider` is only needed where the counts themselves do not tell; see `usage_of`. Not for two threads
    at once.
    """

    def __init__(self, provider: str | None = None) -> None:
        self._provider = known_provider(provider)
        self._counts: dict[Any, object] = {}
        self._answer: dict[Any, object] = {}
        self._is_begun = False
        self._last: Mapping[Any, object] = {}
        self._has_choices = False
        self._failure: InvalidUsage | None = None

    def add(self, chunk: object) -> None:
        """Take note of a chunk: a dict or an SDK's object. Those without usage count for nothing. Never raises."""
        try:
            with guarded(chunk):
                self._add(chunk)
        except InvalidUsage as exc:
            self._failure = self._failure or exc

    def usage(self) -> TokenUsage:
        """The usage so far. Raises `InvalidUsage` where none has come, or what came cannot be."""
        return self.reply().usage

    def reply(self) -> Reply:
        """The same, with what the stream says of its provider and model."""
        if self._failure is not None:
            raise self._failure
        if self._is_begun:
            raise InvalidUsage("events", "message_start", "a message_delta, which says what was made; the stream broke")
        if not self._counts:
            raise InvalidUsage("events", None, self._what_is_missing())
        with guarded(self):
            return reply_from(self._counts, self._answer, self._provider)

    def _add(self, chunk: object) -> None:
        data = opened(chunk)
        if data is None:
            return
        data = invoked_chunk(data) or data
        self._last = data
        self._has_choices |= "choices" in data
        self._note(data)
        for name in _WITHIN:
            self._note(walk(data, (name,)) or {})
        for place, rule in CHUNK_PLACES.items():
            counts = walk(data, place)
            if counts and (place or rule.reads(Part(counts))):
                self._counts.update((name, value) for name, value in counts.items() if value is not None)
                self._is_begun = place == ("message", "usage") and data.get("type") == "message_start"
                return

    def _note(self, answer: Mapping[Any, object]) -> None:
        """Keep what tells model and provider, whichever chunk says it: texts, and which other names there are."""
        for name, value in answer.items():
            told = value if type(value) is str else value is not None
            if told:
                self._answer.setdefault(name, told)

    def _what_is_missing(self) -> str:
        if self._has_choices:
            return 'usage in the last chunk, which is only sent when asked for: stream_options={"include_usage": true}'
        return f"usage in one of the chunks; names seen in the last one: {names_in(self._last)}"
