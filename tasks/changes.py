"""What the steps that are proposed for a run come to, as usage and as provider cost."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, NamedTuple

from metering.billing.invoices import UsageSum
from tasks.costs import provider_cost

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from uuid import UUID

    from metering.billing.reconciliation import BilledEvent, Correction, RunFacts
    from metering.events import TokenUsage

__all__ = ["Change", "changes_of"]


class Change(NamedTuple):
    """One event more or less."""

    usage: UsageSum | None
    """Negative where it is taken back. None where it is not known what it would be billed on."""
    cost: Decimal | None
    """USD that the provider charges for it; None where no price is known."""
    is_billed: bool
    """Whether anybody pays for it."""


def changes_of(run: RunFacts, steps: Sequence[Correction], plan_version: int | None) -> list[Change]:
    """What the steps add to what is billed; where they change nothing, what taking the run back would.

    `plan_version` is the one that what is added would be billed on.
    """
    by_id: dict[UUID, BilledEvent] = {event.event_id: event for event in run.events}
    changes: list[Change] = []
    if not steps:  # a run that nobody can be billed for
        return [
            Change(None, _cost(model.provider, model.model, None, model.usage, model.started_at), False)
            for model in run.traced
        ]
    for step in steps:
        if step.action == "accept":
            changes += [_taken(event) for event in run.events]
        elif step.event_id is not None:
            event = by_id[step.event_id]
            changes.append(_taken(event))
            if step.action == "replace":
                paid = event.platform_paid
                cost = _cost(step.provider, step.model, event.service_tier, step.usage, event.occurred_at, paid=paid)
                row = _sum(
                    event.plan_version,
                    event.line,
                    step.provider,
                    step.model,
                    event.service_tier,
                    step.usage,
                    cost,
                    event.quantity,
                )
                changes.append(Change(row, cost, event.billable))
        else:
            assert step.occurred_at is not None
            cost = _cost(step.provider, step.model, None, step.usage, step.occurred_at)
            row = None
            if plan_version is not None and step.line is not None:
                row = _sum(plan_version, step.line, step.provider, step.model, None, step.usage, cost, Decimal(0))
            changes.append(Change(row, cost, True))
    return changes


def _taken(event: BilledEvent) -> Change:
    row = _sum(
        event.plan_version,
        event.line,
        event.provider,
        event.model,
        event.service_tier,
        event.usage,
        event.cost,
        event.quantity,
        sign=-1,
    )
    return Change(row, None if event.cost is None else -event.cost, event.billable)


def _sum(
    plan_version: int,
    line: str,
    provider: str | None,
    model: str | None,
    service_tier: str | None,
    usage: TokenUsage,
    cost: Decimal | None,
    quantity: Decimal,
    sign: int = 1,
) -> UsageSum:
    return UsageSum(
        plan_version=plan_version,
        line=line,
        provider=provider,
        model=model,
        service_tier=service_tier,
        requests=sign,
        quantity=sign * quantity,
        cost=sign * (cost or Decimal(0)),
        unpriced_requests=sign if cost is None else 0,
        **{name: sign * count for name, count in usage.to_dict().items()},
    )


def _cost(
    provider: str | None, model: str | None, tier: str | None, usage: TokenUsage, at: datetime, *, paid: bool = True
) -> Decimal | None:
    said = {"provider": provider, "model": model, "service_tier": tier, "occurred_at": at, "platform_paid": paid}
    return provider_cost({**said, **usage.to_dict()})
