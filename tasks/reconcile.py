"""What was billed against what was traced: each run of a period judged, and what differs kept in the ledger."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
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
    Stake,
    Tolerance,
    TracedModel,
)
from metering.checks import MAX_TOKENS
from metering.corrections import standing
from metering.events import TOKEN_FIELDS, TokenUsage
from metering.ledger import Ledger, plan_versions, verdicts
from metering.ledger.schema import holds
from metering.windows import Window, period_of_month
from tasks.changes import Change, Prices
from tasks.models import canonical_model
from tasks.periods import INSTANT, loaded
from tasks.warehouse import open_for_reading, sql

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence
    from pathlib import Path

    import duckdb

    from metering.billing.reconciliation import Judgement
    from metering.plans import Plan

__all__ = ["is_asked_for", "reconcile", "reconcile_runs"]

MOST_JUDGED = 50_000
"""Runs that are looked at one by one; where more differ, those of most tokens."""

QUIET = timedelta(hours=1)
"""A run that was heard of more recently may still be settled, or traced: it is judged the next time."""

ASKING = ("traces", "provider")
"""What a plan may say to be compared whether anything was traced or not."""

NEAR = timedelta(days=31)
"""Spans below others are looked for so long before and after a period."""

FEW_RUNS = 10
SAMPLED_SHARE = 20
"""More than a few runs, and more than one in so many, traced less than billed: tracing may leave calls out."""

_Run = tuple[str, str]
"""Account (empty where it is not known) and run."""


@task
def reconcile_runs(ledger_url: str, warehouse: Path, period: str, now: datetime, tolerance: Tolerance) -> int:
    """See `reconcile`."""
    return reconcile(ledger_url, warehouse, period, now=now, tolerance=tolerance)


def reconcile(ledger_url: str, warehouse: Path, period: str, *, now: datetime, tolerance: Tolerance) -> int:
    """Judge every run of the periods that start in a month; the number under which the ledger has the verdicts.

    Compared are the accounts whose plan asks for it, and those of which anything was traced. A run that was active in
    the period is judged over its whole life. Raises `WarehouseError`.
    """
    ledger = Ledger(ledger_url)
    try:
        with open_for_reading(warehouse) as connection, ledger.read() as facts_of, localcontext(EXACT):
            known = _Known.of(facts_of, period, now)
            _compare(connection, known, now, tolerance)
            counts = _counts(connection)
            facts = _facts(connection, known)
            usual_lines = dict(connection.execute(sql("usual_lines")).fetchall())
            prices = Prices(facts_of, now, lambda label: loaded(connection, label).usage)
            found: list[RunVerdict] = []
            changes: defaultdict[str, list[_Judged]] = defaultdict(list)
            for run in facts:
                line = usual_lines.get(run.account) or known.only_line(run.account)
                judgement = judge(run, tolerance, usual_line=line)
                counts[run.account or ""][judgement.verdict] += 1
                if judgement.verdict != "matched":
                    changed = prices.changes(run, judgement.corrections)
                    found.append(_verdict(run, judgement, changed, prices, period, len(found) + 1))
                    changes[run.account or ""].append((run, judgement, changed))
            stakes = {
                account: _stake(account, judged, prices, period, sum(counts[account].values()))
                for account, judged in changes.items()
            }
            events_to, spans_to = (
                int(connection.execute(f"SELECT coalesce(max(seq), 0) FROM {table}").fetchall()[0][0])  # noqa: S608
                for table in ("load_watermark", "span_watermark")
            )
        with ledger.write() as writing:
            return verdicts.record(
                writing,
                period=period,
                made_at=now,
                events_to=events_to,
                spans_to=spans_to,
                tolerance=tolerance,
                runs=counts,
                stakes=stakes,
                found=found,
            )
    finally:
        ledger.close()


def is_asked_for(ledger_url: str, period: str, now: datetime, *, by: Collection[str] = ASKING) -> bool:
    """Whether the plan of any account says that it is to be reconciled, with traces or with the provider as well."""
    ledger = Ledger(ledger_url)
    try:
        with ledger.read() as connection:
            return any(plan.reconcile in by for plan in _Known.of(connection, period, now).plans.values())
    finally:
        ledger.close()


@dataclass(kw_only=True)
class _Known:
    """What the ledger tells of a period's accounts, plans and holds."""

    period: str
    month: Window
    windows: dict[str, Window]
    """By account."""
    plans: dict[str, Plan]
    """By account, at the end of its period."""
    open_runs: dict[_Run, datetime]
    expired: defaultdict[_Run, list[ExpiredHold]]
    accepted: set[tuple[str, str, str]]
    """(account, run, state)."""

    @classmethod
    def of(cls, connection: sa.Connection, period: str, now: datetime) -> _Known:
        month = period_of_month(period, time_zone="UTC", anchor_day=1)
        known = cls(
            period=period,
            month=month,
            windows={},
            plans={},
            open_runs={},
            expired=defaultdict(list),
            accepted=verdicts.accepted(connection),
        )
        for account in list_accounts(connection, month.end):
            window = period_of_month(period, time_zone=account.time_zone, anchor_day=account.anchor_day)
            version = plan_versions.in_force(connection, account.account, window.end - INSTANT)
            assert version is not None
            known.windows[account.account] = window
            known.plans[account.account] = version.plan
        unsettled = sa.select(holds).where(holds.c.state.in_(["open", "expired"]), holds.c.run_id.is_not(None))
        for hold in connection.execute(unsettled):
            # Only the account's next admission would mark it.
            if hold.state == "open" and hold.expires_at > now:
                known.open_runs[hold.account, hold.run_id] = hold.admitted_at
            else:
                expired = ExpiredHold(hold_id=hold.hold_id, line=hold.line, admitted_at=hold.admitted_at)
                known.expired[hold.account, hold.run_id].append(expired)
        return known

    @property
    def asked(self) -> list[str]:
        """Accounts whose plan asks to be reconciled."""
        return [account for account, plan in self.plans.items() if plan.reconcile in ASKING]

    def only_line(self, account: str | None) -> str | None:
        """The one line on which the account's plan sells tokens."""
        if account is None:
            return None
        lines = {rate.line for rate in self.plans[account].rates if rate.metric not in ("requests", "quantity", None)}
        return lines.pop() if len(lines) == 1 and "*" not in lines else None


def _compare(connection: duckdb.DuckDBPyConnection, known: _Known, now: datetime, tolerance: Tolerance) -> None:
    """Leave in temporary tables what differs: first by a look at the period, then over the whole life of each run."""
    since = min([known.month.start, *(window.start for window in known.windows.values())])
    until = max([known.month.end, *(window.end for window in known.windows.values())])
    values = {
        "period": known.period,
        "since": since,
        "until": until,
        "near_since": since - NEAR,
        "near_until": until + NEAR,
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
    raw = [connection.execute(f"SELECT DISTINCT model FROM {table}").fetchall() for table in ("usage_events", "spans")]  # noqa: S608
    names = {model: canonical_model(None, model) or model for rows in raw for (model,) in rows if model is not None}
    numbers = {name: number for number, name in enumerate(sorted(set(names.values())), 1)}
    _fill(connection, "model_names", [(model, name, numbers[name]) for model, name in names.items()])
    held = [(*run, True, at) for run, at in known.open_runs.items()]
    held += [(*run, False, hold.admitted_at) for run, expired in known.expired.items() for hold in expired]
    _fill(connection, "held_runs", held)
    _fill(connection, "periods", [(account, window.start, window.end) for account, window in known.windows.items()])
    _fill(connection, "asked", [(account,) for account in known.asked])
    _fill(connection, "accepted", list(known.accepted))
    named = connection.execute("SELECT DISTINCT account FROM spans WHERE account IS NOT NULL").fetchall()
    _fill(connection, "strangers", [(account, True) for (account,) in named if account not in known.windows])
    for step in ("counted_spans", "reconcile", "reconcile_again", "counted_spans", "differing"):
        connection.execute(sql(step))


def _fill(connection: duckdb.DuckDBPyConnection, table: str, rows: Sequence[tuple[Any, ...]]) -> None:
    """Insert rows; column by column, because one by one they would take as long as the comparison."""
    columns = [list(column) for column in zip(*rows, strict=True)]
    if columns:
        unnested = ", ".join("unnest(?)" for _ in columns)
        connection.execute(f"INSERT INTO {table} SELECT {unnested}", columns)


def _counts(connection: duckdb.DuckDBPyConnection) -> defaultdict[str, defaultdict[str, int]]:
    """Runs by account and what is known of them without looking at each."""
    counts: defaultdict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
    for account, state, runs in connection.execute(sql("reconciled_runs")).fetchall():
        counts[account][state] += int(runs)
    return counts


def _facts(connection: duckdb.DuckDBPyConnection, known: _Known) -> list[RunFacts]:
    """Everything known of each run that is to be judged."""
    events: defaultdict[_Run, list[dict[str, Any]]] = defaultdict(list)
    for row in _rows(connection, "judged_events"):
        events[row["account"], row["run_id"]].append(row)
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
            )
        )
    payers: defaultdict[str, list[str]] = defaultdict(list)
    for run_id, account in connection.execute(sql("billed_accounts")).fetchall():
        payers[run_id].append(account)
    return [
        RunFacts(
            account=account or None,
            run_id=run_id,
            events=tuple(_standing(events[account, run_id])),
            traced=tuple(traced[account, run_id]),
            expired=tuple(known.expired.get((account, run_id), ())),
            state=state,
            billed_to=next((payer for payer in payers[run_id] if payer != account), None),
            period=known.period,
        )
        for account, run_id, state in connection.execute("FROM judged ORDER BY ALL").fetchall()
    ]


def _standing(rows: Sequence[dict[str, Any]]) -> Iterable[BilledEvent]:
    left = standing((row["event_id"], row["requests"]) for row in rows)
    for row in rows:
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
    run: RunFacts, judgement: Judgement, changes: Sequence[Change], prices: Prices, period: str, number: int
) -> RunVerdict:
    return RunVerdict(
        number=number,
        account=run.account,
        run_id=run.run_id,
        verdict=judgement.verdict,
        reason=judgement.reason,
        state=run.state,
        amount=None if run.account is None else prices.amount(run.account, changes),
        currency=None if run.account is None else prices.currency(run.account, period),
        cost=_cost(changes),
        evidence={
            "billed": [{"model": event.model, **event.usage.to_dict()} for event in run.events],
            "traced": [{"model": model.model, "calls": model.calls, **model.usage.to_dict()} for model in run.traced],
            "events": [str(event.event_id) for event in run.events],
            "holds": [str(hold.hold_id) for hold in run.expired],
        },
        corrections=judgement.corrections,
    )


_Judged = tuple[RunFacts, "Judgement", list[Change]]


def _stake(account: str, judged: Sequence[_Judged], prices: Prices, period: str, runs: int) -> Stake:
    """What the corrections of an account come to together; `runs` are all that were compared."""
    proven: list[Change] = []
    unproven: list[Change] = []
    cost = Decimal(0)
    unpriced = uncosted = less = 0
    for run, judgement, changes in judged:
        is_accepted = any(step.action == "accept" for step in judgement.corrections)
        traced = sum(model.usage.total_tokens for model in run.traced)
        less += 0 < traced < sum(event.usage.total_tokens for event in run.events)
        its_cost = _cost(changes)
        if its_cost is None:
            uncosted += 1
        elif judgement.corrections and not is_accepted:
            cost += its_cost
        if account and prices.amount(account, changes) is None:
            unpriced += 1
        elif judgement.corrections:
            (unproven if is_accepted else proven).extend(changes)
    return Stake(
        currency=prices.currency(account, period) if account else None,
        change=prices.amount(account, proven) or Decimal(0) if account else Decimal(0),
        unproven=-(prices.amount(account, unproven) or Decimal(0)) if account else Decimal(0),
        cost=cost,
        unpriced=unpriced,
        uncosted=uncosted,
        looks_sampled=less > max(FEW_RUNS, runs // SAMPLED_SHARE),
    )


def _cost(changes: Iterable[Change]) -> Decimal | None:
    """USD, of all together; None where one is not known."""
    costs = [change.cost for change in changes]
    return None if None in costs else sum((cost for cost in costs if cost is not None), Decimal(0))
