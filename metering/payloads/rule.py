"""What there is to say of one shape of usage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from metering.events import TokenUsage
    from metering.payloads.reading import Part

__all__ = ["Rule"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rule:
    """How one shape of usage is found and read. Many providers speak one shape."""

    shape: str
    """For people."""
    reads: Callable[[Part], bool]
    """Whether these counts may be of this shape, by their names alone."""
    usage: Callable[[Part, str | None], TokenUsage]
    """The counts, under the inclusive rules of `TokenUsage`. The second argument is the provider, where it is known."""
    places: tuple[tuple[str, ...], ...] = (("usage",),)
    """Where the counts lie in an answer, besides being all of it."""
    chunk_places: tuple[tuple[str, ...], ...] = (("usage",),)
    """Where they lie in a chunk of a stream; `()` is the chunk itself."""
    provider_of: Callable[[Mapping[Any, object], Part], str | None] = lambda _answer, _part: None
    """Whose answer it is, as genai-prices names providers; None where the answer does not say."""
    preferred_by: frozenset[str] = frozenset()
    """Providers who mean this shape where counts might be of two."""
