from __future__ import annotations

import csv
import io
import re
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import UndefinedError

from metering.billing.money import quotient
from reports.invoice import CSV_COLUMNS, invoice_csv, invoice_html
from reports.pages import page

HOSTILE = "<script>alert('x')</script>"


def words_of(html: str) -> str:
    """What a reader sees, without markup and with single spaces."""
    body = html[html.index("<body>") :]
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def rows_of(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text, newline=""), strict=True))


def test_the_page_shows_who_owes_what_for_when(make: Any) -> None:
    words = words_of(invoice_html(make.invoice()))
    for said in (
        "DRAFT",
        "acme-2023-11",
        "Acme Robotics 12 Harbour Street Portland Account acme",
        "Period 1 November 2023 to 30 November 2023",
        "Issue date 1 December 2023",
        "Base fee 49.00 49.00",
        "Input tokens 18,059,974 2.50 USD per 1,000,000 45.149935 45.15",
        "Total 94.15 USD",
        "8,819 requests; 18,059,974 input tokens; 245,896 output tokens.",
    ):
        assert said in words


def test_an_account_without_a_name_is_billed_by_its_id(make: Any) -> None:
    assert "Bill to acme Account acme" in words_of(invoice_html(make.invoice(name=None, address=())))


def test_usage_is_summed_per_line_and_model(make: Any) -> None:
    usage = (
        make.usage(requests=1, service_tier="batch"),
        make.usage(line="learnings", provider=None, model=None, requests=5, quantity=Decimal("2.5"), input_tokens=0),
        make.usage(requests=2, plan_version=2),
    )
    words = words_of(invoice_html(make.invoice(usage=usage)))
    assert "application gpt-4.1 openai 3 36,119,948 2,469,134 491,792 15,308 0 learnings \N{EN DASH} 5 0" in words
    assert "Total 8 36,119,948 3,703,701 737,688 22,962 2.5" in words


def test_quantities_of_different_lines_are_not_summed(make: Any) -> None:
    usage = tuple(make.usage(line=line, quantity=Decimal(111), reasoning_tokens=0) for line in ("pages", "seats"))
    html = invoice_html(make.invoice(usage=usage))
    assert html.count(">111<") == 2
    assert ">222<" not in html
    assert html.rindex('<td class="number"></td>') > html.rindex("<tfoot>")


def test_an_amount_without_end_is_whole_in_the_title_and_the_csv(make: Any) -> None:
    invoice = make.invoice(items=(make.item(exact_amount=quotient(Decimal(50), 3), amount=Decimal("16.67")),))
    whole = "16." + "6" * 39 + "7"
    assert f'title="{whole}">16.666666666666\N{HORIZONTAL ELLIPSIS}<' in invoice_html(invoice)
    assert rows_of(invoice_csv(invoice))[1][8] == whole


def test_a_cost_plus_quantity_is_money(make: Any) -> None:
    rate = {"line": "*", "type": "cost_plus", "markup_percent": "20"}
    words = words_of(invoice_html(make.invoice(items=(make.item(quantity=Decimal("31.25"), rate=rate),))))
    assert "31.25 USD provider cost plus 20% 45.149935" in words


def test_provider_cost_stays_with_the_seller(make: Any) -> None:
    assert "31.2" not in words_of(invoice_html(make.invoice()))


def test_hostile_names_are_text(make: Any) -> None:
    item = make.item(description=HOSTILE, rate=None)
    usage = (make.usage(line=HOSTILE, model=HOSTILE, provider=HOSTILE),)
    html = invoice_html(
        make.invoice(
            name=HOSTILE,
            address=(HOSTILE,),
            account=HOSTILE,
            reference=HOSTILE,
            plan=HOSTILE,
            items=(item,),
            usage=usage,
        )
    )
    assert "<script" not in html
    assert html.count("&lt;script&gt;") == 10  # reference twice: heading and title


def test_the_page_needs_nothing_else(make: Any) -> None:
    html = invoice_html(make.invoice())
    assert not re.findall(r"https?://|<script|<img|\bsrc=|@import|url\(", html)


def test_same_invoice_same_bytes(make: Any) -> None:
    assert invoice_html(make.invoice()) == invoice_html(make.invoice())
    assert invoice_csv(make.invoice()) == invoice_csv(make.invoice())


def test_an_empty_invoice_says_so(make: Any) -> None:
    words = words_of(invoice_html(make.invoice(items=(), usage=())))
    assert "Nothing to bill in this period. Total 0.00 USD" in words
    assert "0 requests; 0 input tokens" in words


def test_a_name_the_template_does_not_know_is_an_error(make: Any) -> None:
    with pytest.raises(UndefinedError, match="'title' is undefined"):
        page("invoice.html", invoice=make.invoice(), items=[], totals={})


DRAFT = ("", "invoice", "", "")
"""No number, and nothing of what voids, credit notes and adjustments say."""


def test_csv_rows(make: Any) -> None:
    assert rows_of(invoice_csv(make.invoice())) == [
        list(CSV_COLUMNS),
        ["acme-2023-11", "acme", "2023-11", "base_fee", "Base fee", "", "", "", "49", "49.00", "USD", *DRAFT],
        [
            *("acme-2023-11", "acme", "2023-11", "v3/rates/0", "Input tokens", "application", "input_tokens"),
            *("18059974", "45.149935", "45.15", "USD", *DRAFT),
        ],
    ]


def test_csv_lines_end_as_rfc_4180_says(make: Any) -> None:
    text = invoice_csv(make.invoice())
    assert text.endswith("\r\n")
    assert text.count("\r\n") == text.count("\n") == 3


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_a_cell_that_a_spreadsheet_would_run_is_text(make: Any, start: str) -> None:
    hostile = start + 'HYPERLINK("x")'
    item = make.item(item_id=hostile, description=hostile, line=hostile, metric=hostile)
    row = rows_of(invoice_csv(make.invoice(account=hostile, reference=hostile, items=(item,))))[1]
    assert [row[n] for n in (0, 1, 3, 4, 5, 6)] == ["'" + hostile] * 6


def test_negative_numbers_stay_numbers(make: Any) -> None:
    item = make.item(quantity=Decimal(-3), exact_amount=Decimal("-0.0075"), amount=Decimal("-0.01"))
    assert rows_of(invoice_csv(make.invoice(items=(item,))))[1][7:10] == ["-3", "-0.0075", "-0.01"]


@given(description=st.text(), amount=st.decimals(min_value=-(10**18), max_value=10**18, places=12))
def test_csv_parses_back(make: Any, description: str, amount: Decimal) -> None:
    items = (make.item(description=description, exact_amount=amount), make.item())
    rows = rows_of(invoice_csv(make.invoice(items=items)))
    assert len(rows) == 3
    assert rows[1][4] in (description, "'" + description)
    assert not rows[1][4].startswith(("=", "+", "-", "@", "\t", "\r"))
    assert Decimal(rows[1][8]) == amount


def test_a_final_document_says_what_it_is(make: Any) -> None:
    late = make.item(
        item_id="2023-10/v3/rates/0",
        description="2023-10: Input tokens",
        period="2023-10",
        already_billed=Decimal("40.00"),
        amount=Decimal("5.15"),
    )
    invoice = make.invoice(status="final", number="INV-000007", items=(late,))
    words = words_of(invoice_html(invoice))
    assert words.startswith("Invoice INV-000007, acme-2023-11 FINAL")
    assert "2023-10: Input tokens 40.00 USD billed before" in words
    assert "Items of an earlier period are all of that period's usage as it is known now" in words
    assert rows_of(invoice_csv(invoice))[1][-4:] == ["INV-000007", "invoice", "", "40.00"]
    note = make.invoice(status="final", number="INV-000008", kind="credit_note", names="INV-000007", usage=())
    words = words_of(invoice_html(note))
    assert words.startswith("Credit note INV-000008, ")
    assert "Of invoice INV-000007" in words
    assert rows_of(invoice_csv(note))[1][-4:] == ["INV-000008", "credit_note", "INV-000007", ""]
    assert words_of(invoice_html(make.invoice(kind="void", number="INV-000009"))).startswith("Void INV-000009")
