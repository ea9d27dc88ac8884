"""Reconciliations in the ledger: what was compared, and what was found of each run that does not agree."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import sqlalchemy as sa

from metering.billing.reconciliation import Correction, Reconciliation, RunVerdict, Stake, Tolerance
from metering.errors import UnknownReconciliation
from metering.ledger.schema import reconciliations, verdicts

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from datetime import datetime

__all__ = ["accepted", "find", "record", "verdicts_of"]

_corrections = msgspec.json.Decoder(tuple[Correction, ...])
_stakes = msgspec.json.Decoder(dict[str, Stake])

KEPT = 10
"""Reconciliations of a period whose proposals are kept; of older ones only what was applied."""


def record(
    connection: sa.Connection,
    *,
    period: str,
    made_at: datetime,
    events_to: int,
    spans_to: int,
    tolerance: Tolerance,
    runs: Mapping[str, Mapping[str, int]],
    stakes: Mapping[str, Stake],
    found: Iterable[RunVerdict],
) -> int:
    """Within a transaction: write a reconciliation; its number."""
    written = connection.execute(
        reconciliations.insert().values(
            period=period,
            made_at=made_at,
            events_to=events_to,
            spans_to=spans_to,
            tolerance_tokens=tolerance.tokens,
            tolerance_percent=tolerance.percent,
            runs=_json(runs),
            stakes=_json(stakes),
        )
    )
    assert written.inserted_primary_key is not None
    number = int(written.inserted_primary_key[0])
    rows = [
        {
            "reconciliation": number,
            "number": verdict.number,
            "account": verdict.account,
            "run_id": verdict.run_id,
            "verdict": verdict.verdict,
            "reason": verdict.reason,
            "state": verdict.state,
            "amount": verdict.amount,
            "currency": verdict.currency,
            "cost": verdict.cost,
            "evidence": _json(verdict.evidence),
            "corrections": _json(verdict.corrections),
        }
        for verdict in found
    ]
    if rows:
        connection.execute(verdicts.insert(), rows)
    of_period = sa.select(reconciliations.c.reconciliation).where(reconciliations.c.period == period)
    newest = connection.execute(of_period.order_by(reconciliations.c.reconciliation.desc()).limit(KEPT)).scalars().all()
    old = of_period.where(reconciliations.c.reconciliation < min(newest))
    connection.execute(verdicts.delete().where(verdicts.c.reconciliation.in_(old), verdicts.c.applied_at.is_(None)))
    return number


def find(connection: sa.Connection, number: int) -> Reconciliation:
    """One reconciliation. Raises `UnknownReconciliation`."""
    row = connection.execute(sa.select(reconciliations).where(reconciliations.c.reconciliation == number)).one_or_none()
    if row is None:
        raise UnknownReconciliation(number)
    return Reconciliation(
        number=row.reconciliation,
        period=row.period,
        made_at=row.made_at,
        events_to=row.events_to,
        spans_to=row.spans_to,
        tolerance=Tolerance(tokens=row.tolerance_tokens, percent=row.tolerance_percent),
        runs=msgspec.json.decode(row.runs),
        stakes=_stakes.decode(row.stakes),
    )


def verdicts_of(connection: sa.Connection, number: int) -> list[RunVerdict]:
    """The runs that did not agree, in order of their numbers."""
    query = sa.select(verdicts).where(verdicts.c.reconciliation == number).order_by(verdicts.c.number)
    return [
        RunVerdict(
            **{
                **{name: value for name, value in row.items() if name != "reconciliation"},
                "evidence": msgspec.json.decode(row["evidence"]),
                "corrections": _corrections.decode(row["corrections"]),
            }
        )
        for row in connection.execute(query).mappings()
    ]


def accepted(connection: sa.Connection) -> set[tuple[str, str, str]]:
    """(account, run, state) of runs that stand as they are billed, for as long as nothing else is recorded of them."""
    query = sa.select(verdicts.c.account, verdicts.c.run_id, verdicts.c.state).where(
        verdicts.c.applied_at.is_not(None), verdicts.c.verdict.in_(["untraced", "abandoned"])
    )
    return {tuple(row) for row in connection.execute(query)}


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
