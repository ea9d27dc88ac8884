"""What the steps that are proposed for runs come to, as usage and as money."""

from __future__ import annotations

from collections import defaultdict
from decimal import Decimal
from typing import TYPE_CHECKING, NamedTuple

from metering.accounts import list_accounts
from metering.billing.invoices import UsageSum
from metering.billing.stakes import Stakes
from metering.ledger import plan_versions
from metering.windows import period_label, period_of_month, period_window
from tasks.costs import pricing
from tasks.periods import INSTANT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from datetime import datetime
    from uuid import UUID

    import sqlalchemy as sa

    from metering.billing.reconciliation import BilledEvent, Correction, RunFacts
    from metering.events import TokenUsage

__all__ = ["Change", "Prices"]


class Change(NamedTuple):
    """One event more or less."""

    period: str | None
    usage: UsageSum | None
    """Negative where it is taken back. None where it is not known what it would be billed on."""
    cost: Decimal | None
    """USD that the provider charges for it; None where no price is known."""
    is_billed: bool
    """Whether anybody pays for it."""


class Prices:
    """The prices of a ledger's plans and of providers. `usage_of` tells what is billed in a period, by account."""

    def __init__(
        self,
        connection: sa.Connection,
        now: datetime,
        usage_of: Callable[[str], Mapping[str, Sequence[UsageSum]]],
    ) -> None:
        self._connection = connection
        self._usage_of = usage_of
        self._usage: dict[str, Mapping[str, Sequence[UsageSum]]] = {}
        self._accounts = {account.account: account for account in list_accounts(connection, now)}
        self._plans = {version.plan_version: version.plan for version in plan_versions.versions(connection)}
        self._cost_of = pricing(connection)
        self._stakes: dict[tuple[str, str], Stakes] = {}

    def currency(self, account: str, period: str) -> str:
        """What an account is billed in."""
        return self._stakes_of(account, period).currency

    def amount(self, account: str, changes: Iterable[Change]) -> Decimal | None:
        """What they add together to what the account owes, exact; None where no price tells of one of them."""
        by_period: defaultdict[str, list[UsageSum]] = defaultdict(list)
        for change in changes:
            if not change.is_billed:
                continue
            if change.usage is None or change.period is None:
                return None
            by_period[change.period].append(change.usage)
        amounts = [self._stakes_of(account, period).amount(rows) for period, rows in by_period.items()]
        return None if None in amounts else sum((amount for amount in amounts if amount is not None), Decimal(0))

    def changes(self, run: RunFacts, steps: Sequence[Correction]) -> list[Change]:
        """What the steps add to what is billed; where they change nothing, what taking the run back would."""
        by_id: dict[UUID, BilledEvent] = {event.event_id: event for event in run.events}
        changes: list[Change] = []
        if not steps:  # a run that nobody can be billed for
            return [
                Change(None, None, self._cost(model.provider, model.model, None, model.usage, model.started_at), False)
                for model in run.traced
            ]
        for step in steps:
            if step.action == "accept":
                changes += [_taken(event) for event in run.events]
            elif step.event_id is None:
                changes.append(self._added(run.account, step))
            else:
                event = by_id[step.event_id]
                changes.append(_taken(event))
                if step.action == "replace":
                    changes.append(self._replaced(event, step))
        return changes

    def _replaced(self, event: BilledEvent, step: Correction) -> Change:
        model, provider = step.model or event.model, step.provider or event.provider
        cost = self._cost(
            provider,
            model,
            event.service_tier,
            step.usage,
            event.occurred_at,
            plan_version=event.plan_version,
            platform_paid=event.platform_paid,
        )
        row = _row(
            event.plan_version, event.line, provider, model, event.service_tier, step.usage, cost, event.quantity
        )
        return Change(event.period, row, cost, event.billable)

    def _added(self, account: str | None, step: Correction) -> Change:
        assert step.occurred_at is not None
        known = None if account is None else self._accounts.get(account)
        if known is None or step.line is None:
            cost = self._cost(step.provider, step.model, None, step.usage, step.occurred_at)
            return Change(None, None, cost, True)
        in_force = plan_versions.in_force(self._connection, known.account, step.occurred_at)
        assert in_force is not None
        window = period_window(step.occurred_at, time_zone=known.time_zone, anchor_day=known.anchor_day)
        cost = self._cost(
            step.provider,
            step.model,
            None,
            step.usage,
            step.occurred_at,
            plan_version=in_force.plan_version,
            platform_paid=step.platform_paid,
        )
        row = _row(in_force.plan_version, step.line, step.provider, step.model, None, step.usage, cost, Decimal(0))
        return Change(period_label(window, known.time_zone), row, cost, step.billable)

    def _cost(
        self,
        provider: str | None,
        model: str | None,
        service_tier: str | None,
        usage: TokenUsage,
        at: datetime,
        *,
        plan_version: int | None = None,
        platform_paid: bool = True,
    ) -> Decimal | None:
        event = {
            **usage.to_dict(),
            "provider": provider,
            "model": model,
            "service_tier": service_tier,
            "occurred_at": at,
            "plan_version": plan_version,
            "platform_paid": platform_paid,
        }
        return self._cost_of(event)[0]

    def _stakes_of(self, account: str, period: str) -> Stakes:
        if (account, period) not in self._stakes:
            if period not in self._usage:
                self._usage[period] = self._usage_of(period)
            known = self._accounts[account]
            window = period_of_month(period, time_zone=known.time_zone, anchor_day=known.anchor_day)
            in_force = plan_versions.in_force(self._connection, account, window.end - INSTANT)
            assert in_force is not None
            usage = self._usage[period].get(account, ())
            self._stakes[account, period] = Stakes(self._plans, usage, in_force.plan_version)
        return self._stakes[account, period]


def _taken(event: BilledEvent) -> Change:
    row = _row(
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
    return Change(event.period, row, None if event.cost is None else -event.cost, event.billable)


def _row(
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
