"""What was billed against what was traced: each run of a period judged, and what differs kept in the ledger."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal, localcontext
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from prefect import task

from metering.accounts import list_accounts
from metering.billing.judging import judge
from metering.billing.money import EXACT
from metering.billing.reconciliation import (
    BilledEvent,
    ExpiredHold,
    RunFacts,
    RunVerdict,
    Tolerance,
    TracedModel,
)
from metering.billing.stakes import Stakes
from metering.checks import MAX_TOKENS
from metering.corrections import standing
from metering.events import TOKEN_FIELDS, TokenUsage
from metering.ledger import Ledger, plan_versions, verdicts
from metering.ledger.schema import holds
from metering.windows import Window, period_of_month
from tasks.bills import INSTANT, usage_sums
from tasks.changes import changes_of
from tasks.models import canonical_model
from tasks.warehouse import open_for_reading, sql

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    import duckdb

    from metering.billing.invoices import UsageSum
    from metering.billing.reconciliation import Judgement
    from metering.ledger.plan_versions import PlanVersion

__all__ = ["is_asked_for", "reconcile", "reconcile_runs"]

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
    changes = changes_of(run, judgement.corrections, known.in_force.get(run.account or ""))
    costs = [change.cost for change in changes]
    stakes = None if run.account is None else _stakes(run.account, known, usage)
    billed = [change.usage for change in changes if change.is_billed]
    rows = [row for row in billed if row is not None]
    return RunVerdict(
        number=number,
        account=run.account,
        run_id=run.run_id,
        verdict=judgement.verdict,
        reason=judgement.reason,
        state=run.state,
        amount=stakes.amount(rows) if stakes is not None and len(rows) == len(billed) else None,
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
