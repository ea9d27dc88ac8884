"""Counters against the ledger: the one proof that quotas were decided on what was recorded."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING

from metering.admission.counters import counted
from metering.admission.decide import Counter
from metering.ledger.transactions import cursor_of
from metering.ledger.types import parse_instant
from metering.windows import Window

if TYPE_CHECKING:
    from metering.ledger import Ledger

__all__ = ["CounterCheck", "check_counters"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CounterCheck:
    """One counter, as kept and as the ledger has it."""

    account: str
    counter: Counter
    kept: Decimal
    counted: Decimal
    """Sum over counted events in its window, plus open holds."""

    @property
    def agrees(self) -> bool:
        """Whether both are the same number."""
        return self.kept == self.counted


def check_counters(ledger: Ledger) -> list[CounterCheck]:
    """Count every counter again, in one transaction."""
    with ledger.read() as connection:
        cursor = cursor_of(connection)
        rows = cursor.execute(
            "SELECT account, metric, line, key_id, window_start, window_end, used FROM counters ORDER BY 1, 2, 3, 4, 5"
        ).fetchall()
        checks = []
        for account, metric, line, key_id, start, end, used in rows:
            window = Window(start=parse_instant(start), end=parse_instant(end))
            counter = Counter(metric, line, key_id, window)
            checks.append(
                CounterCheck(
                    account=account, counter=counter, kept=Decimal(used), counted=counted(cursor, account, counter)
                )
            )
        return checks
