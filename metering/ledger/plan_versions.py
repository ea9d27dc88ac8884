"""Plans in the ledger: immutable versions, each in force from a moment on."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import msgspec
import sqlalchemy as sa

from metering.errors import Conflict, UnknownPlan
from metering.ledger import admin_log, outbox
from metering.ledger.archived import has_archives
from metering.ledger.locks import hold_still
from metering.ledger.schema import account_plans, closes, events, plan_versions
from metering.plans import BUILT_IN, Plan

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["EVER", "PlanVersion", "apply", "assigned_plan", "ensure", "in_force", "versions"]

EVER = datetime(1970, 1, 1, tzinfo=UTC)
"""When the first version of a plan, and the first plan of an account, began: before any usage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanVersion:
    """One immutable version of a plan."""

    plan_version: int
    """Unique over all plans; events carry it."""
    version: int
    """Counts from 1 for each plan."""
    effective_from: datetime
    plan: Plan


def versions(connection: sa.Connection, plan: str | None = None) -> list[PlanVersion]:
    """Every version, of one plan or of all, oldest first."""
    query = sa.select(plan_versions).order_by(plan_versions.c.version)
    if plan is not None:
        query = query.where(plan_versions.c.plan == plan)
    # By the name here, not there: databases differ in how they sort text.
    rows = sorted(connection.execute(query), key=lambda row: row.plan)
    return [
        PlanVersion(
            plan_version=row.plan_version,
            version=row.version,
            effective_from=row.effective_from,
            plan=Plan.from_dict(row.plan, msgspec.json.decode(row.document)),
        )
        for row in rows
    ]


def in_force(connection: sa.Connection, account: str, at: datetime) -> PlanVersion | None:
    """The version an account is on at a moment; None for an account that is not known."""
    name = assigned_plan(connection, account, at)
    if name is None:
        return None
    candidates = [version for version in versions(connection, name) if version.effective_from <= at]
    return max(candidates, key=_precedence)


def assigned_plan(connection: sa.Connection, account: str, at: datetime) -> str | None:
    """The name of the plan an account is on at a moment."""
    return connection.execute(
        sa.select(account_plans.c.plan)
        .where(account_plans.c.account == account, account_plans.c.effective_from <= at)
        .order_by(account_plans.c.effective_from.desc())
        .limit(1)
    ).scalar()


def ensure(connection: sa.Connection, plan: str, *, now: datetime, actor: str) -> None:
    """Make sure a plan has a version, writing a built-in one at its first use. Raises `UnknownPlan`."""
    known = set(connection.execute(sa.select(plan_versions.c.plan).distinct()).scalars())
    if plan in known:
        return
    if plan not in BUILT_IN:
        raise UnknownPlan(plan, sorted(known | BUILT_IN.keys()))
    _write(connection, BUILT_IN[plan], 1, EVER, now, actor)


def apply(
    connection: sa.Connection,
    plans: Iterable[Plan],
    *,
    now: datetime,
    actor: str,
    effective_from: datetime | None = None,
) -> list[PlanVersion]:
    """Write a new version of each plan that differs from the one then in force; returns those written.

    A first version is in force since ever, a later one from `effective_from` (now unless said) on. Raises `Conflict`
    where usage since then is recorded already: it keeps the version it was recorded under. And where a period is closed
    that ends later, of an account that was on the plan: what comes late for it is billed at that period's own prices.
    """
    plans = list(plans)
    names = [plan.name for plan in plans]
    hold_still(connection, sa.select(account_plans.c.account).where(account_plans.c.plan.in_(names)))
    written = []
    for plan in plans:
        known = versions(connection, plan.name)
        begins = EVER if not known else effective_from or now
        earlier = [version for version in known if version.effective_from <= begins]
        if earlier and max(earlier, key=_precedence).plan.digest == plan.digest:
            continue
        if known and begins < now:
            _refuse_recorded(connection, plan.name, known, begins)
            _refuse_closed(connection, plan.name, begins)
        written.append(_write(connection, plan, len(known) + 1, begins, now, actor))
    if written and _assigned(connection, written):
        outbox.note(connection, None, now=now)
    return written


def _assigned(connection: sa.Connection, written: list[PlanVersion]) -> bool:
    names = [version.plan.name for version in written]
    query = sa.select(account_plans.c.account).where(account_plans.c.plan.in_(names)).limit(1)
    return connection.execute(query).first() is not None


def _precedence(version: PlanVersion) -> tuple[datetime, int]:
    return version.effective_from, version.version


def _refuse_recorded(connection: sa.Connection, plan: str, known: list[PlanVersion], begins: datetime) -> None:
    recorded = connection.execute(
        sa.select(sa.func.count())
        .select_from(events)
        .where(events.c.plan_version.in_([version.plan_version for version in known]), events.c.occurred_at >= begins)
    ).scalar()
    ever_on_it = sa.select(account_plans.c.account).where(account_plans.c.plan == plan)
    if has_archives(connection, ever_on_it, begins):
        raise Conflict(
            f"plan {plan!r} may have events since {begins.isoformat()} that are archived, recorded under an earlier "
            "version: apply it from now on"
        )
    if recorded:
        raise Conflict(
            f"plan {plan!r} has {recorded} events since {begins.isoformat()}, recorded under an earlier version: "
            "apply it from now on, or before importing usage of that time"
        )


def _refuse_closed(connection: sa.Connection, plan: str, begins: datetime) -> None:
    on_it = sa.and_(account_plans.c.account == closes.c.account, account_plans.c.effective_from < closes.c.period_end)
    query = sa.select(closes.c.account, closes.c.period, closes.c.period_end).join(account_plans, on_it)
    query = query.where(account_plans.c.plan == plan, closes.c.period_end > begins)
    found = connection.execute(query.order_by(closes.c.period_end.desc(), closes.c.close).limit(1)).first()
    if found is not None:
        raise Conflict(
            f"plan {plan!r} has account {found.account!r}, whose period {found.period} is closed, under an earlier "
            f"version: apply it from {found.period_end.isoformat()} on, or later"
        )


def _write(
    connection: sa.Connection, plan: Plan, version: int, effective_from: datetime, now: datetime, actor: str
) -> PlanVersion:
    result = connection.execute(
        plan_versions.insert().values(
            plan=plan.name,
            version=version,
            effective_from=effective_from,
            digest=plan.digest,
            document=msgspec.json.encode(plan.to_dict(), order="sorted").decode(),
            created_at=now,
        )
    )
    assert result.inserted_primary_key is not None
    admin_log.note(
        connection,
        at=now,
        actor=actor,
        action="plan.apply",
        subject=plan.name,
        version=version,
        effective_from=effective_from,
        digest=plan.digest,
    )
    plan_version = int(result.inserted_primary_key[0])
    return PlanVersion(plan_version=plan_version, version=version, effective_from=effective_from, plan=plan)
