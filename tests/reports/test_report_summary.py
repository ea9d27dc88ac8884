from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

import pytest

from reports import charts
from reports.summary import summary_html

HOSTILE = "<script>alert('x')</script>"


def words_of(html: str) -> str:
    """What a reader sees outside the plots, without markup and with single spaces."""
    body = re.sub(r"<svg.*?</svg>", " ", html[html.index("<body>") :], flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def texts_of(figure: charts.Figure) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", "".join(figure.pictures))


@pytest.fixture(scope="module")
def html(make: Any) -> str:
    return summary_html(make.summary(problems=(("kelp", "no rate"),)))


def test_headline_totals(html: str) -> None:
    words = words_of(html)
    for said in (
        "Revenue 94.15 USD Provider cost 62.40 USD Margin 31.75 USD 33.7% of revenue",
        "Accounts billed 2 Requests 17,638 Tokens 36,611,740 36,119,948 input, 491,792 output",
        "Not billed: 1 account kelp : no rate",
        "Total of 2 in USD 17,638 36,119,948 491,792 94.15 USD 62.40 31.75",
        "2 November 2023 20 2,000,000 0.25",
    ):
        assert said in words


def test_currencies_are_never_added(make: Any) -> None:
    accounts = (
        make.account("euro", currency="EUR", total=Decimal(500)),
        make.account("small", total=Decimal(1), unpriced_requests=7),
        make.account("large", total=Decimal(10)),
    )
    words = words_of(summary_html(make.summary(accounts=accounts)))
    assert "Revenue 11.00 USD 500.00 EUR Provider cost 93.60 USD without 7 requests of unknown price" in words
    assert "Margin -51.40 USD -467.3% of revenue in USD; other currencies have none" in words
    assert words.index("large pro") < words.index("small pro") < words.index("euro pro")
    assert "Total of 1 in EUR 8,819 18,059,974 245,896 500.00 EUR 31.20 \N{EN DASH}" in words


def test_an_account_is_counted_once_and_its_documents_stay_together(make: Any) -> None:
    accounts = (
        make.account("zeta", number="INV-000002", total=Decimal(50)),
        make.account("acme", number="INV-000003", total=Decimal(-100), provider_cost=Decimal(0), about="void of INV-1"),
        make.account("acme", number="INV-000001", total=Decimal(100)),
        make.account("acme", number="INV-000004", total=Decimal(7), currency="EUR", plan=None),
    )
    html = summary_html(make.summary(accounts=accounts))
    words = words_of(html)
    assert "Accounts billed 2 " in words
    assert "Total of 2 in USD" in words
    assert "Total of 1 in EUR" in words
    assert "Invoice totals of 2 accounts, by the plan" in words
    assert "All 2 accounts billed in USD" in words
    assert re.findall(r"INV-00000\d(?= HTML)", words) == ["INV-000002", "INV-000001", "INV-000003", "INV-000004"]
    assert "acme void of INV-1 pro" in words
    assert 'aria-label="INV-000003 of acme as HTML"' in html
    assert 'aria-label="Revenue by plan in EUR, bars: (earlier periods) 7.00."' in html
    assert 'aria-label="Revenue by plan in USD, bars: pro 50.00."' in html


def test_the_margin_of_an_account_is_that_of_its_documents(make: Any) -> None:
    cost = Decimal(30)
    undone = (
        make.account("acme", number="A-1", total=Decimal(100), provider_cost=cost),
        make.account("acme", number="A-2", total=Decimal(-100), provider_cost=Decimal(0)),
    )
    assert "Margin -30.00 USD" in words_of(summary_html(make.summary(accounts=undone)))
    unknown = (make.account("acme", number="A-1", total=Decimal(100), margin=None), undone[1])
    assert "Margin \N{EN DASH} where billed in USD" in words_of(summary_html(make.summary(accounts=unknown)))


def test_models_without_a_price_are_counted(make: Any) -> None:
    words = words_of(summary_html(make.summary(models=(make.model("mystery", None, unpriced_requests=1_003),))))
    assert "mystery \N{EN DASH} 4 9,000 500 1.50 1,003 unpriced" in words


def test_each_account_links_to_its_invoice(make: Any) -> None:
    html = summary_html(make.summary(accounts=(make.account("a:b c", invoice_href="javascript:x/a b"),)))
    assert re.findall(r'<a href="([^"]*)"', html) == [
        f"javascript%3Ax/a%20b.{kind}" for kind in ("html", "csv", "json")
    ]


def test_hostile_names_are_text_in_page_and_plots(make: Any) -> None:
    html = summary_html(
        make.summary(
            accounts=(make.account(HOSTILE, name=HOSTILE, plan=HOSTILE),),
            days=(make.day(1, HOSTILE),),
            models=(make.model(HOSTILE, HOSTILE), make.model(HOSTILE, None)),
            problems=((HOSTILE, HOSTILE),),
        )
    )
    assert "<script" not in html
    assert html.count("<svg") == 4


def test_the_page_needs_nothing_else(html: str) -> None:
    assert not re.findall(r"https?://|<script|<img|<image|\bsrc=|@import", html)


def test_every_plot_has_words_for_those_who_do_not_see_it(html: str) -> None:
    labels = re.findall(r'<svg role="img" aria-label="([^"]{30,})"', html)
    assert len(labels) == html.count("<svg") == html.count("<figcaption>") == 4
    assert labels[0] == ("Usage by day, stacked bars. 6M tokens over 3 days; the busiest was 1 November 2023 with 2M.")


def test_ids_of_the_plots_do_not_meet(html: str) -> None:
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids))


def test_an_empty_period_has_sentences_for_plots(make: Any) -> None:
    html = summary_html(make.summary(accounts=(), days=(), models=()))
    assert "<svg" not in html
    words = words_of(html)
    assert words.count("No tokens were used in this period.") == 2
    assert "Known where an account is billed in USD" in words
    assert "Accounts No account was billed in this period." in words


def test_days_without_usage_keep_their_place(make: Any) -> None:
    figure = charts.usage_by_day([make.day(1), make.day(5)])
    assert [text for text in texts_of(figure) if text.endswith("Nov")] == ["1 Nov", "2 Nov", "3 Nov", "4 Nov", "5 Nov"]


def test_the_smallest_series_become_others(make: Any) -> None:
    days = [make.day(1, f"model-{n}", tokens=10**n) for n in range(1, 10)]
    texts = texts_of(charts.usage_by_day(days))
    assert {f"model-{n}" for n in range(4, 10)} | {"3 others"} <= set(texts)
    assert "model-3" not in texts
    seven = texts_of(charts.usage_by_day(days[2:]))
    assert {f"model-{n}" for n in range(3, 10)} <= set(seven)


def test_axes_have_titles_and_short_numbers(make: Any) -> None:
    texts = texts_of(charts.usage_by_day([make.day(1, tokens=12_000_000_000)]))
    assert {"Day", "Tokens", "12B", "0"} <= set(texts)


def test_tokens_beyond_64_bits_are_drawn(make: Any) -> None:
    figure = charts.usage_by_day([make.day(1, tokens=2**64), make.day(2, tokens=2**70)])
    assert figure.note.startswith("1199038364.8T tokens over 2 days")
    assert len(figure.pictures) == 1


def test_small_money_is_not_written_in_thousandths(make: Any) -> None:
    account = make.account("acme", total=Decimal("0.05"), provider_cost=Decimal("0.02"))
    texts = texts_of(charts.margin_by_account([account]))
    assert "0.01" in texts
    assert not [text for text in texts if re.fullmatch(r"[\d.]+m", text)]


def test_models_of_one_name_are_told_apart_by_provider(make: Any) -> None:
    rows = [make.model("gpt-4.1", "openai"), make.model("gpt-4.1", "azure"), make.model("o4-mini", "openai")]
    texts = texts_of(charts.usage_by_model(rows))
    assert {"gpt-4.1 (openai)", "gpt-4.1 (azure)", "o4-mini"} <= set(texts)


def test_revenue_has_one_picture_a_currency(make: Any) -> None:
    accounts = [make.account("a"), make.account("b", plan="free", total=Decimal(0)), make.account("c", currency="EUR")]
    figure = charts.revenue_by_plan(accounts)
    assert len(figure.pictures) == 2
    assert 'aria-label="Revenue by plan in USD, bars: pro 94.15, free 0.00."' in figure.pictures[0]
    assert {"Revenue, EUR", "94.15"} <= set(re.findall(r"<text[^>]*>([^<]*)<", figure.pictures[1]))


def test_margin_shows_the_ten_largest(make: Any) -> None:
    accounts = [make.account(f"account-{n:02}", total=Decimal(n)) for n in range(12)]
    figure = charts.margin_by_account(accounts)
    assert figure.note.startswith("The top 10 of 12 accounts billed in USD, by invoice total.")
    assert [t for t in texts_of(figure) if t.startswith("account-")] == [f"account-{n:02}" for n in range(11, 1, -1)]
