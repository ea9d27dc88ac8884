"""The counters of accounts in a transaction: read once, moved by each of its admissions, written before it ends.

A counter equals the sum over counted events in its window plus open holds. A row is only a cache of that sum: one that
is missing, because the window or the limit is new, is counted from the ledger before it is used.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from decimal import Decimal, localcontext
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import msgspec

from metering.admission.decide import Counter, RateCounter, Verdict, counter_of, weigh
from metering.admission.protocol import Standing
from metering.admission.statements import by_position, statements
from metering.billing.money import EXACT
from metering.events import METRICS, TOKEN_FIELDS, TokenUsage, metric_amounts
from metering.ledger.transactions import Transaction
from metering.ledger.types import decimal_text, instant_text, parse_instant
from metering.windows import Window

if TYPE_CHECKING:
    from collections.abc import Sequence

    from metering.admission.directory import Placement
    from metering.admission.protocol import LimitStatus
    from metering.ledger.transactions import Cursor
    from metering.plans import Limit

__all__ = ["NOTHING", "CounterBook", "Counters", "Units", "counted", "dump_units", "load_units", "units_of"]

_SQL = statements()
_PUT_COUNTER, _ = by_position(_SQL["put_counter"])

KEPT_AFTER_END = timedelta(days=2)
"""How long a counter stays after its window: a hold settles into the window it was made in."""

MINUTE_LENGTH = len("2023-11-16T18:17")

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


class _Cell:
    """One counter: how much of it is used, and whether that is still to be written."""

    __slots__ = ("counter", "is_moved", "used")

    def __init__(self, counter: Counter, used: int | Decimal) -> None:
        self.counter = counter
        self.used = used
        self.is_moved = False


class CounterBook:
    """What one transaction knows of counters and open holds. Whoever reads or moves a counter in it does so here."""

    def __init__(self, cursor: Cursor) -> None:
        self._cursor = cursor
        self._writes = isinstance(cursor, Transaction)
        self._cells: dict[tuple[str, ...], _Cell] = {}
        """By account and the rest of the row's primary key."""
        self._pages: dict[tuple[str, str | None, str, str], Counters] = {}
        self._first_expiries: dict[str, str | None] = {}

    @classmethod
    def of(cls, cursor: Cursor) -> CounterBook:
        """That of the cursor's transaction. A cursor that is not the writer's has a new one, only to read."""
        if not isinstance(cursor, Transaction):
            return cls(cursor)
        book: CounterBook | None = cursor.known.get("counters")
        if book is None:
            book = cursor.known["counters"] = cls(cursor)
            cursor.left_to_write.append(book.write)
        return book

    def page(self, account: str, line: str | None, key_id: str, at: datetime) -> Counters:
        """The counters that one call touches: those of its account, line (None: every line) and key at one moment."""
        text = instant_text(at)
        # Windows begin and end on full minutes, so calls of one minute touch the same ones.
        place = account, line, key_id, text[:MINUTE_LENGTH]
        page = self._pages.get(place)
        if page is None:
            scope = {"account": account, "line": line, "key_id": key_id, "at": text}
            page = self._pages[place] = Counters(self, self._cursor, scope, at)
        return page

    def first_expiry(self, account: str) -> str | None:
        """No open hold of the account expires before; None where it has none."""
        if account not in self._first_expiries:
            (found,) = self._cursor.execute(_SQL["find_first_expiry"], {"account": account}).fetchone()
            self._first_expiries[account] = found
        return self._first_expiries[account]

    def forget_expiries(self, account: str) -> None:
        """The open holds of an account have changed."""
        self._first_expiries.pop(account, None)

    def forget(self, accounts: Sequence[str]) -> None:
        """Drop the counters of accounts: the next admission counts them anew."""
        self.write()
        self._cells.clear()
        self._pages.clear()
        self._cursor.executemany(_SQL["forget_counters"], [{"account": account} for account in accounts])

    def write(self) -> None:
        """Write what was moved."""
        rows = []
        for names, cell in self._cells.items():
            if cell.is_moved:
                cell.is_moved = False
                rows.append((*names, decimal_text(cell.used)))
        self._cursor.executemany(_PUT_COUNTER, rows)

    def _cells_of(self, scope: dict[str, Any]) -> dict[Counter, _Cell]:
        """Those of a page. What was moved before is newer here than in the ledger."""
        cells = {}
        for metric, line, key_id, start, end, used in self._cursor.execute(_SQL["find_counters"], scope):
            names = (scope["account"], start, end, metric, line, key_id)
            cell = self._cells.get(names)
            if cell is None:
                cell = self._cells[names] = _Cell(_counter(metric, line, key_id, start, end), _number(metric, used))
            cells[cell.counter] = cell
        return cells

    def _add(self, account: str, counter: Counter) -> _Cell:
        """A counter that no row has, counted. Pages that were read before do not know it, so all are read again."""
        names, used = (account, *_names(counter)), counted(self._cursor, account, counter)
        cell = self._cells[names] = _Cell(counter, _number(counter.metric, used))
        if self._writes:
            self._cursor.execute(_PUT_COUNTER, (*names, decimal_text(used)))
        self._pages.clear()
        return cell


def counted(cursor: Cursor, account: str, counter: Counter) -> Decimal:
    """The sum over counted events in the window of a counter plus open holds, whatever its row says."""
    scope = {
        "account": account,
        "line": counter.line,
        "key_id": counter.key_id,
        "window_start": instant_text(counter.window.start),
        "window_end": instant_text(counter.window.end),
    }
    requests, quantity, *tokens = cursor.execute(_SQL["count_window"], scope).fetchone()
    totals = dict(zip(TOKEN_FIELDS, map(int, tokens), strict=True))  # Postgres sums them as numeric
    sums = metric_amounts(totals, requests=requests, quantity=Decimal(quantity))
    total = Decimal(sums[counter.metric])
    for (reserved,) in cursor.execute(_SQL["find_open_holds_of_window"], scope):
        total = EXACT.add(total, load_units(reserved)[counter.metric])
    return total


def _number(metric: str, used: str | Decimal) -> int | Decimal:
    return Decimal(used) if metric == "quantity" else int(used)


class Counters:
    """Reads and moves the counters that one call touches: see `CounterBook.page`."""

    def __init__(self, book: CounterBook, cursor: Cursor, scope: dict[str, Any], at: datetime) -> None:
        self._book = book
        self._cursor = cursor
        self._scope = scope
        self._at = at
        self._recounted = False
        self._cells = book._cells_of(scope)
        self._met_by_plan: dict[int, list[_Cell]] = {}

    def used(self, counter: Counter) -> int | Decimal:
        """Units used so far, counted from the ledger where no row has them."""
        return self._cell(counter).used

    def weigh(
        self, asked: Sequence[tuple[Limit, int | Decimal]], placed: Placement, key_id: str, now: datetime
    ) -> Verdict:
        """Whether what a call asks of each limit of its plan fits. Where they then stand is weighed when one looks."""
        cells = self._met(asked, placed, key_id)
        used = [cell.used for cell in cells]
        # A rate is no calendar limit, so there are fewer cells than limits where the plan has one.
        if len(cells) == len(asked) and all(
            there + amount <= limit.max  # type: ignore[operator]
            for there, (limit, amount) in zip(used, asked, strict=True)
        ):

            def statuses() -> Sequence[LimitStatus]:
                before = {cell.counter: there for cell, there in zip(cells, used, strict=True)}
                with localcontext(EXACT):
                    return weigh(
                        asked,
                        key_id=key_id,
                        period=placed.period,
                        now=now,
                        used=before.__getitem__,
                        arrival=self.arrival,
                    ).statuses

            return Verdict(Standing(statuses), (), {})
        return weigh(asked, key_id=key_id, period=placed.period, now=now, used=self.used, arrival=self.arrival)

    def move(self, given: Units, taken: Units = NOTHING) -> None:
        """Add `given` and take `taken` back, on every counter this call touches, whatever plan it is of."""
        for counter, cell in self._cells.items():
            cell.used += given[counter.metric] - taken[counter.metric]
            cell.is_moved = True
        if self._recounted:
            self._recounted = False
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
        return self.arrivals().get(rate, Decimal(0))

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

    def _met(self, asked: Sequence[tuple[Limit, int | Decimal]], placed: Placement, key_id: str) -> list[_Cell]:
        """The cells of the calendar limits that a call on this line meets."""
        cells = self._met_by_plan.get(placed.plan_version)
        if cells is None:
            cells = self._met_by_plan[placed.plan_version] = [
                self._cell(counter_of(limit, key_id, self._at, placed.period))
                for limit, _ in asked
                if limit.per is not None
            ]
        return cells

    def _cell(self, counter: Counter) -> _Cell:
        cell = self._cells.get(counter)
        if cell is None:
            cell = self._cells[counter] = self._book._add(self._scope["account"], counter)
            self._recounted = True
        return cell
