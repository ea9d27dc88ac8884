"""A reconciliation as a page for people, and as files to review before anything is booked."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from metering.billing.reconciliation import VERDICTS, Stake
from metering.events import TOKEN_FIELDS
from metering.providers.reports import ALL_MODELS, COUNTS
from reports.formats import cell, exact_sum, number, plain
from reports.pages import page

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from metering.billing.reconciliation import Correction, Reconciliation, RunVerdict
    from metering.providers.reports import Counts, ProviderDay

__all__ = [
    "corrections_csv",
    "corrections_json",
    "providers_csv",
    "reconciliation_html",
    "summary_markdown",
    "verdict_rows",
    "verdicts_csv",
]

SHOWN = 500
"""Runs on the page, those of most money first; the CSV has all."""

NO_REPORTS = "A plan asks for what providers report, and no day of it was pulled: run `python -m flows pull-reports`"

OTHER_STATES = ("accepted", "pending", "not judged")

VERDICT_COLUMNS = (
    "reconciliation",
    "number",
    "verdict",
    "account",
    "run_id",
    "billed_tokens",
    "traced_tokens",
    "amount",
    "currency",
    "cost_usd",
    "reason",
    "events",
    "holds",
)
PROVIDER_COLUMNS = (
    "day",
    "provider",
    "model",
    "agrees",
    "provisional",
    *(f"{side}_{name}" for name in COUNTS for side in ("our", "their")),
    "our_cost_usd",
    "their_cost_usd",
    "our_unpriced_requests",
)
CORRECTION_COLUMNS = (
    "reconciliation",
    "number",
    "verdict",
    "account",
    "run_id",
    "action",
    "event_id",
    "line",
    "provider",
    "model",
    *TOKEN_FIELDS,
    "occurred_at",
    "reason",
    "evidence",
)


def reconciliation_html(
    reconciliation: Reconciliation,
    found: Sequence[RunVerdict],
    days: Sequence[ProviderDay] = (),
    *,
    is_missing: bool = False,
) -> str:
    """One self-contained page: what agrees, what does not, the money at stake and in which runs, and the providers.

    `is_missing` tells that a plan asks for what providers report, of which no `days` were pulled.
    """
    total = Counter(reconciliation.totals())
    runs = sorted(found, key=_by_money)
    return page(
        "reconciliation.html",
        reconciliation=reconciliation,
        total=total,
        differing=sum(total[name] for name in VERDICTS if name != "matched") + total["not judged"],
        verdicts=[name for name in VERDICTS if name != "matched"],
        others=[name for name in OTHER_STATES if total[name]],
        totals=_totals(reconciliation),
        cost=exact_sum(stake.cost for stake in reconciliation.stakes.values()),
        unpriced=sum(stake.unpriced for stake in reconciliation.stakes.values()),
        uncosted=sum(stake.uncosted for stake in reconciliation.stakes.values()),
        sampled=sorted(account for account, stake in reconciliation.stakes.items() if stake.looks_sampled),
        accounts=_accounts(reconciliation),
        runs=[(verdict, billed_tokens(verdict), traced_tokens(verdict), _steps(verdict)) for verdict in runs[:SHOWN]],
        left_out=len(runs) - SHOWN,
        days=days,
        days_off=[(day, _tokens_said(day.ours), _tokens_said(day.theirs)) for day in days if not day.agrees][:SHOWN],
        all_models=ALL_MODELS,
        missing=NO_REPORTS if is_missing else None,
    )


def _tokens_said(counts: Counts) -> int | None:
    return None if counts.input_tokens is None else counts.input_tokens + (counts.output_tokens or 0)


def _by_money(verdict: RunVerdict) -> tuple[Decimal, Decimal, int]:
    zero = Decimal(0)
    return -abs(verdict.cost or zero), -abs(verdict.amount or zero), verdict.number


def verdicts_csv(reconciliation: Reconciliation, found: Iterable[RunVerdict]) -> str:
    """A row for each run that differs, under `VERDICT_COLUMNS`."""
    return _csv(
        VERDICT_COLUMNS,
        (
            (
                str(reconciliation.number),
                str(verdict.number),
                verdict.verdict,
                cell(verdict.account),
                cell(verdict.run_id),
                str(billed_tokens(verdict)),
                str(traced_tokens(verdict)),
                _plain(verdict.amount),
                verdict.currency or "",
                _plain(verdict.cost),
                cell(verdict.reason),
                " ".join(verdict.evidence["events"]),
                " ".join(verdict.evidence["holds"]),
            )
            for verdict in found
        ),
    )


def corrections_csv(reconciliation: Reconciliation, found: Iterable[RunVerdict]) -> str:
    """A row for each step that is proposed, under `CORRECTION_COLUMNS`; with the counts that are billed after it."""
    return _csv(
        CORRECTION_COLUMNS,
        (
            (
                str(reconciliation.number),
                str(verdict.number),
                verdict.verdict,
                cell(verdict.account),
                cell(verdict.run_id),
                step.action,
                "" if step.event_id is None else str(step.event_id),
                cell(step.line),
                cell(step.provider),
                cell(step.model),
                *("" if step.action == "accept" else str(count) for count in step.usage.counts()),
                "" if step.occurred_at is None else step.occurred_at.isoformat(),
                cell(verdict.reason),
                json.dumps(verdict.evidence, sort_keys=True),
            )
            for verdict in found
            for step in verdict.corrections
        ),
    )


def providers_csv(days: Iterable[ProviderDay]) -> str:
    """A row for each day and model that a provider reports, under `PROVIDER_COLUMNS`; `*` is all models of the day."""
    return _csv(
        PROVIDER_COLUMNS,
        (
            (
                day.day.isoformat(),
                cell(day.provider),
                cell(day.model),
                "yes" if day.agrees else "no",
                "yes" if day.provisional else "no",
                *(
                    "" if getattr(counts, name) is None else str(getattr(counts, name))
                    for name in COUNTS
                    for counts in (day.ours, day.theirs)
                ),
                _plain(day.our_cost),
                _plain(day.their_cost),
                str(day.unpriced_requests),
            )
            for day in days
        ),
    )


def corrections_json(reconciliation: Reconciliation, found: Iterable[RunVerdict]) -> str:
    """The same as one document: each run with its reason, evidence, money at stake, and steps."""
    document = {
        "reconciliation": reconciliation.number,
        "period": reconciliation.period,
        "made_at": reconciliation.made_at.isoformat(),
        "tolerance": {
            "tokens": reconciliation.tolerance.tokens,
            "percent": plain(reconciliation.tolerance.percent),
        },
        "runs": reconciliation.runs,
        "stakes": {
            account: {
                "currency": stake.currency,
                "change": plain(stake.change),
                "unproven": plain(stake.unproven),
                "cost_usd": plain(stake.cost),
                "unpriced_runs": stake.unpriced,
                "uncosted_runs": stake.uncosted,
                "looks_sampled": stake.looks_sampled,
            }
            for account, stake in reconciliation.stakes.items()
        },
        "differing": [
            {
                "number": verdict.number,
                "verdict": verdict.verdict,
                "account": verdict.account,
                "run_id": verdict.run_id,
                "reason": verdict.reason,
                "amount": None if verdict.amount is None else plain(verdict.amount),
                "currency": verdict.currency,
                "cost_usd": None if verdict.cost is None else plain(verdict.cost),
                "evidence": verdict.evidence,
                "corrections": [_step(step) for step in verdict.corrections],
            }
            for verdict in found
        ],
    }
    return json.dumps(document, sort_keys=True, indent=2, ensure_ascii=False) + "\n"


def summary_markdown(
    reconciliation: Reconciliation,
    found: Sequence[RunVerdict],
    days: Sequence[ProviderDay] = (),
    *,
    is_missing: bool = False,
) -> str:
    """What was found, in a few lines of Markdown."""
    lines = [f"Reconciliation {reconciliation.number} of {reconciliation.period}: runs by verdict", ""]
    lines += [f"- {name}: {count:,}" for name, count in reconciliation.totals().items()] or ["- no runs"]
    for total in _totals(reconciliation):
        lines.append(
            f"- money at stake in {total.currency}: {plain(total.owed)} not billed so far, {plain(total.overbilled)} "
            f"billed too much, {plain(total.unproven)} billed without a trace"
        )
    for what in ("unpriced", "uncosted"):
        count = sum(getattr(stake, what) for stake in reconciliation.stakes.values())
        if count:
            lines.append(f"- {what}, and in no such sum: {count:,} runs")
    lines += [
        f"- **{account}: so many runs are traced less than billed that tracing may leave calls out: do not apply**"
        for account, stake in sorted(reconciliation.stakes.items())
        if stake.looks_sampled
    ]
    if days:
        off = sum(not day.agrees for day in days)
        lines.append(f"- what providers report, by day and model: {off:,} of {len(days):,} differ")
    if is_missing:
        lines.append(f"- **{NO_REPORTS}**")
    if found:
        lines += ["", f"Book what is proposed: `python -m flows reconcile apply {reconciliation.number}`"]
    return "\n".join(lines)


def verdict_rows(found: Sequence[RunVerdict]) -> list[dict[str, str]]:
    """The runs of most money, for a table."""
    return [
        {
            "run": verdict.run_id,
            "account": verdict.account or "",
            "verdict": verdict.verdict,
            "at stake": "" if verdict.amount is None else f"{plain(verdict.amount)} {verdict.currency}",
            "cost, USD": _plain(verdict.cost),
            "why": verdict.reason,
        }
        for verdict in sorted(found, key=_by_money)[:SHOWN]
    ]


def billed_tokens(verdict: RunVerdict) -> int:
    """Of all models."""
    return _tokens(verdict.evidence["billed"])


def traced_tokens(verdict: RunVerdict) -> int:
    """Of all models, nothing twice."""
    return _tokens(verdict.evidence["traced"])


def _tokens(counts: Iterable[dict[str, Any]]) -> int:
    return sum(row["input_tokens"] + row["output_tokens"] for row in counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Total:
    """Money at stake in one currency, over accounts."""

    currency: str
    owed: Decimal
    """What corrections add to the bills of accounts that owe more."""
    overbilled: Decimal
    """What they take off the others."""
    unproven: Decimal


def _totals(reconciliation: Reconciliation) -> list[_Total]:
    by_currency: dict[str, list[Stake]] = {}
    for stake in reconciliation.stakes.values():
        if stake.currency is not None:
            by_currency.setdefault(stake.currency, []).append(stake)
    return [
        _Total(
            currency=currency,
            owed=exact_sum(max(Decimal(0), stake.change) for stake in stakes),
            overbilled=exact_sum(max(Decimal(0), -stake.change) for stake in stakes),
            unproven=exact_sum(stake.unproven for stake in stakes),
        )
        for currency, stakes in sorted(by_currency.items())
    ]


def _accounts(reconciliation: Reconciliation) -> list[tuple[str, Counter[str], Stake]]:
    """Those of most runs that differ first; the account is empty where it is not known."""
    rows = [
        (account, Counter(counts), reconciliation.stakes.get(account, Stake()))
        for account, counts in reconciliation.runs.items()
    ]
    return sorted(rows, key=lambda row: (-sum(row[1][name] for name in VERDICTS[1:]), row[0]))


def _steps(verdict: RunVerdict) -> str:
    """What is proposed, for people."""
    said = []
    for step in verdict.corrections:
        tokens = number(step.usage.total_tokens)
        match step.action:
            case "accept":
                said.append("accept as it is")
            case "add":
                said.append(
                    f"bill {tokens} tokens of {step.model or 'no model'} on {step.line or 'a line to be named'}"
                )
            case "replace":
                said.append(f"bill {tokens} tokens of {step.model or 'no model'} in place of {step.event_id}")
            case "take_back":
                said.append(f"take {step.event_id} back")
    return "; ".join(said)


def _step(step: Correction) -> dict[str, Any]:
    return {
        "action": step.action,
        "event_id": None if step.event_id is None else str(step.event_id),
        "line": step.line,
        "provider": step.provider,
        "model": step.model,
        "usage": None if step.action == "accept" else step.usage.to_dict(),
        "caller_type": step.caller_type if step.action == "add" else None,
        "billable": step.billable if step.action == "add" else None,
        "platform_paid": step.platform_paid if step.action == "add" else None,
        "occurred_at": None if step.occurred_at is None else step.occurred_at.isoformat(),
    }


def _plain(value: Decimal | None) -> str:
    return "" if value is None else plain(value)


def _csv(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return out.getvalue()
