"""What a reconciliation is told of runs, and what it says of them: records alone, and pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime  # noqa: TC003  of records that msgspec reads
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID  # noqa: TC003

from metering.events import TokenUsage

if TYPE_CHECKING:
    from collections.abc import Mapping

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
    "Stake",
    "Tolerance",
    "TracedModel",
    "Verdict",
    "state_of",
]

Verdict = Literal["matched", "unbilled", "untraced", "mismatched", "double-counted", "abandoned"]
Action = Literal["replace", "take_back", "add", "accept"]

VERDICTS: tuple[Verdict, ...] = ("matched", "unbilled", "untraced", "mismatched", "double-counted", "abandoned")


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
    caller_type: str
    period: str
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
    """In the period that is reconciled, where it was active in it."""


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
    state: str = ""
    """See `state_of`."""
    billed_to: str | None = None
    """Another account that a run of this id is billed to."""
    period: str | None = None
    """The one that is reconciled: what is missing is billed in it."""


def state_of(events: int, last_event: int, spans: int, last_span: int) -> str:
    """What differs once anything else is recorded of a run, of whichever account: how many events it has, and spans in
    its traces, and the highest number of each.
    """
    return f"{events}/{last_event}/{spans}/{last_span}"


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
    caller_type: str = "production_agent"
    billable: bool = True
    platform_paid: bool = True
    """As the run's other events, of an added one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What a run is found to be."""

    verdict: Verdict
    reason: str = ""
    corrections: tuple[Correction, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Stake:
    """What the corrections of all of an account's runs come to together."""

    currency: str | None = None
    """None where the account is not known."""
    change: Decimal = Decimal(0)
    """What they add to its bill, before the plan's minimum and rounding; below 0 where too much was billed."""
    unproven: Decimal = Decimal(0)
    """What is billed of runs of which nothing was traced."""
    cost: Decimal = Decimal(0)
    """USD that the corrections add to what the provider charges."""
    unpriced: int = 0
    """Runs that no plan has a price for, which are in neither `change` nor `unproven`."""
    uncosted: int = 0
    """Runs whose provider cost is not known, which are not in `cost`."""
    looks_sampled: bool = False
    """Whether so many runs were traced less than billed that tracing may have left calls out."""


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

    stakes: Mapping[str, Stake]
    """By account, of those with runs that differ."""

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
    """What the corrections of this run alone add to the account's bill, in `currency`, before the plan's minimum and
    rounding; where they change nothing, what taking the run back would: money that nothing proves. None where no price
    tells. Where rates have tiers, amounts of runs do not add up to that of all: see `Stake`.
    """
    currency: str | None
    cost: Decimal | None
    """The same of what the provider charges, in USD."""
    evidence: Mapping[str, Any]
    """`billed` and `traced` counts by model, `events` and `holds` by id."""
    corrections: tuple[Correction, ...]
    applied_at: datetime | None = None
    applied_by: str | None = None
