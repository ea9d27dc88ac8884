"""The spans of a run, or of many, folded into token totals that count nothing twice (pure)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from metering.errors import InvalidUsage
from metering.events import TOKEN_FIELDS, TokenUsage
from metering.traces.spans import TracedSpan, read_span

__all__ = ["UNKNOWN_MODEL", "RunTokenTotals", "TokenTotals", "TraceFlag", "sum_trace_tokens"]

UNKNOWN_MODEL = "unknown"
"""The model in `by_model` of spans that name none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTotals:
    """Tokens of many calls. The fields are those of `TokenUsage`, and mean the same."""

    input_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    cache_write_1h_tokens: int = 0
    input_audio_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    output_audio_tokens: int = 0
    model_calls: int = 0
    """Spans that count."""

    @property
    def total_tokens(self) -> int:
        """Everything read and generated."""
        return self.input_tokens + self.output_tokens

    @property
    def uncached_input_tokens(self) -> int:
        """Input that was neither read from nor written to a cache."""
        return self.input_tokens - self.cache_read_tokens - self.cache_write_tokens

    def to_usage(self) -> TokenUsage:
        """The same as the usage of one event. Raises `InvalidUsage` above 2^53 tokens."""
        return TokenUsage(**{name: getattr(self, name) for name in TOKEN_FIELDS})


class TraceFlag(NamedTuple):
    """Something odd about a span."""

    kind: str
    """`orphan`: its parent is not among the spans, so it may repeat what another one counts. `cycle`: it is its own
    ancestor, and counts as if it had no parent. `conflicting_duplicate`: its id came with different contents, and the
    one with most tokens counts. `mismatched_total`: its total is not input + output. `invalid_count`: a count was none,
    and is left out. `unknown_model`: it counts, and names no model. `unrepeated`: it is left out because those below it
    count, and says more than they do, so it may have been a call of its own.
    """
    trace_id: str | None
    span_id: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTokenTotals(TokenTotals):
    """Tokens of a run's spans, or of several runs'."""

    by_model: Mapping[str, TokenTotals] = field(default_factory=dict)
    """The same by the model that answered, sorted by name."""
    flags: tuple[TraceFlag, ...] = ()
    """What is odd, sorted."""


_COUNTS = tuple(count.name for count in fields(TokenTotals))

_Key = tuple[str | None, str | int | None]


def sum_trace_tokens(spans: Iterable[Any] | None) -> RunTokenTotals:
    """Sum what spans say of tokens, each token once, in whatever order they come; None and no spans are zeros.

    Each is anything `read_span` takes. A span counts only if nothing below it carries usage, so an agent's span that
    repeats its calls does not; zeros below it outweigh nothing. The same span twice counts once. A span whose parent is
    missing counts, and is flagged. Sampled traces sum to less than was used.

    Raises `InvalidUsage` for what is no span; what is odd about spans is in `flags`.
    """
    if spans is None:
        return RunTokenTotals()
    if isinstance(spans, str | bytes | Mapping) or not isinstance(spans, Iterable):
        raise InvalidUsage("spans", type(spans).__name__, "the spans of a trace, as a list")
    flags: set[TraceFlag] = set()
    distinct = _distinct(map(read_span, spans), flags)
    parents = _parents(distinct, flags)
    counted = _counting(distinct, parents)
    for key, span in distinct.items():
        flags.update(TraceFlag(kind, *_ids(span)) for kind in span.flags if key in counted or span.usage is None)
    _flag_orphans(distinct, parents, counted, flags)
    _flag_unrepeated(distinct, parents, counted, flags)
    by_model: dict[str, Counter[str]] = {}
    for key in counted:
        span = distinct[key]
        assert span.usage is not None
        if span.model is None:
            flags.add(TraceFlag("unknown_model", *_ids(span)))
        counts = by_model.setdefault(span.model or UNKNOWN_MODEL, Counter())
        counts.update(span.usage.to_dict())
        counts["model_calls"] += 1
    return RunTokenTotals(
        **{name: sum(counts[name] for counts in by_model.values()) for name in _COUNTS},
        by_model={model: TokenTotals(**by_model[model]) for model in sorted(by_model)},
        flags=tuple(sorted(flags, key=lambda flag: (flag.kind, flag.trace_id or "", flag.span_id or ""))),
    )


def _distinct(spans: Iterable[TracedSpan], flags: set[TraceFlag]) -> dict[_Key, TracedSpan]:
    """Each span once. Those without an id are spans of their own."""
    distinct: dict[_Key, TracedSpan] = {}
    for number, span in enumerate(spans):
        key = (span.trace_id, number if span.span_id is None else span.span_id)
        other = distinct.setdefault(key, span)
        if other is not span:
            if (other.parent_span_id, other.usage, other.model) != (span.parent_span_id, span.usage, span.model):
                flags.add(TraceFlag("conflicting_duplicate", *_ids(span)))
            distinct[key] = max(other, span, key=_weight)
    return distinct


def _weight(span: TracedSpan) -> tuple[Any, ...]:
    """Of two spans with one id the same one wins whichever came first."""
    counts = (-1,) if span.usage is None else (span.usage.total_tokens, *span.usage.counts())
    texts = (span.parent_span_id, span.model, span.provider, span.convention, span.name, *span.flags)
    return counts, tuple(text or "" for text in texts)


def _parents(distinct: dict[_Key, TracedSpan], flags: set[TraceFlag]) -> dict[_Key, _Key]:
    """The parent of each span that has one here, without the links of cycles."""
    parents: dict[_Key, _Key] = {}
    for key, span in distinct.items():
        parent = (span.trace_id, span.parent_span_id)
        if span.parent_span_id is not None and parent in distinct:
            parents[key] = parent
    done: set[_Key] = set()
    for start in distinct:
        path: dict[_Key, None] = {}
        at: _Key | None = start
        while at is not None and at not in done and at not in path:
            path[at] = None
            at = parents.get(at)
        if at in path:
            ring = list(path)[list(path).index(at) :]
            for key in ring:
                del parents[key]
                flags.add(TraceFlag("cycle", *_ids(distinct[key])))
        done.update(path)
    return parents


def _counting(distinct: dict[_Key, TracedSpan], parents: dict[_Key, _Key]) -> set[_Key]:
    """The spans that count."""
    with_usage = [key for key, span in distinct.items() if span.usage is not None]
    with_tokens = [key for key in with_usage if distinct[key].usage != TokenUsage()]
    above_usage = _above(with_usage, parents)
    above_tokens = _above(with_tokens, parents)
    return {key for key in with_tokens if key not in above_tokens} | {
        key for key in with_usage if key not in above_usage
    }


def _above(keys: Iterable[_Key], parents: dict[_Key, _Key]) -> set[_Key]:
    """All ancestors of these spans."""
    above: set[_Key] = set()
    for key in keys:
        at = parents.get(key)
        while at is not None and at not in above:
            above.add(at)
            at = parents.get(at)
    return above


def _flag_orphans(
    distinct: dict[_Key, TracedSpan], parents: dict[_Key, _Key], counted: set[_Key], flags: set[TraceFlag]
) -> None:
    for key in counted | _above(counted, parents):
        span = distinct[key]
        if span.parent_span_id is not None and (span.trace_id, span.parent_span_id) not in distinct:
            flags.add(TraceFlag("orphan", *_ids(span)))


def _flag_unrepeated(
    distinct: dict[_Key, TracedSpan], parents: dict[_Key, _Key], counted: set[_Key], flags: set[TraceFlag]
) -> None:
    """A span that is not counted says more than those below it that are: it may not be a repeat of them."""
    below: Counter[_Key] = Counter()
    for key in counted:
        usage = distinct[key].usage
        assert usage is not None
        for above in _above([key], parents):
            below[above] += usage.total_tokens
    for key, tokens in below.items():
        usage = distinct[key].usage
        if key not in counted and usage is not None and usage.total_tokens > tokens:
            flags.add(TraceFlag("unrepeated", *_ids(distinct[key])))


def _ids(span: TracedSpan) -> tuple[str | None, str | None]:
    return span.trace_id, span.span_id
