"""What was billed against what was traced: each run of a period judged, and what differs kept in the ledger."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal, localcontext
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from prefect import task

from metering.accounts import list_accounts
from metering.billing.invoices import UsageSum
from metering.billing.money import EXACT
from metering.billing.reconciliation import (
    BilledEvent,
    ExpiredHold,
    Reconciliation,
    RunFacts,
    RunVerdict,
    Tolerance,
    TracedModel,
    judge,
)
from metering.billing.stakes import Stakes
from metering.checks import MAX_TOKENS
from metering.corrections import apply_verdict, standing
from metering.errors import CorrectionConflict
from metering.events import TOKEN_FIELDS, TokenUsage
from metering.ledger import Ledger, admin_log, plan_versions, verdicts
from metering.ledger.schema import holds
from metering.windows import Window, period_of_month
from reports.reconciliation import (
    corrections_csv,
    corrections_json,
    providers_csv,
    reconciliation_html,
    verdicts_csv,
)
from tasks.bills import INSTANT, usage_sums
from tasks.costs import provider_cost
from tasks.models import canonical_model
from tasks.out import period_folder, write_file
from tasks.provider_side import provider_days
from tasks.warehouse import open_for_reading, sql

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path
    from uuid import UUID

    import duckdb

    from metering.billing.reconciliation import Judgement
    from metering.ledger.plan_versions import PlanVersion
    from metering.providers.reports import ProviderDay

__all__ = [
    "Found",
    "Outcome",
    "apply_reconciliation",
    "is_asked_for",
    "reconcile",
    "reconcile_runs",
    "write_reconciliation",
]

MOST_JUDGED = 50_000
"""Runs that are looked at one by one; where more differ, those of most tokens."""

QUIET = timedelta(hours=1)
"""A run that was heard of more recently may still be settled, or traced: it is judged the next time."""

LONGEST_RUN = timedelta(days=31)
"""Spans are looked for so long before and after a period."""

_Run = tuple[str, str]
"""Account (empty where it is not known) and run."""


@task
def reconcile_runs(ledger_url: str, warehouse: Path, period: str, now: datetime, tolerance: Tolerance) -> int:
    """See `reconcile`."""
    return reconcile(ledger_url, warehouse, period, now=now, tolerance=tolerance)


def reconcile(ledger_url: str, warehouse: Path, period: str, *, now: datetime, tolerance: Tolerance) -> int:
    """Judge every run of the periods that start in a month; the number under which the ledger has the verdicts.

    Compared are the accounts whose plan asks for it, and those of which anything was traced. Raises `WarehouseError`.
    """
    ledger = Ledger(ledger_url)
    try:
        with ledger.read() as connection:
            known = _Known.of(connection, period)
        with open_for_reading(warehouse) as connection:
            _compare(connection, known, now, tolerance)
            counts = _counts(connection)
            facts = _facts(connection, known)
            usual_lines = dict(connection.execute(sql("usual_lines")).fetchall())
            usage = usage_sums(connection, period)
            events_to, spans_to = (
                int(connection.execute(f"SELECT coalesce(max(seq), 0) FROM {table}").fetchall()[0][0])  # noqa: S608
                for table in ("load_watermark", "span_watermark")
            )
        found: list[RunVerdict] = []
        with localcontext(EXACT):
            for run in facts:
                line = usual_lines.get(run.account) or known.only_line(run.account)
                judgement = judge(run, tolerance, usual_line=line)
                stands = (run.account, run.run_id, judgement.verdict, run.state) in known.accepted
                counts[run.account or ""]["accepted" if stands else judgement.verdict] += 1
                if judgement.verdict != "matched" and not stands:
                    found.append(_verdict(run, judgement, known, usage, len(found) + 1))
        with ledger.write() as connection:
            return verdicts.record(
                connection,
                period=period,
                made_at=now,
                events_to=events_to,
                spans_to=spans_to,
                tolerance=tolerance,
                runs=counts,
                found=found,
            )
    finally:
        ledger.close()


def is_asked_for(ledger_url: str, period: str) -> bool:
    """Whether the plan of any account asks for its runs to be reconciled."""
    ledger = Ledger(ledger_url)
    try:
        with ledger.read() as connection:
            return bool(_Known.of(connection, period).asked)
    finally:
        ledger.close()


@task
def write_reconciliation(ledger_url: str, warehouse: Path, out: Path, number: int) -> Found:
    """Write a reconciliation's page and files to review under `out`, with what providers report of the same days.

    Raises `UnknownReconciliation`, `WarehouseError`, `ReportError`.
    """
    reconciliation, verdicts_found = _read(ledger_url, number)
    month = period_of_month(reconciliation.period, time_zone="UTC", anchor_day=1)
    with open_for_reading(warehouse) as connection:
        days = provider_days(ledger_url, connection, month.start.date(), month.end.date())
    files = {
        "reconciliation.html": reconciliation_html(reconciliation, verdicts_found, days),
        "reconciliation.csv": verdicts_csv(reconciliation, verdicts_found),
        "corrections.csv": corrections_csv(reconciliation, verdicts_found),
        "corrections.json": corrections_json(reconciliation, verdicts_found),
        "providers.csv": providers_csv(days),
    }
    with period_folder(out, reconciliation.period) as folder:
        for name, content in files.items():
            write_file(folder / name, content)
    return Found(
        page=folder / "reconciliation.html",
        reconciliation=reconciliation,
        verdicts=verdicts_found,
        provider_days=days,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a reconciliation says, and where."""

    page: Path
    reconciliation: Reconciliation
    verdicts: list[RunVerdict]
    provider_days: list[ProviderDay]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of the corrections of a reconciliation, in runs."""

    booked: int = 0
    booked_before: int = 0
    refused: tuple[str, ...] = ()
    """Why each other one was not booked."""


def apply_reconciliation(ledger_url: str, number: int, *, actor: str, now: datetime) -> Outcome:
    """Book all that a reconciliation proposes, each run in a transaction of its own; a run once, whatever is killed.

    Raises `UnknownReconciliation`.
    """
    _, found = _read(ledger_url, number)
    booked, refused = Counter[bool](), []
    ledger = Ledger(ledger_url)
    try:
        for verdict in found:
            if verdict.applied_at is not None:
                booked[False] += 1
                continue
            try:
                booked[apply_verdict(ledger, verdict, reconciliation=number, actor=actor, now=now)] += 1
            except CorrectionConflict as exc:
                refused.append(str(exc))
        if booked[True]:
            with ledger.write() as connection:
                admin_log.note(
                    connection,
                    at=now,
                    actor=actor,
                    action="reconciliation.apply",
                    subject=str(number),
                    booked=booked[True],
                    refused=len(refused),
                )
    finally:
        ledger.close()
    return Outcome(booked=booked[True], booked_before=booked[False], refused=tuple(refused))


def _read(ledger_url: str, number: int) -> tuple[Reconciliation, list[RunVerdict]]:
    ledger = Ledger(ledger_url)
    try:
        with ledger.read() as connection:
            return verdicts.find(connection, number), verdicts.verdicts_of(connection, number)
    finally:
        ledger.close()


@dataclass(kw_only=True)
class _Known:
    """What the ledger tells of a period's accounts, plans and holds."""

    period: str
    month: Window
    windows: dict[str, Window]
    """By account."""
    asked: list[str]
    """Accounts whose plan asks to be reconciled."""
    in_force: dict[str, int]
    """Account -> plan version at the end of its period."""
    plans: dict[int, PlanVersion]
    open_runs: dict[_Run, datetime]
    expired: dict[_Run, list[ExpiredHold]]
    accepted: set[tuple[str | None, str, str, str]]
    stakes: dict[str, Stakes] = field(default_factory=dict)

    @classmethod
    def of(cls, connection: sa.Connection, period: str) -> _Known:
        month = period_of_month(period, time_zone="UTC", anchor_day=1)
        known = cls(
            period=period,
            month=month,
            windows={},
            asked=[],
            in_force={},
            plans={version.plan_version: version for version in plan_versions.versions(connection)},
            open_runs={},
            expired=defaultdict(list),
            accepted=verdicts.accepted(connection, period),
        )
        for account in list_accounts(connection, month.end):
            window = period_of_month(period, time_zone=account.time_zone, anchor_day=account.anchor_day)
            version = plan_versions.in_force(connection, account.account, window.end - INSTANT)
            assert version is not None
            known.windows[account.account] = window
            known.in_force[account.account] = version.plan_version
            if version.plan.reconcile != "none":
                known.asked.append(account.account)
        left = sa.select(holds).where(holds.c.state.in_(["open", "expired"]), holds.c.run_id.is_not(None))
        for hold in connection.execute(left.where(holds.c.admitted_at.between(known.since, known.until))):
            if hold.state == "open":
                known.open_runs[hold.account, hold.run_id] = hold.admitted_at
            else:
                expired = ExpiredHold(hold_id=hold.hold_id, line=hold.line, admitted_at=hold.admitted_at)
                known.expired[hold.account, hold.run_id].append(expired)
        return known

    @property
    def since(self) -> datetime:
        return self.month.start - LONGEST_RUN

    @property
    def until(self) -> datetime:
        return max([self.month.end, *(window.end for window in self.windows.values())]) + LONGEST_RUN

    def only_line(self, account: str | None) -> str | None:
        """The one line on which the account's plan sells tokens."""
        if account not in self.in_force:
            return None
        rates = self.plans[self.in_force[account]].plan.rates
        lines = {rate.line for rate in rates if rate.metric not in ("requests", "quantity", None)}
        return lines.pop() if len(lines) == 1 and "*" not in lines else None


def _compare(connection: duckdb.DuckDBPyConnection, known: _Known, now: datetime, tolerance: Tolerance) -> None:
    """Run `reconcile.sql`, which leaves its answers in temporary tables."""
    values = {
        "period": known.period,
        "earliest_period": f"{known.month.start - timedelta(days=1):%Y-%m}",
        "latest_period": f"{known.month.end:%Y-%m}",
        "since": known.since,
        "until": known.until,
        "month_start": known.month.start,
        "month_end": known.month.end,
        "quiet_since": now - QUIET,
        "tolerance_tokens": tolerance.tokens,
        "tolerance_percent": float(tolerance.percent),
        "most_judged": MOST_JUDGED,
    }
    for name, value in values.items():
        connection.execute(f"SET VARIABLE {name} = $value", {"value": value})
    connection.execute(sql("reconcile_tables"))
    raw = connection.execute("SELECT model FROM usage_events UNION SELECT model FROM spans").fetchall()
    names = {model: canonical_model(None, model) or model for (model,) in raw if model is not None}
    numbers = {name: number for number, name in enumerate(sorted(set(names.values())), 1)}
    _fill(connection, "model_names", [(model, name, numbers[name]) for model, name in names.items()])
    held = [(*run, True, at) for run, at in known.open_runs.items()]
    held += [(*run, False, hold.admitted_at) for run, expired in known.expired.items() for hold in expired]
    _fill(connection, "held_runs", held)
    _fill(connection, "periods", [(account, window.start, window.end) for account, window in known.windows.items()])
    _fill(connection, "asked", [(account,) for account in known.asked])
    connection.execute(sql("reconcile"))


def _fill(connection: duckdb.DuckDBPyConnection, table: str, rows: Sequence[tuple[Any, ...]]) -> None:
    if rows:
        connection.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(rows[0]))})", rows)  # noqa: S608


def _counts(connection: duckdb.DuckDBPyConnection) -> defaultdict[str, defaultdict[str, int]]:
    """Runs by account and what is known of them without looking at each."""
    counts: defaultdict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
    for account, state, runs in connection.execute(sql("reconciled_runs")).fetchall():
        counts[account][state] += int(runs)
    return counts


def _facts(connection: duckdb.DuckDBPyConnection, known: _Known) -> list[RunFacts]:
    """Everything known of each run that is to be judged."""
    events: defaultdict[_Run, list[tuple[dict[str, Any], int]]] = defaultdict(list)
    for row in _rows(connection, "judged_events"):
        events[row["account"], row["run_id"]].append((row, row["requests"]))
    traced: defaultdict[_Run, list[TracedModel]] = defaultdict(list)
    for row in _rows(connection, "judged_spans"):
        traced[row["account"], row["run_id"]].append(
            TracedModel(
                provider=row["provider"],
                model=row["model"],
                known_as=row["known_as"],
                usage=_usage(row),
                calls=row["calls"],
                started_at=row["started_at"].astimezone(UTC),
                ended_at=row["ended_at"].astimezone(UTC),
            )
        )
    return [
        RunFacts(
            account=account or None,
            run_id=run_id,
            events=tuple(_standing(events[account, run_id])),
            traced=tuple(traced[account, run_id]),
            expired=tuple(known.expired.get((account, run_id), ())),
        )
        for account, run_id in connection.execute("SELECT account, run_id FROM judged ORDER BY ALL").fetchall()
    ]


def _standing(rows: Sequence[tuple[dict[str, Any], int]]) -> Iterable[BilledEvent]:
    left = standing((row["event_id"], requests) for row, requests in rows)
    for row, _ in rows:
        if row["event_id"] in left:
            named = {name: row[name] for name in BilledEvent.__slots__ if name != "usage"}
            yield BilledEvent(**named | {"occurred_at": row["occurred_at"].astimezone(UTC)}, usage=_usage(row))


def _usage(row: dict[str, Any]) -> TokenUsage:
    """Counts of a row; sums above what an event can have are cut to it, and differ all the same."""
    return TokenUsage(**{name: min(int(row[name]), MAX_TOKENS) for name in TOKEN_FIELDS})


def _rows(connection: duckdb.DuckDBPyConnection, query: str) -> list[dict[str, Any]]:
    result = connection.execute(sql(query))
    names = [column[0] for column in result.description or ()]
    return [dict(zip(names, row, strict=True)) for row in result.fetchall()]


def _verdict(
    run: RunFacts, judgement: Judgement, known: _Known, usage: dict[str, list[UsageSum]], number: int
) -> RunVerdict:
    changes = _changes(run, judgement, known)
    costs = [cost for _, cost, _ in changes]
    stakes = None if run.account is None else _stakes(run.account, known, usage)
    billable = [row for row, _, is_billable in changes if is_billable]
    rows = [row for row in billable if row is not None]
    return RunVerdict(
        number=number,
        account=run.account,
        run_id=run.run_id,
        verdict=judgement.verdict,
        reason=judgement.reason,
        state=run.state,
        amount=stakes.amount(rows) if stakes is not None and len(rows) == len(billable) else None,
        currency=None if stakes is None else stakes.currency,
        cost=None if None in costs else sum((cost for cost in costs if cost is not None), Decimal(0)),
        evidence={
            "billed": [{"model": event.model, **event.usage.to_dict()} for event in run.events],
            "traced": [{"model": model.model, "calls": model.calls, **model.usage.to_dict()} for model in run.traced],
            "events": [str(event.event_id) for event in run.events],
            "holds": [str(hold.hold_id) for hold in run.expired],
        },
        corrections=judgement.corrections,
    )


def _stakes(account: str, known: _Known, usage: dict[str, list[UsageSum]]) -> Stakes:
    if account not in known.stakes:
        plans = {number: version.plan for number, version in known.plans.items()}
        known.stakes[account] = Stakes(plans, usage.get(account, []), known.in_force[account])
    return known.stakes[account]


_Change = tuple[UsageSum | None, Decimal | None, bool]
"""What is billed more (None: it is not known on which plan), its cost in USD, and whether anybody pays for it."""


def _changes(run: RunFacts, judgement: Judgement, known: _Known) -> list[_Change]:
    """What the corrections add to what is billed; where they change nothing, what taking the run back would."""
    by_id: dict[UUID, BilledEvent] = {event.event_id: event for event in run.events}
    changes: list[_Change] = []
    steps = judgement.corrections
    if not steps:  # a run that nobody can be billed for
        return [
            (None, _cost(model.provider, model.model, None, model.usage, model.started_at), False)
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
                changes.append((row, cost, event.billable))
        else:
            assert step.occurred_at is not None
            cost = _cost(step.provider, step.model, None, step.usage, step.occurred_at)
            version = known.in_force.get(run.account or "")
            row = None
            if version is not None and step.line is not None:
                row = _sum(version, step.line, step.provider, step.model, None, step.usage, cost, Decimal(0))
            changes.append((row, cost, True))
    return changes


def _taken(event: BilledEvent) -> _Change:
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
    return row, None if event.cost is None else -event.cost, event.billable


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
