"""A home for the jobs of one test: a ledger, the facts put into it, and what the jobs make of them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import duckdb
import pytest

from metering.admission.sql import SqlStore
from metering.billing.invoices import Invoice
from metering.events import TokenUsage, UsageEvent, new_event_id
from metering.ledger import Ledger, plan_versions
from metering.meter import Meter
from metering.plans import parse_plans
from metering.windows import period_of_month
from tasks.bills import write_index, write_invoices
from tasks.closing import Closed, close_accounts
from tasks.costs import cost_events
from tasks.load import ROOT, load_ledger

if TYPE_CHECKING:
    from pathlib import Path

NOVEMBER = datetime(2023, 11, 16, 18, 17, tzinfo=UTC)
COSTED_AT = datetime(2023, 12, 1, tzinfo=UTC)
PERIOD = "2023-11"
NO_OTHERS = {"spans": 0, "provider_windows": 0}
"""What a load says where nothing but events was recorded."""


def event(account: str = "acme", *, at: datetime = NOVEMBER, line: str = "application", **said: Any) -> UsageEvent:
    """One call of gpt-4.1: 1,000 tokens in and 100 out, unless said otherwise."""
    said.setdefault("usage", TokenUsage(input_tokens=1_000, output_tokens=100))
    values = {"event_id": new_event_id(), "provider": "openai", "model": "gpt-4.1", "kind": "import", **said}
    return UsageEvent(account=account, occurred_at=at, line=line, **values)


@dataclass(frozen=True, slots=True)
class Place:
    """Where one test's files are."""

    home: Path
    url: str | None = None
    """Of the ledger; None: `ledger.db` in `home`."""
    clock: Any = field(default=lambda: NOVEMBER)

    @classmethod
    def at(cls, home: Path, ledger_url: str) -> Place:
        """A new home, into which a ledger that is a file is moved."""
        home.mkdir()
        if not ledger_url.startswith("sqlite:///"):
            return cls(home, ledger_url)
        shutil.move(ledger_url.removeprefix("sqlite:///"), home / "ledger.db")
        return cls(home)

    @property
    def ledger(self) -> Path:
        return self.home / "ledger.db"

    @property
    def ledger_url(self) -> str:
        return self.url or f"sqlite:///{self.ledger}"

    @property
    def is_on_postgres(self) -> bool:
        return self.url is not None

    @property
    def warehouse(self) -> Path:
        return self.home / "warehouse.duckdb"

    @property
    def archives(self) -> Path:
        return self.home / "archives"

    @property
    def out(self) -> Path:
        return self.home / "out"

    def meter(self) -> Meter:
        return Meter(self.ledger_url, clock=self.clock, strict_signals=True)

    def account(self, name: str, plan: str = "free", **said: Any) -> None:
        with self.meter() as meter:
            meter.accounts.create(name, plan=plan, **said)

    def plans(self, text: str) -> None:
        """Write versions of the plans of a plans.toml, in force from long ago."""
        ledger = Ledger(self.ledger_url)
        with ledger.write() as connection:
            plan_versions.apply(connection, parse_plans(text).values(), now=NOVEMBER, actor="test")
        ledger.close()

    def add(self, *events: UsageEvent, at_once: int | None = None) -> None:
        """Record events, so many in a transaction."""
        ledger = Ledger(self.ledger_url)
        store, step = SqlStore(ledger, clock=self.clock), at_once or max(1, len(events))
        for first in range(0, len(events), step):
            store.append(events[first : first + step])
        ledger.close()

    def cost(self) -> int:
        return cost_events.fn(self.ledger_url, COSTED_AT)

    def load(self) -> dict[str, int]:
        return load_ledger.fn(self.ledger_url, self.warehouse, self.archives)

    def newest(self) -> int:
        """Where the watermark is once everything is loaded."""
        (found,) = self.ledger_rows(f"SELECT max({'commit_xid' if self.is_on_postgres else 'seq'}) FROM events")
        return int(found[0])

    def aggregate(self) -> dict[str, int]:
        self.cost()
        return self.load()

    def invoice(self, period: str = PERIOD) -> list[tuple[str, str]]:
        """Bill without the index page, whose pictures take the most time."""
        return write_invoices.fn(self.ledger_url, self.warehouse, self.out, period)

    def close(self, period: str = PERIOD, *, at: datetime | None = None, override: str | None = None) -> Closed:
        """Load what is new, and close a period; unless said, five days after the month it begins in."""
        self.aggregate()
        return self.close_loaded(period, at=at, override=override)

    def close_loaded(self, period: str, *, at: datetime | None = None, override: str | None = None) -> Closed:
        """The same with what was loaded before."""
        month = period_of_month(period, time_zone="UTC", anchor_day=1)
        now = at or month.end + timedelta(days=5)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("METERING_HOME", str(self.home))
            return close_accounts.fn(self.ledger_url, self.warehouse, period, now, actor="finance", override=override)

    def bill(self, period: str = PERIOD) -> list[tuple[str, str]]:
        problems = self.invoice(period)
        write_index.fn(self.warehouse, self.out, period, problems)
        return problems

    def cycle(self, period: str = PERIOD) -> list[tuple[str, str]]:
        self.aggregate()
        return self.bill(period)

    def invoices(self, period: str = PERIOD) -> dict[str, Invoice]:
        """The invoices that were written, by account."""
        folder = self.out / period / "invoices"
        written = [Invoice.from_json(path.read_bytes()) for path in sorted(folder.glob("*.json"))]
        return {invoice.account: invoice for invoice in written}

    def files(self) -> dict[str, bytes]:
        """Everything that was written for people."""
        return {
            str(path.relative_to(self.out)): path.read_bytes() for path in sorted(self.out.rglob("*")) if path.is_file()
        }

    def warehouse_rows(self, query: str) -> list[tuple[Any, ...]]:
        with duckdb.connect(str(self.warehouse), read_only=True) as connection:
            connection.execute("SET TimeZone = 'UTC'")
            return connection.execute(query).fetchall()

    def ledger_rows(self, query: str) -> list[tuple[Any, ...]]:
        ledger = Ledger(self.ledger_url)
        with ledger.read() as connection:
            rows = [tuple(row) for row in connection.exec_driver_sql(query)]
        ledger.close()
        return rows

    def change(self, statement: str) -> None:
        """Tamper with the ledger."""
        ledger = Ledger(self.ledger_url)
        with ledger.write() as connection:
            connection.exec_driver_sql(statement)
        ledger.close()

    def forge(self, statement: str) -> None:
        """Tamper with a ledger in a file, as somebody does who takes away first what refuses it."""
        for (name,) in self.ledger_rows("SELECT name FROM sqlite_master WHERE type = 'trigger'"):
            self.change(f"DROP TRIGGER {name}")
        self.change(statement)

    def tamper(self, statement: str) -> None:
        """Tamper with the warehouse."""
        with duckdb.connect(str(self.warehouse)) as connection:
            connection.execute(statement)


def month_of_usage(place: Place, *, events: int, accounts: int = 6) -> None:
    """A month of calls on the plans of the demo: several models, and of the first two accounts some without a price."""
    place.plans((ROOT / "examples" / "plans.toml").read_text())
    names = [f"account-{number}" for number in range(accounts)]
    for number, name in enumerate(names):
        place.account(name, ["pro", "enterprise"][number % 2], time_zone=["UTC", "Asia/Kolkata"][number % 2])
    models = [("openai", "gpt-4.1"), ("anthropic", "claude-sonnet-4-5"), ("nobody", "mystery"), (None, None)]
    made = []
    for number in range(events):
        provider, model = models[number // accounts % (4 if number % accounts < 2 else 2)]
        usage = TokenUsage(input_tokens=number * 37 % 9_000, output_tokens=number * 11 % 700)
        made.append(
            event(
                names[number % accounts],
                at=datetime(2023, 11, 2, tzinfo=UTC) + timedelta(minutes=number * 7919 % 38_000),
                line=["application", "extraction_tokens"][number % 5 == 0],
                provider=provider,
                model=model,
                usage=usage,
                quantity=Decimal(number % 13) / 4,
                platform_paid=number % 11 != 0,
            )
        )
    place.add(*made, at_once=10)
