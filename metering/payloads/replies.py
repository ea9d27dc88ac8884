"""Which rule an answer is read by, and what it says."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from metering.errors import InvalidUsage
from metering.events import TokenUsage
from metering.payloads.reading import Part, names_in, opened, text_in, walk
from metering.payloads.registry import PLACES, RULES, SHAPES, known_provider

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from metering.payloads.rule import Rule

__all__ = ["Reply", "guarded", "reply_from", "reply_in"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What an answer says of itself."""

    usage: TokenUsage
    provider: str | None = None
    """As genai-prices names it; None where the answer does not say."""
    model: str | None = None


@contextmanager
def guarded(what: object) -> Iterator[None]:
    """A block that reads what others wrote: whatever an object of theirs raises is told as `InvalidUsage`."""
    try:
        yield
    except InvalidUsage:
        raise
    except Exception as exc:
        raise InvalidUsage("payload", type(what), f"what can be read; it raised {type(exc).__name__}") from exc


def reply_in(payload: object, provider: object) -> Reply:
    """What a whole answer, or the usage part of one, says. Raises `InvalidUsage`."""
    known = known_provider(provider)
    if issubclass(type(payload), TokenUsage):
        return Reply(usage=cast("TokenUsage", payload))
    answer = opened(payload)
    if answer is None:
        raise InvalidUsage("payload", type(payload), "an answer or its usage, as an object or as decoded JSON")
    counts = next(filter(None, (walk(answer, place) for place in PLACES)), answer)
    return reply_from(counts, answer, known)


def reply_from(counts: Mapping[Any, object], answer: Mapping[Any, object], provider: str | None) -> Reply:
    """What these counts, and the answer around them, say. Raises `InvalidUsage`."""
    part = Part(counts)
    rules = [rule for rule in RULES if rule.reads(part)]
    if not rules:
        raise InvalidUsage("usage", type(counts), f"the usage of {SHAPES}; names seen: {names_in(counts)}")
    if len(rules) == 1:
        usage = rules[0].usage(part, provider)
    else:
        usage, rules = _agreed(rules, part, provider)
    said = {rule.provider_of(answer, part) for rule in rules} - {None}
    return Reply(
        usage=usage,
        provider=said.pop() if len(said) == 1 else None,
        model=text_in(answer, "model", "modelVersion", "model_version"),
    )


def _agreed(rules: list[Rule], part: Part, provider: str | None) -> tuple[TokenUsage, list[Rule]]:
    """What the rules that fit agree on, or else the one that the provider means."""
    read: dict[Rule, TokenUsage] = {}
    misfit: InvalidUsage | None = None
    for rule in rules:
        try:
            read[rule] = rule.usage(part, provider)
        except InvalidUsage as exc:
            misfit = misfit or exc
    if not read:
        assert misfit is not None
        raise misfit
    # Some gateways fill the names of another shape with zeros.
    said = {rule: usage for rule, usage in read.items() if usage.total_tokens} or read
    meant = {rule: usage for rule, usage in said.items() if provider in rule.preferred_by}
    for choice in (said, meant):
        if len(set(choice.values())) == 1:
            return next(iter(choice.values())), list(choice)
    shapes = " or ".join(rule.shape for rule in said)
    raise InvalidUsage("provider", provider, f"one that says whether these counts are of {shapes}")
