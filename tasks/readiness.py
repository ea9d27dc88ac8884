"""What speaks against closing a period: usage that may still be on its way, or is not reconciled as its plan asks."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from datetime import timedelta
from typing import TYPE_CHECKING

import sqlalchemy as sa

from metering.clock import utc_now
from metering.errors import StoreUnavailable
from metering.ledger.schema import dead_letters, events, provider_pulls, reconciliations, verdicts
from metering.spool import Spool
from tasks.periods import plans_of
from tasks.warehouse import sql

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from metering.billing.closing import PeriodInputs
    from metering.ledger import Ledger
    from metering.settings import Settings

__all__ = ["obstacles"]


def obstacles(ledger: Ledger, settings: Settings, period: str, inputs: Sequence[PeriodInputs]) -> dict[str, list[str]]:
    """By account, why its period should not be closed now; accounts without a reason are left out.

    `inputs` are of one period, as it was loaded.
    """
    away = oldest_undrained = None
    try:
        oldest_undrained = _oldest_undrained(ledger, settings)
    except StoreUnavailable as exc:
        away = f"Redis cannot be asked what it has of it: {exc}"
    waiting = Spool(settings.spool).pending()
    with ledger.read() as connection:
        recorded = Counter({row[0]: int(row[1]) for row in connection.execute(_RECORDED, {"period": period})})
        dead = Counter(connection.execute(_DEAD, {"period": period}).scalars())
        unreconciled = _Reconciled(connection, period)
        found: dict[str, list[str]] = {}
        for each in inputs:
            reasons = [] if away is None else [away]
            if oldest_undrained is not None and oldest_undrained < each.period_end:
                reasons.append("Redis has calls of before its end that are not drained: `tallystick drain`")
            if waiting.oldest is not None and waiting.oldest < each.period_end:
                reasons.append(f"the spool {settings.spool} has what was recorded before its end: `tallystick drain`")
            if missing := recorded[each.account] - each.events:
                reasons.append(f"{missing:,} events are not loaded: `python -m flows aggregate-usage`")
            if letters := dead[each.account] + dead[None]:
                reasons.append(f"{letters:,} dead letters are open: `tallystick doctor`")
            reasons += unreconciled.reasons(each)
            if reasons:
                found[each.account] = reasons
    return found


_RECORDED = sa.text(sql("ledger_events_by_account"))
_DEAD = sa.select(dead_letters.c.account).where(
    dead_letters.c.resolved_at.is_(None),
    sa.or_(dead_letters.c.period.is_(None), dead_letters.c.period == sa.bindparam("period")),
)


def _oldest_undrained(ledger: Ledger, settings: Settings) -> datetime | None:
    """When the oldest call was admitted that Redis has and the ledger has not."""
    if settings.quota_url is None:
        return None
    from metering.admission.redis.link import Link  # noqa: PLC0415  jobs need no Redis elsewhere
    from metering.drain import Drain  # noqa: PLC0415

    with closing(Link(settings.quota_url, timeout_s=settings.quota_timeout_s)) as link:
        ages = [lag.oldest_s for lag in Drain(ledger, link).lag() if lag.oldest_s is not None]
    return utc_now() - timedelta(seconds=max(ages)) if ages else None  # an age is by the real clock


class _Reconciled:
    """What is known of a period's last reconciliation."""

    def __init__(self, connection: sa.Connection, period: str) -> None:
        self._connection = connection
        self._plans = plans_of(connection)
        newest = sa.select(reconciliations).where(reconciliations.c.period == period)
        self._last = connection.execute(newest.order_by(reconciliations.c.reconciliation.desc()).limit(1)).first()
        self._open: Counter[str | None] = Counter()
        if self._last is not None:
            self._open.update(
                connection.execute(
                    sa.select(verdicts.c.account).where(
                        verdicts.c.reconciliation == self._last.reconciliation,
                        verdicts.c.applied_at.is_(None),
                    )
                ).scalars()
            )

    def reasons(self, inputs: PeriodInputs) -> list[str]:
        """Why the period of an account is not reconciled as its plan asks."""
        asked = self._plans[inputs.plan_version].reconcile
        if asked == "none":
            return []
        job = f"`python -m flows reconcile-tokens --period {inputs.period}`"
        last = self._last
        if last is None or last.made_at < inputs.period_end:
            return [f"its plan asks for a reconciliation, and there is none since its end: {job}"]
        found = []
        if self._is_newer(inputs, last.events_to):
            found.append(f"its last reconciliation is older than some of its events: {job}")
        if differing := self._open[inputs.account]:
            apply = f"`python -m flows reconcile apply {last.reconciliation}`"
            found.append(f"{differing:,} runs differ, and nothing was decided of them: {apply}")
        if asked == "provider" and not self._is_reported(inputs):
            found.append("no provider's report of all its days was pulled: `python -m flows pull-reports`")
        return found

    def _is_newer(self, inputs: PeriodInputs, events_to: int) -> bool:
        marker: sa.ColumnElement[int] = events.c.seq
        if self._connection.dialect.name == "postgresql":
            marker = sa.literal_column("events.commit_xid", sa.BigInteger)
        newer = sa.select(events.c.seq).where(
            events.c.account == inputs.account, events.c.period == inputs.period, marker > events_to
        )
        return self._connection.execute(newer.limit(1)).first() is not None

    def _is_reported(self, inputs: PeriodInputs) -> bool:
        """Whether one provider's report has every UTC day of the period, and none that may still change."""
        first, last = inputs.period_start.date(), (inputs.period_end - timedelta(microseconds=1)).date()
        days = sa.select(provider_pulls.c.provider, provider_pulls.c.organization, sa.func.count()).where(
            provider_pulls.c.report == "usage",
            provider_pulls.c.day.between(str(first), str(last)),
            provider_pulls.c.provisional.is_(False),
        )
        grouped = days.group_by(provider_pulls.c.provider, provider_pulls.c.organization)
        return any(row[2] == (last - first).days + 1 for row in self._connection.execute(grouped))
