"""What was issued can be proved: computed again, explained event by event, and asked for at other prices."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from contextlib import closing
from datetime import timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest

from metering.errors import InvoiceConflict
from metering.events import TokenUsage
from metering.history import histories_of
from metering.ledger import Ledger
from metering.ledger.closing import documents_of
from metering.plans import parse_plans
from tasks.closing import void_invoice
from tasks.explain import explain_item
from tasks.rerate import rerate_period, rerated_rows
from tasks.verify import close_differences, document_differences
from tests.tasks.place import NOVEMBER, PERIOD, Place, event, month_of_usage

if TYPE_CHECKING:
    from pathlib import Path

DECEMBER = NOVEMBER + timedelta(days=30)
FINALS = "INV-000001", "INV-000002"
PLAN = """
[plans.metered]
retention_days = 30

[[plans.metered.rates]]
line = "*"
metric = "input_tokens"
type = "per_unit"
unit_amount = "2.00"
per = 1_000_000

[[plans.metered.rates]]
line = "*"
metric = "input_tokens"
type = "per_unit"
unit_amount = "1.00"
per = 1_000_000
match = { model = "gpt-4.1*" }

[[plans.metered.rates]]
line = "*"
metric = "cost"
type = "cost_plus"
markup_percent = "10"

[[plans.metered.rates]]
line = "*"
type = "flat"
amount = "5"
"""


def used(tokens: int, **said: Any) -> Any:
    return event(usage=TokenUsage(input_tokens=tokens), **said)


@pytest.fixture(scope="module")
def two_closes(tmp_path_factory: pytest.TempPathFactory, empty_ledger: Path) -> Path:
    """The home of two periods of one account, the second with what came late for the first."""
    home = tmp_path_factory.mktemp("two_closes") / "home"
    home.mkdir()
    shutil.copy(empty_ledger, home / "ledger.db")
    place = Place(home)
    place.plans(PLAN)
    place.account("acme", "metered")
    place.add(
        used(1_000_000, idempotency_key="one"),
        used(2_000_000, model="claude-sonnet-4-5", provider="anthropic"),
        used(3_000_000, billable=False),
    )
    place.close()
    place.add(used(500_000, idempotency_key="late"), used(7, at=DECEMBER))
    place.close("2023-12")
    for period in (PERIOD, "2023-12"):
        place.invoice(period)
    return home


@pytest.fixture
def closed(two_closes: Path, tmp_path: Path) -> Place:
    """A copy of it for one test."""
    return Place(shutil.copytree(two_closes, tmp_path / "home"))


def test_all_is_as_it_was_issued(closed: Place) -> None:
    for number in FINALS:
        assert document_differences(closed.ledger_url, closed.out, number) == []
    assert close_differences(closed.ledger_url) == []


TAMPERED = [
    (
        "UPDATE invoices SET document = replace(document, '\"acme\"', '\"acne\"')",
        "the document in the ledger has changed",
    ),
    (
        "UPDATE frozen_inputs SET inputs = replace(inputs, '1000000', '1000001')",
        "cannot be computed again: INV-000001: what was frozen of 2023-11 (revision 0) has changed",
    ),
    ("DELETE FROM frozen_inputs WHERE period = '2023-11'", "what was frozen of 2023-11 (revision 0) is missing"),
    (
        "UPDATE plan_versions SET document = replace(document, '\"2\"', '\"3\"')",
        "is not the one that 2023-11 was priced with",
    ),
]


@pytest.mark.parametrize(("statement", "problem"), TAMPERED)
def test_what_was_changed_in_the_ledger_is_named(closed: Place, statement: str, problem: str) -> None:
    closed.forge(statement)
    assert any(problem in each for each in document_differences(closed.ledger_url, closed.out, "INV-000001"))


@pytest.mark.parametrize(
    ("statement", "problem"),
    [
        ("UPDATE closes SET content = replace(content, 'INV-000001', 'INV-000002') WHERE close = 1", "close 1 ("),
        ("DELETE FROM closes WHERE close = 1", "close 2: does not follow"),
        ("DELETE FROM closes WHERE close = 2", "close 1: is the newest"),
        ("UPDATE invoices SET document = document || ' '", "document INV-000001 has changed"),
        ("DELETE FROM frozen_inputs WHERE revision = 1", "what was frozen of 2023-11 has changed"),
    ],
)
def test_the_chain_of_closes_names_what_is_not_as_it_was(closed: Place, statement: str, problem: str) -> None:
    closed.forge(statement)
    assert any(problem in each for each in close_differences(closed.ledger_url))


FORGED = [
    "UPDATE invoices SET total = '1' WHERE number = 2",
    "UPDATE invoices SET actor = 'nobody' WHERE number = 1",
    "UPDATE invoices SET kind = 'void' WHERE number = 1",
    "UPDATE invoices SET html_digest = csv_digest WHERE number = 2",
    "DELETE FROM invoice_items WHERE seq = (SELECT max(seq) FROM invoices); "
    "DELETE FROM invoices WHERE seq = (SELECT max(seq) FROM invoices)",
    "UPDATE invoice_items SET amount = '0' WHERE seq = (SELECT max(seq) FROM invoices) AND position = 0",
    "INSERT INTO invoice_items SELECT seq, 99, account, period, item_id, '-5' FROM invoice_items WHERE position = 0",
    "INSERT INTO frozen_inputs SELECT account, period, 9, frozen_at, 'x', inputs FROM frozen_inputs WHERE revision = 0",
    "UPDATE issuers SET last_number = 9",
    "UPDATE closes SET actor = 'nobody' WHERE close = 1",
    "UPDATE closes SET override = 'why' WHERE close = 2",
]


@pytest.mark.parametrize("statements", FORGED)
def test_no_forgery_is_overlooked(closed: Place, statements: str) -> None:
    void_invoice(closed.ledger_url, "INV-000001", DECEMBER, actor="finance", reason="x")
    assert close_differences(closed.ledger_url) == []
    for statement in statements.split("; "):
        closed.forge(statement)
    assert close_differences(closed.ledger_url) != []


def test_a_final_row_is_replaced_by_no_other(closed: Place) -> None:
    for statement in (
        "INSERT OR REPLACE INTO invoices SELECT 77, issuer, number, kind, names, account, period, currency, '1', "
        "issued_at, actor, reason, inputs, document, document_digest, csv_digest, html_digest, previous, digest "
        "FROM invoices LIMIT 1",
        "INSERT OR REPLACE INTO closes SELECT 77, account, period, period_end, closed_at, 'me', override, content, "
        "previous, digest FROM closes LIMIT 1",
    ):
        with pytest.raises(Exception, match="is append-only"):
            closed.change(statement)


def test_the_ledger_refuses_to_change_what_is_final(closed: Place) -> None:
    for table in ("closes", "frozen_inputs", "invoices", "invoice_items"):
        for statement in (f"DELETE FROM {table}", f"UPDATE {table} SET account = 'other'"):
            with pytest.raises(Exception, match=f"{table} is append-only"):
                closed.change(statement)


@pytest.mark.parametrize("kind", ["json", "csv", "html"])
def test_one_byte_of_a_file_is_named_and_written_again(closed: Place, kind: str) -> None:
    path = closed.out / PERIOD / "invoices" / f"INV-000001.{kind}"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert document_differences(closed.ledger_url, closed.out, "INV-000001") == [
        f"{path}: is not the file that was issued"
    ]
    path.unlink()
    [missing] = document_differences(closed.ledger_url, closed.out, "INV-000001")
    assert missing == f"{path}: is missing: `python -m flows bill-period --period 2023-11` writes it"
    closed.invoice()
    assert document_differences(closed.ledger_url, closed.out, "INV-000001") == []


def test_an_item_is_its_events(closed: Place) -> None:
    explained = explain_item(closed.ledger_url, closed.warehouse, "INV-000001", "v1/rates/1")
    assert [(each.idempotency_key, each.quantity) for each in explained.events] == [("one", Decimal(1_000_000))]
    dear = explain_item(closed.ledger_url, closed.warehouse, "INV-000001", "v1/rates/0")
    assert [(each.model, each.quantity) for each in dear.events] == [("claude-sonnet-4-5", Decimal(2_000_000))]
    cost = explain_item(closed.ledger_url, closed.warehouse, "INV-000001", "v1/rates/2")
    assert len(cost.events) == 2
    # What came late is on the later document, with all else of its period.
    late = explain_item(closed.ledger_url, closed.warehouse, "INV-000002", f"{PERIOD}/v1/rates/1")
    assert {each.idempotency_key for each in late.events} == {"one", "late"}
    assert late.quantity == 1_500_000
    rows = list(csv.DictReader(late.lines(as_json=False)))
    assert {(row["idempotency_key"], row["quantity"]) for row in rows} == {("one", "1000000"), ("late", "500000")}
    documents = [json.loads(line) for line in late.lines(as_json=True)]
    assert {UUID(each["event_id"]) for each in documents} == {each.event_id for each in late.events}


def test_what_has_no_events_says_so(closed: Place) -> None:
    void_invoice(closed.ledger_url, "INV-000001", DECEMBER, actor="finance", reason="x")
    for number, item, problem in (
        ("INV-000001", "v1/rates/3", "item v1/rates/3 is a fixed amount: no event is behind it"),
        ("INV-000001", "v9/rates/0", "has no item 'v9/rates/0', only v1/rates/0, v1/rates/1, v1/rates/2, v1/rates/3"),
        ("INV-000003", "2023-11/v1/rates/1", "is a void: explain the same item of INV-000001"),
    ):
        with pytest.raises(InvoiceConflict) as refused:
            explain_item(closed.ledger_url, closed.warehouse, number, item)
        assert str(refused.value) == f"{number}: {problem}"
    closed.tamper("UPDATE usage_events SET input_tokens = input_tokens + 1 WHERE idempotency_key = 'one'")
    with pytest.raises(InvoiceConflict, match="bills 1000000, but the events of the warehouse come to 1000001"):
        explain_item(closed.ledger_url, closed.warehouse, "INV-000001", "v1/rates/1")


def test_every_usage_item_of_a_month_is_explained(place: Place) -> None:
    month_of_usage(place, events=300)
    assert len(place.close(override="no price for one model").refused) == 1
    with closing(Ledger(place.ledger_url)) as ledger, ledger.read() as connection:
        finals = [each.invoice for each in documents_of(connection, period=PERIOD)]
    explained = 0
    for invoice in finals:
        for item in invoice.items:
            if item.quantity is not None:
                assert invoice.number is not None
                found = explain_item(place.ledger_url, place.warehouse, invoice.number, item.item_id)
                assert found.quantity == item.quantity
                explained += 1
    assert explained > 10


def test_other_prices_are_a_dry_run(closed: Place) -> None:
    before = hashlib.sha256(repr(closed.ledger_rows("SELECT * FROM invoices")).encode()).hexdigest()
    other = parse_plans(PLAN.replace('unit_amount = "1.00"', 'unit_amount = "3.00"'))
    [row] = rerate_period(closed.ledger_url, closed.warehouse, PERIOD, other, DECEMBER)
    assert (row.account, row.problem, row.difference) == ("acme", None, Decimal("3.00"))  # 1.5 million at 2.00 more
    shown = rerated_rows([row])
    assert shown[-1]["difference"] == Decimal("3.00")
    [unchanged] = rerate_period(closed.ledger_url, closed.warehouse, PERIOD, {}, DECEMBER)
    assert unchanged.difference == 0
    assert hashlib.sha256(repr(closed.ledger_rows("SELECT * FROM invoices")).encode()).hexdigest() == before


def test_a_fact_is_traced_to_its_final_document(closed: Place) -> None:
    closed.add(used(9, idempotency_key="latest"))
    closed.cost()

    def billed(key: str) -> tuple[str, tuple[str, ...]]:
        with closing(Ledger(closed.ledger_url)) as ledger:
            [history] = histories_of(ledger, key, out=closed.out)
        [bill] = history.bills
        return bill.says, () if bill.document is None else bill.document.items

    # The newest document that has it, with all that came late.
    assert billed("one")[0] == "in INV-000002 (final)"
    assert billed("one")[1][0] == "2023-11/v1/rates/1: 1500000 for 0.50 USD"
    assert billed("late")[0] == "in INV-000002 (final)"
    assert billed("latest")[0] == "it came after its period was closed: it is on the account's next invoice"
    # A later invoice without anything of that period changes nothing.
    closed.close("2024-01")
    assert billed("one")[0] == "in INV-000002 (final)"
    void_invoice(closed.ledger_url, "INV-000002", DECEMBER, actor="finance", reason="x")
    assert billed("one")[0] == "INV-000002 was voided: it is on the account's next invoice"
    closed.close("2024-02")
    assert billed("one")[0].startswith("in INV-000005 (final)")
