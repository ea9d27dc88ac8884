"""Closed periods stay closed, and all that is known of them is billed once."""

from __future__ import annotations

import hashlib
from contextlib import closing
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest

from metering.errors import Conflict, InvoiceConflict, PeriodClosed, UnknownInvoice
from metering.events import TokenUsage
from metering.ledger import Ledger
from metering.ledger.closing import close_period, document, documents_of, frozen_of
from metering.ledger.proving import chain_faults, recomputed
from metering.meter import Meter
from metering.settings import Settings
from tasks import closing as closing_task
from tasks import costs
from tasks.closing import act_of, credit_invoice, void_invoice
from tasks.errors import JobError, WarehouseError
from tasks.periods import late_inputs, loaded, open_inputs
from tasks.recost import Act, recost_period
from tasks.warehouse import open_for_reading
from tests.tasks.place import NOVEMBER, PERIOD, Place, event

if TYPE_CHECKING:
    from metering.billing.invoices import Invoice

PLAN = """
[plans.metered]
retention_days = 30
base_fee = "10.00"
minimum = "12.00"
rates = [
  { line = "*", metric = "input_tokens", type = "graduated", tiers = [
    { up_to = 100_000, unit_amount = "0.00001" }, { unit_amount = "0.000001" } ] },
]
"""
DECEMBER = NOVEMBER + timedelta(days=30)


def used(tokens: int, at: datetime = NOVEMBER, account: str = "acme", **said: Any) -> Any:
    return event(account, at=at, usage=TokenUsage(input_tokens=tokens), **said)


@pytest.fixture
def metered(place: Place) -> Place:
    place.plans(PLAN)
    place.account("acme", "metered")
    return place


def finals(place: Place, *periods: str) -> list[Invoice]:
    with closing(Ledger(place.ledger_url)) as ledger, ledger.read() as connection:
        return [each.invoice for period in periods or (PERIOD,) for each in documents_of(connection, period=period)]


def items(invoice: Invoice) -> list[tuple[str, str]]:
    return [(item.item_id, str(item.amount)) for item in invoice.items]


def test_a_close_freezes_and_numbers(metered: Place) -> None:
    metered.account("idle", "free")
    metered.add(used(50_000), used(100_000))
    closed = metered.close()
    assert (closed.numbers, closed.accounts, closed.not_over, closed.refused) == (("INV-000001",), 2, 0, ())
    [invoice] = finals(metered)
    assert (invoice.number, invoice.status, invoice.kind, invoice.reference) == (
        "INV-000001",
        "final",
        "invoice",
        "acme-2023-11",
    )
    assert items(invoice) == [("base_fee", "10.00"), ("v1/rates/0", "1.05"), ("minimum", "0.95")]
    assert str(invoice.total) == "12.00"
    again = metered.close()
    assert (again.numbers, again.accounts) == ((), 0)
    assert finals(metered) == [invoice]


def test_what_comes_late_is_on_the_next_invoice(metered: Place) -> None:
    metered.add(used(50_000))
    metered.close()
    [first] = finals(metered)
    assert items(first) == [("base_fee", "10.00"), ("v1/rates/0", "0.50"), ("minimum", "1.50")]
    metered.add(used(450_000), used(1_000, at=DECEMBER))
    metered.close("2023-12")
    [second] = finals(metered, "2023-12")
    assert items(second) == [
        ("base_fee", "10.00"),
        ("v1/rates/0", "0.01"),
        ("minimum", "1.99"),
        # 500,000 in two tiers come to 1.40, and with the base fee there is less to the minimum.
        ("2023-11/v1/rates/0", "0.90"),
        ("2023-11/minimum", "-0.90"),
    ]
    late = second.items[3]
    assert (late.quantity, late.exact_amount, late.already_billed, late.period) == (
        Decimal(500_000),
        Decimal("1.4"),
        Decimal("0.50"),
        "2023-11",
    )
    assert finals(metered) == [first]
    # And no second time.
    metered.close("2024-01")
    assert [items(each) for each in finals(metered, "2024-01")] == [[("base_fee", "10.00"), ("minimum", "2.00")]]


def test_drafts_show_what_came_late_and_final_documents_stay(metered: Place) -> None:
    metered.add(used(50_000))
    metered.close()
    metered.cycle()
    before = metered.files()
    assert {name for name in before if name.startswith("2023-11/invoices/")} == {
        f"2023-11/invoices/INV-000001.{kind}" for kind in ("csv", "html", "json")
    }
    metered.add(used(2_000_000))
    metered.cycle()
    assert {name: content for name, content in metered.files().items() if "invoices" in name} == {
        name: content for name, content in before.items() if "invoices" in name
    }
    metered.cycle("2023-12")
    draft = metered.invoices("2023-12")["acme"]
    assert (draft.status, draft.number) == ("draft", None)
    assert [item.period for item in draft.items] == [None, None, "2023-11", "2023-11"]


def test_a_correction_of_a_closed_period_is_given_back(metered: Place) -> None:
    wrong = used(3_000_000)
    metered.add(used(1_000_000), wrong)
    metered.close()
    with metered.meter() as meter:
        meter.correct(wrong.event_id, usage=TokenUsage(input_tokens=1_000), reason="counted twice")
    metered.close("2023-12")
    [invoice] = finals(metered, "2023-12")
    assert items(invoice)[-2:] == [("2023-11/v1/rates/0", "-3.00"), ("2023-11/minimum", "0.10")]
    assert str(invoice.total) == "9.10"


def test_cents_carry(place: Place) -> None:
    """A third of a cent each time: the documents add up to the rounded whole, whatever they were cut into."""
    place.plans(
        '[plans.thirds]\nretention_days = 1\nrates = [{ line = "*", metric = "requests", type = "per_unit", '
        'unit_amount = "0.0033333333" }]'
    )
    place.account("acme", "thirds")
    place.add(used(1))
    place.close()
    amounts = [finals(place)[0].total]
    for month in ("2023-12", "2024-01", "2024-02", "2024-03"):
        place.add(used(1))
        place.close(month)
        amounts += [each.total for each in finals(place, month)]
    assert [str(amount) for amount in amounts] == ["0.00", "0.01", "0.01"]  # nothing to bill, no document


def test_a_void_takes_all_back_and_the_next_invoice_bills_it_again(metered: Place) -> None:
    metered.add(used(1_000_000))
    metered.close()
    assert (
        void_invoice(metered.ledger_url, "INV-000001", DECEMBER, actor="finance", reason="wrong address")
        == "INV-000002"
    )
    invoice, voided = finals(metered)
    assert (voided.kind, voided.names, voided.total) == ("void", "INV-000001", -invoice.total)
    assert [item.amount for item in voided.items] == [-item.amount for item in invoice.items]
    with pytest.raises(InvoiceConflict, match="INV-000001: was voided by INV-000002"):
        void_invoice(metered.ledger_url, "INV-000001", DECEMBER, actor="finance", reason="again")
    with pytest.raises(InvoiceConflict, match="INV-000002: is a void, and no invoice"):
        void_invoice(metered.ledger_url, "INV-000002", DECEMBER, actor="finance", reason="back")
    with pytest.raises(UnknownInvoice):
        void_invoice(metered.ledger_url, "INV-000009", DECEMBER, actor="finance", reason="none")
    metered.close("2023-12")
    [next_one] = finals(metered, "2023-12")
    assert [each for each in items(next_one) if each[0].startswith("2023-11/")] == [
        (f"2023-11/{item.item_id}", str(item.amount)) for item in invoice.items
    ]


def test_a_credit_note_gives_back_at_once_what_was_billed_too_much(metered: Place) -> None:
    wrong = used(3_000_000)
    metered.add(wrong)
    metered.close()
    with pytest.raises(InvoiceConflict, match="INV-000001: nothing was billed too much of 2023-11"):
        credit_invoice(metered.ledger_url, metered.warehouse, "INV-000001", DECEMBER, actor="finance", reason="-")
    with metered.meter() as meter:
        meter.correct(wrong.event_id, usage=TokenUsage(input_tokens=2_000_000), reason="counted twice")
    metered.aggregate()
    number = credit_invoice(
        metered.ledger_url, metered.warehouse, "INV-000001", DECEMBER, actor="finance", reason="counted twice"
    )
    assert number == "INV-000002"
    note = finals(metered)[1]
    assert (note.kind, note.names, items(note)) == ("credit_note", "INV-000001", [("2023-11/v1/rates/0", "-1.00")])
    metered.close("2023-12")
    assert not [each for each in items(finals(metered, "2023-12")[0]) if each[0].startswith("2023-11/")]


def test_a_credit_note_leaves_nothing_behind(metered: Place) -> None:
    """What was billed too little of other items is on it too, so that the period is billed in full."""
    wrong = used(3_000_000)
    metered.add(wrong, used(100_000))
    metered.close()
    with metered.meter() as meter:
        meter.correct(wrong.event_id, usage=TokenUsage(), reason="never happened")
    metered.aggregate()
    credit_invoice(metered.ledger_url, metered.warehouse, "INV-000001", DECEMBER, actor="finance", reason="x")
    assert items(finals(metered)[1]) == [("2023-11/v1/rates/0", "-3.00"), ("2023-11/minimum", "1.00")]
    metered.add(used(1_000_000))
    metered.close("2023-12")
    late = [each for each in items(finals(metered, "2023-12")[0]) if each[0].startswith("2023-11/")]
    assert late == [("2023-11/v1/rates/0", "1.00"), ("2023-11/minimum", "-1.00")]


def test_what_is_owed_of_a_period_is_not_credited(metered: Place) -> None:
    """Too much of one item, but too little in all: it waits for the next invoice, as a whole."""
    wrong = used(2_000_000, account="acme")
    metered.add(wrong)
    metered.close()
    with metered.meter() as meter:
        meter.correct(wrong.event_id, usage=TokenUsage(), reason="never happened")
    metered.add(used(9_000_000))
    metered.aggregate()
    with pytest.raises(InvoiceConflict, match="nothing was billed too much of 2023-11"):
        credit_invoice(metered.ledger_url, metered.warehouse, "INV-000001", DECEMBER, actor="finance", reason="x")
    metered.close("2023-12")
    assert [each for each in items(finals(metered, "2023-12")[0]) if each[0].startswith("2023-11/")] == [
        ("2023-11/v1/rates/0", "7.00")
    ]


@pytest.mark.parametrize("number", ["INV-0000001", "INV-00000001", "INV-1", "inv-000001", "INV-000001 "])
def test_a_number_has_one_spelling(metered: Place, number: str) -> None:
    metered.close()
    with pytest.raises(UnknownInvoice):
        void_invoice(metered.ledger_url, number, DECEMBER, actor="finance", reason="x")


def test_what_came_late_and_cannot_be_priced_waits_by_itself(place: Place) -> None:
    place.plans(
        PLAN + '[plans.resale]\nretention_days = 1\nrates = [{ line = "*", type = "cost_plus", markup_percent = 20 }]'
    )
    place.account("acme", "resale")
    place.close()
    place.add(used(5, model="mystery"), used(5, at=DECEMBER))
    closed = place.close("2023-12")
    assert closed.accounts == 1
    [(account, why)] = closed.refused
    assert (account, why.partition(":")[0]) == ("acme", "what came late for 2023-11 waits")
    assert "which is not known for 1 of the requests" in why
    assert [problem[0] for problem in place.invoice("2024-01")] == ["acme"]


def test_a_credit_note_is_in_the_currency_of_its_invoice(place: Place) -> None:
    place.plans(PLAN + PLAN.replace("metered", "euros").replace("retention_days", 'currency = "EUR"\nretention_days'))
    place.account("acme", "metered")
    place.close()
    with Meter(place.ledger_url, clock=lambda: datetime(2023, 12, 1, tzinfo=UTC)) as meter:
        meter.accounts.change_plan("acme", plan="euros")
    wrong = used(3_000_000, at=DECEMBER)
    place.add(wrong, used(9_000_000))
    place.close("2023-12")
    with place.meter() as meter:
        meter.correct(wrong.event_id, usage=TokenUsage(), reason="never happened")
    place.aggregate()
    assert [each.currency for each in finals(place, "2023-12")] == ["EUR", "USD"]
    with pytest.raises(InvoiceConflict, match="INV-000003: is in USD, and 2023-12 is billed in EUR"):
        credit_invoice(place.ledger_url, place.warehouse, "INV-000003", DECEMBER, actor="finance", reason="x")
    credit_invoice(place.ledger_url, place.warehouse, "INV-000002", DECEMBER, actor="finance", reason="x")


def test_another_currency_is_a_document_of_its_own(place: Place) -> None:
    place.plans(PLAN + PLAN.replace("metered", "euros").replace("retention_days", 'currency = "EUR"\nretention_days'))
    place.account("acme", "metered")
    place.add(used(100_000))
    place.close()
    with Meter(place.ledger_url, clock=lambda: datetime(2023, 12, 1, tzinfo=UTC)) as meter:
        meter.accounts.change_plan("acme", plan="euros")
    place.add(used(5_000_000))
    place.close("2023-12")
    found = finals(place, "2023-12")
    assert [(each.currency, each.reference, items(each)) for each in found] == [
        ("EUR", "acme-2023-12", [("base_fee", "10.00"), ("minimum", "2.00")]),
        ("USD", "acme-2023-12-USD", [("2023-11/v1/rates/0", "5.00"), ("2023-11/minimum", "-1.00")]),
    ]


def test_numbers_are_of_an_issuer(metered: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    metered.add(used(1))
    metered.close()
    monkeypatch.setenv("METERING_ISSUER", "ACME-EU")
    assert metered.close("2023-12").numbers == ("ACME-EU-000001",)
    monkeypatch.delenv("METERING_ISSUER")
    assert metered.close("2024-01").numbers == ("INV-000002",)


def test_every_document_is_computed_again_from_what_was_frozen(metered: Place) -> None:
    wrong = used(2_000_000)
    metered.add(wrong, used(7))
    metered.close()
    with metered.meter() as meter:
        meter.correct(wrong.event_id, usage=TokenUsage(input_tokens=1_000), reason="counted twice")
    metered.aggregate()
    credit_invoice(metered.ledger_url, metered.warehouse, "INV-000001", DECEMBER, actor="finance", reason="x")
    metered.add(used(9_000_000))
    metered.close("2023-12")
    void_invoice(metered.ledger_url, "INV-000003", DECEMBER, actor="finance", reason="x")
    metered.close("2024-01")
    with closing(Ledger(metered.ledger_url)) as ledger, ledger.read() as connection:
        for number in range(1, 6):
            found = document(connection, f"INV-{number:06d}")
            assert recomputed(connection, found) == found.document
            assert hashlib.sha256(found.document).hexdigest() == found.document_digest
        assert chain_faults(connection) == []


def test_a_period_that_is_not_over_stays_open(metered: Place) -> None:
    metered.add(used(1))
    closed = metered.close(at=datetime(2023, 11, 30, 23, 59, 59, tzinfo=UTC))
    assert (closed.numbers, closed.accounts, closed.not_over) == ((), 0, 1)
    assert metered.close(at=datetime(2023, 12, 1, tzinfo=UTC)).numbers == ("INV-000001",)


def test_periods_end_where_the_account_is(metered: Place) -> None:
    metered.account("tokyo", "metered", time_zone="Asia/Tokyo")
    closed = metered.close(at=datetime(2023, 11, 30, 15, tzinfo=UTC))
    assert (closed.accounts, closed.not_over) == (1, 1)
    assert [invoice.account for invoice in finals(metered)] == ["tokyo"]


def test_a_warehouse_that_lacks_what_was_billed_closes_nothing(metered: Place) -> None:
    metered.add(used(1), used(2))
    metered.close()
    metered.tamper("DELETE FROM usage_events WHERE seq = 1")
    with pytest.raises(WarehouseError, match="has 1 events of account 'acme' in 2023-11, but 2 were billed"):
        metered.close("2023-12")


def test_what_another_run_has_frozen_meanwhile_is_not_forgotten(metered: Place) -> None:
    metered.add(used(1))
    metered.close()
    metered.add(used(1_000_000))
    metered.aggregate()
    with closing(Ledger(metered.ledger_url)) as ledger:
        with open_for_reading(metered.warehouse) as connection, ledger.read() as known:
            inputs = {
                month: open_inputs(known, loaded(connection, month), month, DECEMBER)[0]
                for month in ("2023-12", "2024-01")
            }
            late = late_inputs(known, connection)["acme"]
        metered.add(used(1_000_000))
        metered.close("2024-01")
        act = act_of(Settings(), "finance", DECEMBER)
        with pytest.raises(Conflict, match="has 3 events frozen, and 2 are known here"), ledger.write() as writing:
            close_period(writing, inputs["2023-12"], late, act)
        with pytest.raises(PeriodClosed), ledger.write() as writing:
            close_period(writing, inputs["2024-01"], [], act)
        with ledger.read() as connection:
            assert set(frozen_of(connection)["acme"]) == {"2023-11", "2024-01"}


def test_what_a_closed_period_cost_stays(metered: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    metered.add(used(1))
    metered.close()
    monkeypatch.setattr(costs, "price_version", lambda: "other prices")
    act = Act(period=PERIOD, actor="ann", reason="new prices", made_at=DECEMBER)
    with pytest.raises(JobError, match="period 2023-11 is closed for 1 accounts: what was billed stays"):
        recost_period.fn(metered.ledger_url, metered.warehouse, act, dry_run=False)
    assert metered.ledger_rows("SELECT count(*) FROM recosts") == [(0,)]


def test_what_changes_while_a_period_is_closed_is_seen(metered: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between reading and writing: nothing of that account is written, and the next run has it right."""
    metered.aggregate()

    def and_move(*args: Any) -> dict[str, list[str]]:
        with metered.meter() as meter:
            meter.accounts.update("acme", anchor_day=5)
        return {}

    with monkeypatch.context() as patch:
        patch.setattr(closing_task, "obstacles", and_move)
        closed = metered.close_loaded(PERIOD)
    assert closed.refused == (("acme", "the plan or the period of account 'acme' was changed meanwhile: close again"),)
    assert metered.close(at=datetime(2023, 12, 6, tzinfo=UTC)).accounts == 1
    assert str(finals(metered)[0].period_end) == "2023-12-05 00:00:00+00:00"
