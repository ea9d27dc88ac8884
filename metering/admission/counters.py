"""The counters of one account, inside the transaction of one admission.

A counter equals the sum over counted events in its window plus open holds. A row is only a cache of that sum: one that
is missing, because the window or the limit is new, is counted from the ledger before it is used.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from decimal import Decimal
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import msgspec

from metering.admission.decide import Counter, RateCounter
from metering.admission.statements import by_position, statements
from metering.billing.money import EXACT
from metering.events import METRICS, TOKEN_FIELDS, TokenUsage, metric_amounts
from metering.ledger.types import decimal_text, instant_text, parse_instant
from metering.windows import Window

if TYPE_CHECKING:
    import sqlite3

__all__ = ["NOTHING", "Counters", "Units", "dump_units", "load_units", "units_of"]

_SQL = statements("sqlite")
_PUT_COUNTER, _ = by_position(_SQL["put_counter"])

KEPT_AFTER_END = timedelta(days=2)
"""How long a counter stays after its window: a hold settles into the window it was made in."""

MOST_REMEMBERED = 10_000
"""Counters whose names are kept as they lie in the ledger."""

Units = dict[str, int | Decimal]
"""What a call takes from counters, by metric."""

NOTHING: Units = dict.fromkeys(METRICS, 0)


def units_of(usage: TokenUsage | None, quantity: Decimal | None) -> Units:
    """The units of one call; what it does not state is 0."""
    return metric_amounts((usage or _NO_TOKENS).to_dict(), requests=1, quantity=quantity or Decimal(0))


_NO_TOKENS = TokenUsage()


def dump_units(units: Units) -> str:
    """As JSON text, without what is 0."""
    return msgspec.json.encode({metric: decimal_text(amount) for metric, amount in units.items() if amount}).decode()


def load_units(text: str) -> Units:
    """What `dump_units` wrote."""
    return NOTHING | {metric: Decimal(amount) for metric, amount in msgspec.json.decode(text).items()}


@lru_cache(maxsize=MOST_REMEMBERED)
def _counter(metric: str, line: str, key_id: str, window_start: str, window_end: str) -> Counter:
    """The counter of a row of `find_counters`."""
    return Counter(metric, line, key_id, Window(start=parse_instant(window_start), end=parse_instant(window_end)))


@lru_cache(maxsize=MOST_REMEMBERED)
def _names(counter: Counter) -> tuple[str, str, str, str, str]:
    """The primary key of a counter's row, after the account."""
    window = counter.window
    return instant_text(window.start), instant_text(window.end), counter.metric, counter.line, counter.key_id


class Counters:
    """Reads and moves the counters that one call touches: those of its account, line and key at one moment.

    Without a line those of every line, to look at.
    """

    def __init__(self, cursor: sqlite3.Cursor, *, account: str, line: str | None, key_id: str, at: datetime) -> None:
        self._cursor = cursor
        self._scope: dict[str, Any] = {"account": account, "line": line, "key_id": key_id, "at": instant_text(at)}
        self._at = at
        self._recounted = False
        self._arrivals: dict[RateCounter, Decimal] | None = None
        self._used: dict[Counter, Decimal] = {
            _counter(*names): Decimal(used) for *names, used in cursor.execute(_SQL["find_counters"], self._scope)
        }

    def used(self, counter: Counter) -> Decimal:
        """Units used so far, counted from the ledger where no row has them."""
        if counter not in self._used:
            self._used[counter] = self.recount(counter)
            self._recounted = True
        return self._used[counter]

    def recount(self, counter: Counter) -> Decimal:
        """The sum over counted events in the window plus open holds, whatever the row says."""
        scope = {
            "account": self._scope["account"],
            "line": counter.line,
            "key_id": counter.key_id,
            "window_start": instant_text(counter.window.start),
            "window_end": instant_text(counter.window.end),
        }
        requests, quantity, *tokens = self._cursor.execute(_SQL["count_window"], scope).fetchone()
        sums = metric_amounts(
            dict(zip(TOKEN_FIELDS, tokens, strict=True)), requests=requests, quantity=Decimal(quantity)
        )
        total = Decimal(sums[counter.metric])
        for (reserved,) in self._cursor.execute(_SQL["find_open_holds_of_window"], scope):
            total = EXACT.add(total, load_units(reserved)[counter.metric])
        return total

    def move(self, given: Units, taken: Units = NOTHING) -> None:
        """Add `given` and take `taken` back, on every counter this call touches, whatever plan it is of."""
        for counter, used in self._used.items():
            self._used[counter] = moved = used + given[counter.metric] - taken[counter.metric]
            self._cursor.execute(_PUT_COUNTER, (self._scope["account"], *_names(counter), decimal_text(moved)))
        if self._recounted:
            before = instant_text(self._at - KEPT_AFTER_END)
            self._cursor.execute(_SQL["drop_counters"], {"account": self._scope["account"], "before": before})

    def arrivals(self) -> dict[RateCounter, Decimal]:
        """Theoretical arrival times of the rates this call touches, as kept."""
        return {
            RateCounter(metric, line, key_id, units, period_us): Decimal(arrival)
            for metric, line, key_id, units, period_us, arrival in self._cursor.execute(
                _SQL["find_rate_counters"], self._scope
            )
        }

    def arrival(self, rate: RateCounter) -> Decimal:
        """The theoretical arrival time of one rate; 0 where it was never used."""
        if self._arrivals is None:
            self._arrivals = self.arrivals()
        return self._arrivals.get(rate, Decimal(0))

    def put_arrival(self, rate: RateCounter, arrival: int | Decimal) -> None:
        """Keep a theoretical arrival time."""
        self._cursor.execute(
            _SQL["put_rate_counter"],
            {
                "account": self._scope["account"],
                "metric": rate.metric,
                "line": rate.line,
                "key_id": rate.key_id,
                "units": rate.units,
                "period_us": rate.period_us,
                "arrival": decimal_text(arrival),
            },
        )
