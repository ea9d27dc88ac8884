"""Whether what was billed for a run is what was traced of it, and what would put it right (pure)."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import datetime  # noqa: TC003  of records that msgspec reads
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID  # noqa: TC003

from metering.events import TOKEN_FIELDS, TokenUsage

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = [
    "VERDICTS",
    "Action",
    "BilledEvent",
    "Correction",
    "ExpiredHold",
    "Judgement",
    "Reconciliation",
    "RunFacts",
    "RunVerdict",
    "Tolerance",
    "TracedModel",
    "Verdict",
    "judge",
    "state_of",
]

Verdict = Literal["matched", "unbilled", "untraced", "mismatched", "double-counted", "abandoned"]
Action = Literal["replace", "take_back", "add", "accept"]

VERDICTS: tuple[Verdict, ...] = ("matched", "unbilled", "untraced", "mismatched", "double-counted", "abandoned")

_SIDES = ("input_tokens", "output_tokens")
_PARTS = tuple(name for name in TOKEN_FIELDS if name not in _SIDES)
_MOST_TIMES = 10
"""A run that was billed more often than this is merely mismatched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """How far a count may be from the traced one: the larger of the two."""

    tokens: int = 2
    percent: Decimal = Decimal("0.1")
    """Of the traced count."""

    def covers(self, billed: int, traced: int) -> bool:
        """Whether the difference is noise."""
        difference = abs(billed - traced)
        return difference <= self.tokens or 100 * difference <= self.percent * traced


@dataclass(frozen=True, slots=True, kw_only=True)
class BilledEvent:
    """An event that stands: no reversal, and none that was reversed."""

    seq: int
    event_id: UUID
    plan_version: int
    line: str
    provider: str | None
    model: str | None
    known_as: str | None
    """The model's one name, whoever spells it; None where none is named."""
    service_tier: str | None
    occurred_at: datetime
    usage: TokenUsage
    quantity: Decimal
    billable: bool
    platform_paid: bool
    cost: Decimal | None
    """USD; None where no price is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedModel:
    """What was traced of one model in a run, nothing twice."""

    provider: str | None
    model: str | None
    known_as: str | None
    usage: TokenUsage
    calls: int
    started_at: datetime
    ended_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpiredHold:
    """A hold that nobody ever settled: its process crashed, or forgot it."""

    hold_id: UUID
    line: str
    admitted_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """Everything known of one run."""

    account: str | None
    """None where only spans tell of it, and none names an account."""
    run_id: str
    events: tuple[BilledEvent, ...] = ()
    traced: tuple[TracedModel, ...] = ()
    expired: tuple[ExpiredHold, ...] = ()

    @property
    def state(self) -> str:
        """See `state_of`."""
        return state_of(event.event_id for event in self.events)


def state_of(event_ids: Iterable[UUID]) -> str:
    """32 hex digits that differ once anything else is billed: events never change, so ids of those that stand tell."""
    ids = ",".join(sorted(event_id.hex for event_id in event_ids))
    return hashlib.blake2b(ids.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """One step that is proposed. Applying all of a run's makes its billed tokens its traced ones."""

    action: Action
    """`replace` an event's usage, `take_back` an event, `add` one, or `accept` the run as it is billed."""
    event_id: UUID | None = None
    """The event to replace or take back."""
    line: str | None = None
    """Of the event. None where it is not known which line an added one is sold on: then it cannot be applied."""
    provider: str | None = None
    model: str | None = None
    usage: TokenUsage = field(default_factory=TokenUsage)
    """What is billed after it."""
    occurred_at: datetime | None = None
    """Of an added event."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What a run is found to be."""

    verdict: Verdict
    reason: str = ""
    corrections: tuple[Correction, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconciliation:
    """One comparison of a period."""

    number: int
    period: str
    made_at: datetime
    events_to: int
    spans_to: int
    """Watermarks of the warehouse that was compared."""
    tolerance: Tolerance
    runs: Mapping[str, Mapping[str, int]]
    """Runs by account (empty where it is not known), and by what they were found to be: a verdict, or `accepted`,
    `pending` (heard of too recently, or held still) or `not judged` (too many differ).
    """

    def totals(self) -> dict[str, int]:
        """Runs of all accounts by what they were found to be."""
        total: Counter[str] = Counter()
        for counts in self.runs.values():
            total.update(counts)
        return dict(sorted(total.items()))


@dataclass(frozen=True, slots=True, kw_only=True)
class RunVerdict:
    """A run that does not agree, and what would put it right."""

    number: int
    """Within its reconciliation, from 1."""
    account: str | None
    run_id: str
    verdict: Verdict
    reason: str
    state: str
    """Of `RunFacts`: corrections are refused once it is another one."""
    amount: Decimal | None
    """What the corrections add to the account's bill, in `currency`, before any minimum and rounding; where they change
    nothing, what taking the run back would: money that nothing proves. None where no price tells.
    """
    currency: str | None
    cost: Decimal | None
    """The same of what the provider charges, in USD."""
    evidence: Mapping[str, Any]
    """`billed` and `traced` counts by model, `events` and `holds` by id."""
    corrections: tuple[Correction, ...]
    applied_at: datetime | None = None
    applied_by: str | None = None


def judge(run: RunFacts, tolerance: Tolerance, *, usual_line: str | None = None) -> Judgement:
    """Compare a run's billed tokens with its traced ones, model by model and class by class.

    A part of the input or output that traces say nothing of (0) is not compared, because most instrumentation leaves it
    out: what is billed of it stands, as far as it fits. Where either side names no model, the run is compared as a
    whole. `usual_line` is what an event is added on where neither an event nor a hold of the run tells.
    """
    billed = sum(event.usage.total_tokens for event in run.events)
    traced = sum(model.usage.total_tokens for model in run.traced)
    if not traced:
        return _untraced(run, billed)
    if not run.events:
        return _unbilled(run, usual_line)
    groups = _groups(run, tolerance)
    differing = [group for group in groups if group.differs]
    if not differing:
        return Judgement(verdict="matched")
    reason = "; ".join(group.said() for group in differing)
    corrections = _corrections(run, differing, usual_line)
    if run.expired and billed < traced:
        held = _named(run.expired)
        return Judgement(verdict="abandoned", reason=f"{held} was never settled: {reason}", corrections=corrections)
    doubles = [group.double() for group in differing]
    if all(doubles):
        return Judgement(verdict="double-counted", reason="; ".join(filter(None, doubles)), corrections=corrections)
    return Judgement(verdict="mismatched", reason=reason, corrections=corrections)


def _untraced(run: RunFacts, billed: int) -> Judgement:
    accept = (Correction(action="accept"),)
    if billed:
        return Judgement(
            verdict="untraced", reason=f"{billed:,} tokens are billed, none were traced", corrections=accept
        )
    if run.expired and not run.events:
        return Judgement(
            verdict="abandoned",
            reason=f"{_named(run.expired)} was never settled, and nothing was traced",
            corrections=accept,
        )
    return Judgement(verdict="matched")


def _unbilled(run: RunFacts, usual_line: str | None) -> Judgement:
    total = sum(model.usage.total_tokens for model in run.traced)
    reason = f"{total:,} tokens were traced, none are billed"
    line = run.expired[0].line if run.expired else usual_line
    if run.account is None:
        return Judgement(verdict="unbilled", reason=f"{reason}; no span names the account")
    added = tuple(_added(model, line) for model in run.traced if model.usage.total_tokens)
    if run.expired:
        return Judgement(
            verdict="abandoned", reason=f"{_named(run.expired)} was never settled: {reason}", corrections=added
        )
    return Judgement(verdict="unbilled", reason=reason, corrections=added)


def _named(holds: Sequence[ExpiredHold]) -> str:
    more = f" and {len(holds) - 1} more" if len(holds) > 1 else ""
    return f"hold {holds[0].hold_id}{more} on line {holds[0].line}"


def _added(model: TracedModel, line: str | None) -> Correction:
    return Correction(
        action="add",
        line=line,
        provider=model.provider,
        model=model.model,
        usage=model.usage,
        occurred_at=model.started_at,
    )


class _Group:
    """What was billed and traced of one model."""

    def __init__(
        self,
        name: str | None,
        events: Iterable[BilledEvent],
        traced: Iterable[TracedModel],
        tolerance: Tolerance,
    ) -> None:
        self.name = name
        # What is not billed to anybody is the first to be taken back.
        self.events = sorted(events, key=lambda event: (not event.billable, event.seq))
        self.traced = list(traced)
        self._tolerance = tolerance
        self.billed = _sum(event.usage for event in self.events)
        said = _sum(model.usage for model in self.traced)
        self.target = _fitted(said | {part: self.billed[part] for part in _PARTS if not said[part]})
        self.differs = not self._agrees(self.billed, self.target)

    def missing(self) -> int:
        """Tokens that were traced and are not billed."""
        return sum(self.target[side] - self.billed[side] for side in _SIDES)

    def said(self) -> str:
        """The difference for people."""
        name = self.name or "all models"
        if not any(self.target[side] for side in _SIDES):
            return f"{name}: {sum(self.billed[side] for side in _SIDES):,} tokens billed, none traced"
        if not any(self.billed[side] for side in _SIDES):
            return f"{name}: {sum(self.target[side] for side in _SIDES):,} tokens traced, none billed"
        differing = [
            f"{count} billed {self.billed[count]:,}, traced {self.target[count]:,}"
            for count in TOKEN_FIELDS
            if not self._tolerance.covers(self.billed[count], self.target[count])
        ]
        return f"{name}: {', '.join(differing)}"

    def double(self) -> str:
        """How the same tokens came to be billed more than once; empty where that does not explain the difference."""
        if not self.events or not any(self.target.values()):
            return ""
        name = self.name or "all models"
        kept = self.kept(self.target)
        taken = [event for event in self.events if kept[event.event_id] is None]
        if (
            taken
            and all(any(_is_repeat(event, other) for other in self.events if other not in taken) for event in taken)
            and self._agrees(_sum(event.usage for event in self.events if event not in taken), self.target)
        ):
            return f"{name}: {', '.join(str(event.event_id) for event in taken)} repeats what another event bills"
        for times in range(2, _MOST_TIMES + 1):
            if self._agrees(self.billed, {part: count * times for part, count in self.target.items()}):
                return f"{name}: billed {times} times over"
        return self._counted_on_top()

    def _counted_on_top(self) -> str:
        """Parts of the input or the output that were added to it once more."""
        read, written = self.target["cache_read_tokens"], self.target["cache_write_tokens"]
        on_top = {
            "input_tokens": {
                "cache_read_tokens": read,
                "cache_write_tokens": written,
                "cache_read_tokens + cache_write_tokens": read + written,
                "input_audio_tokens": self.target["input_audio_tokens"],
            },
            "output_tokens": {
                "reasoning_tokens": self.target["reasoning_tokens"],
                "output_audio_tokens": self.target["output_audio_tokens"],
            },
        }
        told, explained = [], dict(self.target)
        for side, parts in on_top.items():
            if self._tolerance.covers(self.billed[side], self.target[side]):
                continue
            part = next(
                (
                    part
                    for part, count in parts.items()
                    if count and self._tolerance.covers(self.billed[side], self.target[side] + count)
                ),
                None,
            )
            if part is None:
                return ""
            explained[side] += parts[part]
            told.append(f"{part} counted on top of {side}")
        if not told or not self._agrees(self.billed, explained):
            return ""
        return f"{self.name or 'all models'}: {', '.join(told)}"

    def kept(self, target: Mapping[str, int]) -> dict[UUID, TokenUsage | None]:
        """What each event is to bill, so that together they bill `target`; None for one to be taken back.

        As many as possible stay as they are, the earlier ones first.
        """
        kept: dict[UUID, TokenUsage | None] = {}
        billed = dict.fromkeys(TOKEN_FIELDS, 0)
        others = []
        for event in self.events:
            with_it = {name: billed[name] + count for name, count in event.usage.to_dict().items()}
            is_needed = event.usage.total_tokens or not self._agrees(billed, target)
            if is_needed and self._fits(with_it, target):
                kept[event.event_id] = event.usage
                billed = with_it
            else:
                others.append(event)
                kept[event.event_id] = None
        if not self._agrees(billed, target):
            changed, before = (others[0], TokenUsage()) if others else (self.events[-1], self.events[-1].usage)
            kept[changed.event_id] = TokenUsage(**_sum([before, TokenUsage(**_left(billed, target))]))
        return kept

    def _fits(self, billed: Mapping[str, int], target: Mapping[str, int]) -> bool:
        """Whether nothing is above the target by more than noise, and what is missing could be one call's."""
        is_above = any(
            count > target[name] and not self._tolerance.covers(count, target[name]) for name, count in billed.items()
        )
        left = _left(billed, target)
        return not is_above and _fitted(left) == left

    def _agrees(self, billed: Mapping[str, int], traced: Mapping[str, int]) -> bool:
        return all(self._tolerance.covers(billed[name], traced[name]) for name in TOKEN_FIELDS)


def _groups(run: RunFacts, tolerance: Tolerance) -> list[_Group]:
    """One for each model; one alone where no telling them apart is needed, or possible."""
    named = sorted({model.known_as for model in run.traced if model.known_as is not None})
    events = [event for event in run.events if event.usage.total_tokens]
    if any(model.known_as is None for model in run.traced) or any(event.known_as is None for event in events):
        whole = _Group(None, run.events, run.traced, tolerance)
        if len(named) != len(run.traced) or not whole.differs:
            return [whole]
    by_model: dict[str, list[BilledEvent]] = {name: [] for name in named}
    for event in events:
        if event.known_as is not None:
            by_model.setdefault(event.known_as, []).append(event)
    left = {
        name: _Group(
            name, by_model[name], [model for model in run.traced if model.known_as == name], tolerance
        ).missing()
        for name in named
    }
    for event in events:
        if event.known_as is None:
            # Where it fits, else where most is missing.
            name = next(
                (name for name in named if event.usage.total_tokens <= left[name]),
                max(named, key=lambda name: left[name]),
            )
            by_model[name].append(event)
            left[name] -= event.usage.total_tokens
    # What was traced may be billed on an event that says no tokens.
    by_model[min(by_model)] += [event for event in run.events if not event.usage.total_tokens]
    return [
        _Group(name, by_model[name], [model for model in run.traced if model.known_as == name], tolerance)
        for name in sorted(by_model)
    ]


def _corrections(run: RunFacts, differing: Sequence[_Group], usual_line: str | None) -> tuple[Correction, ...]:
    unbilled = [group for group in differing if not group.events]
    untraced = [group for group in differing if group.events and not group.traced]
    corrections = []
    for group in differing:
        if not group.events:
            continue
        # What was billed on a model of which nothing was traced was another model's.
        target = unbilled.pop(0) if group in untraced and unbilled else group
        kept = group.kept(target.target)
        for event in group.events:
            after = kept[event.event_id]
            if after is None:
                if event.usage.total_tokens:
                    corrections.append(_changed(event, TokenUsage(), action="take_back"))
            elif after != event.usage or target is not group:
                changed = _changed(event, after, action="replace")
                if event.known_as != target.name and len(target.traced) == 1:
                    named = target.traced[0]
                    changed = replace(changed, model=named.model, provider=named.provider or event.provider)
                corrections.append(changed)
    line = run.events[0].line if run.events else usual_line
    corrections += [_added(model, line) for group in unbilled for model in group.traced]
    return tuple(corrections)


def _changed(event: BilledEvent, usage: TokenUsage, *, action: Action) -> Correction:
    return Correction(
        action=action,
        event_id=event.event_id,
        line=event.line,
        provider=event.provider,
        model=event.model,
        usage=usage,
    )


def _is_repeat(event: BilledEvent, other: BilledEvent) -> bool:
    return (event.usage, event.known_as) == (other.usage, other.known_as)


def _sum(usages: Iterable[TokenUsage]) -> dict[str, int]:
    total = dict.fromkeys(TOKEN_FIELDS, 0)
    for usage in usages:
        for name, count in usage.to_dict().items():
            total[name] += count
    return total


def _left(billed: Mapping[str, int], target: Mapping[str, int]) -> dict[str, int]:
    return {name: max(0, target[name] - count) for name, count in billed.items()}


def _fitted(counts: Mapping[str, int]) -> dict[str, int]:
    """The same with every part cut to what it is a part of."""
    fitted = dict(counts)
    fitted["cache_read_tokens"] = min(counts["cache_read_tokens"], counts["input_tokens"])
    room = counts["input_tokens"] - fitted["cache_read_tokens"]
    fitted["cache_write_tokens"] = min(counts["cache_write_tokens"], room)
    fitted["cache_write_1h_tokens"] = min(counts["cache_write_1h_tokens"], fitted["cache_write_tokens"])
    fitted["input_audio_tokens"] = min(counts["input_audio_tokens"], counts["input_tokens"])
    fitted["reasoning_tokens"] = min(counts["reasoning_tokens"], counts["output_tokens"])
    fitted["output_audio_tokens"] = min(counts["output_audio_tokens"], counts["output_tokens"])
    return fitted
