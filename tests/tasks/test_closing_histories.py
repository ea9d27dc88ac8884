"""Whatever happens after a close, no final document changes, and all usage is billed once: any history, on Postgres.

There the load may run in this process, which makes a step a few hundredths of a second.
"""

from __future__ import annotations

import os
from contextlib import closing, suppress
from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from metering.billing.closing import composed
from metering.errors import CorrectionConflict, InvoiceConflict
from metering.events import TokenUsage
from metering.ledger import Ledger
from metering.ledger.closing import billed_of, document, frozen_of
from metering.ledger.proving import chain_faults, recomputed
from metering.windows import period_of_month
from tasks import load_worker
from tasks.closing import credit_invoice, void_invoice
from tasks.errors import JobError
from tasks.load import for_duckdb
from tasks.periods import loaded, plans_of
from tasks.restore import restore_period
from tasks.retention import archive_over
from tasks.warehouse import open_for_reading
from tests.tasks.place import Place, event

if TYPE_CHECKING:
    from pathlib import Path

    from tests.servers import PostgresServer

PLANS = """
[plans.tiered]
retention_days = 30
base_fee = "3.10"
minimum = "4.00"
rates = [
  { line = "*", metric = "input_tokens", type = "graduated", tiers = [
    { up_to = 5_000, unit_amount = "0.000333" }, { unit_amount = "0.0000777" } ] },
  { line = "*", metric = "requests", type = "package", package_size = 3, package_amount = "0.05" },
]

[plans.flat]
retention_days = 30
rates = [ { line = "*", metric = "output_tokens", type = "per_unit", unit_amount = "0.0001", minimum = "0.5" } ]
"""
MONTHS = ("2023-10", "2023-11", "2023-12")
ACCOUNTS = {"acme": ("tiered", "UTC"), "zeta": ("flat", "Asia/Tokyo")}
"""Plan and time zone."""
BEGAN = datetime.fromisoformat("2023-09-01T00:00Z")
LAST = "2024-01"
EXAMPLES = int(os.environ.get("TALLYSTICK_HISTORIES", "5"))
END = datetime.fromisoformat("2024-04-01T00:00Z")

accounts = st.sampled_from(sorted(ACCOUNTS))
months = st.sampled_from(MONTHS)
tokens = st.integers(0, 9_000)
"""Around the tiers' edge."""


class Histories(RuleBasedStateMachine):
    """Late usage, corrections, imports again, closes, voids, credit notes, archives, restores: in any order."""

    server: PostgresServer
    template: str
    folder: Path

    @initialize()
    def start(self) -> None:
        self.url = self.server.database(like=self.template)
        self.place = Place.at(self.folder / self.url.rpartition("/")[2], self.url)
        self.place.plans(PLANS)
        long_since = replace(self.place, clock=lambda: BEGAN)
        for name, (plan, zone) in ACCOUNTS.items():
            long_since.account(name, plan, time_zone=zone)
        self.ledger = Ledger(self.url)
        self.events: list[Any] = []
        self.final: dict[str, bytes] = {}
        self.voided: set[str] = set()

    @rule(
        account=accounts, month=months, counts=st.lists(tokens, min_size=1, max_size=3), hours=st.integers(0, 26 * 24)
    )
    def use(self, account: str, month: str, counts: list[int], hours: int) -> None:
        window = period_of_month(month, time_zone=ACCOUNTS[account][1], anchor_day=1)
        at = window.start + timedelta(hours=hours)
        made = [
            event(account, at=at, usage=TokenUsage(input_tokens=count, output_tokens=count // 3)) for count in counts
        ]
        self.place.add(*made)
        self.events += made

    @precondition(lambda self: self.events)
    @rule(data=st.data())
    def import_again(self, data: st.DataObject) -> None:
        self.place.add(data.draw(st.sampled_from(self.events)))

    @precondition(lambda self: self.events)
    @rule(data=st.data(), count=tokens)
    def correct(self, data: st.DataObject, count: int) -> None:
        wrong = data.draw(st.sampled_from(self.events))
        with self.place.meter() as meter, suppress(CorrectionConflict):  # where it is archived
            meter.correct(wrong.event_id, usage=TokenUsage(input_tokens=count), reason="recounted")
        self.events.remove(wrong)  # it may be corrected no second time by the same id

    @rule(month=months)
    def close(self, month: str) -> None:
        self.load()
        self.place.close_loaded(month, at=END)
        self.note()

    @precondition(lambda self: self.final)
    @rule(data=st.data())
    def void(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.final)))
        try:
            void_invoice(self.url, number, END, actor="finance", reason="any")
        except InvoiceConflict:
            return
        self.note()

    @precondition(lambda self: self.final)
    @rule(data=st.data())
    def credit(self, data: st.DataObject) -> None:
        self.load()
        number = data.draw(st.sampled_from(sorted(self.final)))
        try:
            credit_invoice(self.url, self.place.warehouse, number, END, actor="finance", reason="any")
        except InvoiceConflict:
            return
        self.note()

    @rule()
    def rebuild(self) -> None:
        self.place.warehouse.unlink(missing_ok=True)

    @rule()
    def archive(self) -> None:
        """What is billed leaves the ledger."""
        archive_over.fn(self.url, self.place.archives, END + timedelta(days=90), 0)

    @rule(month=months)
    def restore(self, month: str) -> None:
        if self.place.warehouse.exists():
            with suppress(JobError):  # where nothing of it is archived
                restore_period(self.url, self.place.warehouse, self.place.archives, month)

    def load(self) -> None:
        self.place.cost()
        load_worker.load(for_duckdb(self.url, self.place.archives), self.place.warehouse)

    def note(self) -> None:
        """Each new document is the next number, and follows from what was frozen."""
        numbers = [row[0] for row in self.place.ledger_rows("SELECT number FROM invoices ORDER BY seq")]
        assert numbers == list(range(1, len(numbers) + 1))
        with self.ledger.read() as connection:
            for number in numbers[len(self.final) :]:
                found = document(connection, f"INV-{number:06d}")
                assert recomputed(connection, found) == found.document
                self.final[found.number] = found.document

    @invariant()
    def what_is_final_stays(self) -> None:
        with self.ledger.read() as connection:
            for number, content in self.final.items():
                assert document(connection, number).document == content
            assert chain_faults(connection) == []

    def teardown(self) -> None:
        if not hasattr(self, "place"):
            return
        self.load()
        for month in (*MONTHS, LAST):  # what is left of earlier months is on the invoice of a later one
            self.place.close_loaded(month, at=END)
        self.note()
        with (
            closing(Ledger(self.url)) as ledger,
            open_for_reading(self.place.warehouse) as warehouse,
            ledger.read() as connection,
        ):
            known = connection.exec_driver_sql("SELECT count(*) FROM event_ids").scalar_one()
            assert warehouse.execute("SELECT count(*) FROM usage_events").fetchall() == [(known,)]
            for account in ACCOUNTS:
                billed, closed = billed_of(connection, account), frozen_of(connection, account)[account]
                for month in (*MONTHS, LAST):
                    whole = self.price(connection, warehouse, account, month, closed[month][1])
                    assert sum(billed.get(month, {}).values(), Decimal(0)) == whole
        self.ledger.close()
        self.server.drop(self.url)

    @staticmethod
    def price(connection: Any, warehouse: Any, account: str, month: str, frozen: Any) -> Decimal:
        """All usage of a period, priced once."""
        known = loaded(warehouse, month)
        usage = tuple(known.usage.get(account, ()))
        plans = plans_of(connection)
        whole = frozen.with_usage(
            usage,
            plans={row.plan_version: plans[row.plan_version].digest for row in usage},
            price_versions=(),
            events=0,
            watermark=0,
            last_seq=0,
        )
        return sum((each.total for each in composed(whole, (), plans, {})), Decimal(0))


@pytest.fixture
def histories(postgres: PostgresServer, empty_postgres: str, tmp_path: Path) -> type[Histories]:
    return type("OnThisServer", (Histories,), {"server": postgres, "template": empty_postgres, "folder": tmp_path})


def test_any_history(histories: type[Histories]) -> None:
    run_state_machine_as_test(
        histories,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=12,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        ),
    )
