"""Whether what was billed for a run is what was traced of it, and what would put it right (pure)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from metering.billing.reconciliation import Correction, Judgement
from metering.checks import MAX_TOKENS
from metering.events import TOKEN_FIELDS, TokenUsage

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from uuid import UUID

    from metering.billing.reconciliation import (
        Action,
        BilledEvent,
        ExpiredHold,
        RunFacts,
        Tolerance,
        TracedModel,
    )

__all__ = ["judge"]

_SIDES = ("input_tokens", "output_tokens")
_PARTS = tuple(name for name in TOKEN_FIELDS if name not in _SIDES)
_MOST_TIMES = 10
"""A run that was billed more often than this is merely mismatched."""


def judge(run: RunFacts, tolerance: Tolerance, *, usual_line: str | None = None) -> Judgement:
    """What a run is, and what would put it right: nothing that bills it more where it is billed to another account.

    Compares a run's billed tokens with its traced ones, model by model and class by class.

    A part of the input or output that traces say nothing of (0) is not compared, because most instrumentation leaves it
    out: what is billed of it stands, as far as it fits. Where either side names no model, the run agrees if it does as
    a whole; else an event without a model is taken for one of the model it fits. `usual_line` is what an event is added
    on where neither an event nor a hold of the run tells.
    """
    judgement = _judge(run, tolerance, usual_line)
    before = {event.event_id: event.usage.total_tokens for event in run.events}
    more = sum(
        step.usage.total_tokens - (0 if step.event_id is None else before[step.event_id])
        for step in judgement.corrections
        if step.action != "accept"
    )
    if run.billed_to is None or more <= 0:
        return judgement
    reason = f"{judgement.reason}; a run of this id is billed to {run.billed_to}"
    return replace(judgement, reason=reason, corrections=())


def _judge(run: RunFacts, tolerance: Tolerance, usual_line: str | None) -> Judgement:
    # What was taken back, or failed, and is billed to nobody bills nothing that was traced.
    run = replace(run, events=tuple(event for event in run.events if event.billable or event.usage.total_tokens))
    billed = sum(event.usage.total_tokens for event in run.events)
    traced = sum(model.usage.total_tokens for model in run.traced)
    if not traced or not run.events:
        differs = _Group(None, run.events, run.traced, tolerance, run.period).differs
        if not differs and (billed or traced):
            return Judgement(verdict="matched")
        return _unbilled(run, usual_line) if traced else _untraced(run, billed)
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
        return Judgement(verdict="unbilled", reason=f"{reason}; no span names an account of the ledger")
    added = tuple(_added(run, model, model.usage, line) for model in run.traced if model.usage.total_tokens)
    if run.expired:
        return Judgement(
            verdict="abandoned", reason=f"{_named(run.expired)} was never settled: {reason}", corrections=added
        )
    return Judgement(verdict="unbilled", reason=reason, corrections=added)


def _named(holds: Sequence[ExpiredHold]) -> str:
    more = f" and {len(holds) - 1} more" if len(holds) > 1 else ""
    return f"hold {holds[0].hold_id}{more} on line {holds[0].line}"


def _added(run: RunFacts, model: TracedModel, usage: TokenUsage, line: str | None) -> Correction:
    """An event more, for whom and at whose cost the run's other events are."""
    like = next(iter(sorted(run.events, key=lambda event: (not event.billable, event.seq))), None)
    added = Correction(
        action="add",
        line=line,
        provider=model.provider,
        model=model.model,
        usage=usage,
        occurred_at=model.started_at,
    )
    if like is None:
        return added
    return replace(
        added,
        line=like.line,
        caller_type=like.caller_type,
        billable=like.billable,
        platform_paid=like.platform_paid,
    )


class _Group:
    """What was billed and traced of one model."""

    def __init__(
        self,
        name: str | None,
        events: Iterable[BilledEvent],
        traced: Iterable[TracedModel],
        tolerance: Tolerance,
        period: str | None,
    ) -> None:
        self.name = name
        self._period = period
        # What is not billed to anybody is the first to be taken back.
        self.events = sorted(events, key=lambda event: (not event.billable, event.seq))
        self.traced = list(traced)
        self._tolerance = tolerance
        self.billed = _sum(event.usage for event in self.events)
        said = _sum(model.usage for model in self.traced)
        target = said | {part: self.billed[part] for part in _PARTS if not said[part]}
        # No event can have more.
        self.target = _fitted({name: min(count, MAX_TOKENS) for name, count in target.items()})
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
        kept, missing = self.kept(self.target)
        taken = [event for event in self.events if kept[event.event_id] is None]
        if (
            taken
            and missing is None
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

    def kept(self, target: Mapping[str, int]) -> tuple[dict[UUID, TokenUsage | None], TokenUsage | None]:
        """What each event is to bill, so that together they bill `target`; None for one to be taken back.

        As many as possible stay as they are, the earlier ones first. What is missing is billed on one of the period
        that somebody pays for; where there is none it is the second answer.
        """
        kept: dict[UUID, TokenUsage | None] = {}
        billed = dict.fromkeys(TOKEN_FIELDS, 0)
        for event in self.events:
            with_it = {name: billed[name] + count for name, count in event.usage.to_dict().items()}
            is_needed = event.usage.total_tokens or not self._agrees(billed, target)
            if is_needed and self._fits(with_it, target):
                kept[event.event_id] = event.usage
                billed = with_it
            else:
                kept[event.event_id] = None
        if self._agrees(billed, target):
            return kept, None
        missing = TokenUsage(**_left(billed, target))
        carriers = [event for event in self.events if event.billable and self._period in (None, event.period)]
        carrier = next(
            (event for event in carriers if kept[event.event_id] is None), carriers[-1] if carriers else None
        )
        if carrier is None:
            return kept, missing
        kept[carrier.event_id] = TokenUsage(**_sum([kept[carrier.event_id] or TokenUsage(), missing]))
        return kept, None

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
        whole = _Group(None, run.events, run.traced, tolerance, run.period)
        if len(named) != len(run.traced) or not whole.differs:
            return [whole]
    by_model: dict[str, list[BilledEvent]] = {name: [] for name in named}
    for event in events:
        if event.known_as is not None:
            by_model.setdefault(event.known_as, []).append(event)
    left = {
        name: _Group(
            name, by_model[name], [model for model in run.traced if model.known_as == name], tolerance, run.period
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
        _Group(name, by_model[name], [model for model in run.traced if model.known_as == name], tolerance, run.period)
        for name in sorted(by_model)
    ]


def _corrections(run: RunFacts, differing: Sequence[_Group], usual_line: str | None) -> tuple[Correction, ...]:
    unbilled = [group for group in differing if not group.events]
    untraced = [group for group in differing if group.events and not group.traced]
    corrections = []
    added = []
    for group in differing:
        if not group.events:
            continue
        # What was billed on a model of which nothing was traced was another model's.
        target = unbilled.pop(0) if group in untraced and unbilled else group
        kept, missing = group.kept(target.target)
        for event in group.events:
            after = kept[event.event_id]
            if after is None:
                if event.usage.total_tokens:
                    corrections.append(_changed(event, TokenUsage(), action="take_back"))
            elif after != event.usage or target is not group:
                changed = _changed(event, after, action="replace")
                if event.known_as != target.name and len(target.traced) == 1 and target.traced[0].model is not None:
                    named = target.traced[0]
                    changed = replace(changed, model=named.model, provider=named.provider or event.provider)
                corrections.append(changed)
        if missing is not None:
            added.append(_added(run, target.traced[0], missing, usual_line))
    added += [_added(run, model, model.usage, usual_line) for group in unbilled for model in group.traced]
    return (*corrections, *added)


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
