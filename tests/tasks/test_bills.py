"""Bills: the right events on the right invoice, each account for itself, and files that stay where they belong."""

from __future__ import annotations

import re
import resource
import signal
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from importlib.metadata import version
from typing import TYPE_CHECKING
from uuid import UUID

import pytest

from metering.events import TokenUsage
from metering.windows import period_of_month
from tasks.bills import _account_row, file_stem
from tasks.errors import ReportError, WarehouseError
from tasks.verify import invoice_differences, rollup_differences
from tests.tasks.place import PERIOD, Place, event, month_of_usage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

AZURE = """
[plans.azure]
retention_days = 30
rates = [
  { line = "*", metric = "input_tokens", type = "per_unit", unit_amount = "2.50", per = 1_000_000 },
  { line = "*", metric = "output_tokens", type = "per_unit", unit_amount = "10.00", per = 1_000_000 },
]
"""
MICROSECOND = timedelta(microseconds=1)


def shares(total: int, count: int) -> list[int]:
    """Uneven parts that add up to `total`."""
    parts = [total // count + (number % 3 - 1) * 7 for number in range(count - 1)]
    return [*parts, total - sum(parts)]


def test_the_worked_example(place: Place) -> None:
    place.plans(AZURE)
    used = {"code": (8_819, 18_059_974, 245_896), "conv": (19_366, 22_361_870, 4_088_665)}
    for account, (calls, given, generated) in used.items():
        place.account(account, "azure")
        # A tenth of the calls: what counts is that their tokens add up to the traces' own totals.
        tokens = zip(shares(given, calls // 10), shares(generated, calls // 10), strict=True)
        usages = [TokenUsage(input_tokens=read, output_tokens=written) for read, written in tokens]
        place.add(*(event(account, usage=usage, model=None, provider=None) for usage in usages))
    assert place.cycle() == []
    code, conv = place.invoices()["code"], place.invoices()["conv"]
    assert (code.requests, code.input_tokens, code.output_tokens) == (881, 18_059_974, 245_896)
    assert [item.amount for item in code.items] == [Decimal("45.15"), Decimal("2.46")]
    assert code.total == Decimal("47.61")
    assert (conv.input_tokens, conv.output_tokens) == (22_361_870, 4_088_665)
    assert [item.amount for item in conv.items] == [Decimal("55.90"), Decimal("40.89")]
    assert conv.total == Decimal("96.79")
    index = (place.out / PERIOD / "index.html").read_text()
    assert "47.61" in index
    assert "96.79" in index


def test_the_same_usage_comes_to_the_same_bytes_on_either_ledger(
    tmp_path: Path, sqlite_url: str, postgres_url: str
) -> None:
    places = [Place.at(tmp_path / "one", sqlite_url), Place.at(tmp_path / "other", postgres_url)]
    for place in places:
        month_of_usage(place, events=200)
        ids = place.ledger_rows("SELECT event_id FROM events ORDER BY seq")
        with place.meter() as meter:
            for (event_id,) in ids[::9]:
                usage = TokenUsage(input_tokens=4_999, output_tokens=333)
                meter.correct(UUID(event_id), usage=usage, quantity=Decimal("0.123456789012"), reason="recounted")
        assert [account for account, _ in place.cycle()] == ["account-1"]
        assert rollup_differences(place.ledger_url, place.warehouse, PERIOD) == []
        assert invoice_differences(place.ledger_url, place.out, PERIOD) == []
    files, others = (place.files() for place in places)
    assert len(files) == 17
    assert files == others


@pytest.mark.parametrize("period", ["2023-11", "2024-02"])
def test_events_at_the_edges_of_a_period_are_on_the_right_invoice(place: Place, period: str) -> None:
    cuts = {"Asia/Kolkata": 15, "Australia/Adelaide": 31, "Asia/Beirut": 26, "America/Sao_Paulo": 1}
    for zone, day in cuts.items():
        place.account(zone, time_zone=zone, anchor_day=day)
        window = period_of_month(period, time_zone=zone, anchor_day=day)
        edges = {1: window.start, 10: window.end - MICROSECOND, 100: window.start - MICROSECOND, 1_000: window.end}
        place.add(*(event(zone, at=at, usage=TokenUsage(input_tokens=count)) for count, at in edges.items()))
    place.aggregate()
    tokens = {}
    for month in (_month(period, -1), period, _month(period, 1)):
        assert place.invoice(month) == []
        tokens[month] = {zone: invoice.input_tokens for zone, invoice in place.invoices(month).items()}
    assert [set(of_month.values()) for of_month in tokens.values()] == [{100}, {11}, {1_000}]
    assert all(of_month.keys() == cuts.keys() for of_month in tokens.values())


def _month(period: str, by: int) -> str:
    year, month = map(int, period.split("-"))
    months = year * 12 + month - 1 + by
    return f"{months // 12}-{months % 12 + 1:02}"


def test_what_is_not_billed(place: Place) -> None:
    place.plans("""
[plans.least]
retention_days = 30
minimum = "100.00"
[plans.fee]
retention_days = 30
base_fee = "10.00"
""")
    place.account("nothing")
    place.account("fee", "fee")
    place.account("least", "least")
    place.account("later", "least", active_from=datetime(2023, 12, 1, tzinfo=UTC))
    place.account("inside")
    with place.meter() as meter:
        meter.record(account="inside", line="application", usage=TokenUsage(input_tokens=5), caller_type="internal")
        meter.record(account="inside", line="application", usage=TokenUsage(input_tokens=7), caller_type="dashboard")
    place.aggregate()
    place.invoice()
    assert {account: invoice.total for account, invoice in place.invoices().items()} == {
        "fee": Decimal("10.00"),
        "least": Decimal("100.00"),
    }
    assert place.warehouse_rows("SELECT caller_type, sum(input_tokens) FROM usage_15m GROUP BY ALL ORDER BY ALL") == [
        ("dashboard", 7),
        ("internal", 5),
    ]
    place.add(event("later"))  # before it began, but used all the same
    place.aggregate()
    place.invoice()
    assert place.invoices()["later"].total == Decimal("100.00")


def test_an_account_that_cannot_be_billed_does_not_keep_others_from_it(place: Place) -> None:
    place.plans("""
[plans.ambiguous]
retention_days = 30
rates = [
  { line = "*", metric = "tokens", type = "per_unit", unit_amount = "1", match = { model = "gpt*" } },
  { line = "*", metric = "tokens", type = "per_unit", unit_amount = "2", match = { model = "*4.1" } },
]
[plans.resale]
retention_days = 30
rates = [{ line = "*", type = "cost_plus", markup_percent = 20 }]
""")
    place.account("two rates", "ambiguous")
    place.account("no price", "resale")
    place.account("good", "resale")
    place.add(event("two rates"), event("no price", model="mystery"), event("good"))
    problems = dict(place.cycle())
    assert problems.keys() == {"two rates", "no price"}
    assert "not known for 1 of the requests" in problems["no price"]
    assert place.invoices().keys() == {"good"}
    assert place.invoices()["good"].provider_cost == Decimal("0.0028")
    index = (place.out / PERIOD / "index.html").read_text()
    assert all(name in index for name in ("two rates", "no price", "good"))


RESALES = """
[plans.flagged]
retention_days = 1
unknown_price = "zero_and_flag"
rates = [{ line = "*", type = "cost_plus", markup_percent = 50 }]

[plans.named]
retention_days = 1
unknown_price = "openai:gpt-4.1-mini"
rates = [{ line = "*", type = "cost_plus", markup_percent = 50 }]

[plans.nowhere]
retention_days = 1
unknown_price = "openai:gtp-4.1-mini"
rates = [{ line = "*", type = "cost_plus", markup_percent = 50 }]

[plans.euros]
retention_days = 1
currency = "EUR"
base_fee = "10"
"""


def words_of_index(place: Place) -> str:
    index = (place.out / PERIOD / "index.html").read_text()
    return " ".join(re.sub(r"<svg.*?</svg>|<[^>]*>", " ", index, flags=re.DOTALL).split())


def test_usage_without_a_price_follows_its_plan_and_is_counted(place: Place) -> None:
    place.plans(RESALES)
    million = TokenUsage(input_tokens=1_000_000)
    mistaken = event("flagged", model="mystery", usage=million)
    for name in ("flagged", "named", "nowhere"):
        place.account(name, name)
        place.add(*(event(name, model=model, usage=million) for model in ("gpt-4.1", "mystery", "mystery")))
    place.add(mistaken)
    with place.meter() as meter:
        meter.correct(mistaken.event_id, billable=False, reason="a test call")
    assert place.cycle() == [
        (
            "nowhere",
            "plans.nowhere.unknown_price: got 'openai:gtp-4.1-mini', which genai-prices "
            f"{version('genai-prices')} has no price for (plan version 3, with 2 requests of unknown price on line "
            "'application')",
        )
    ]
    flagged, named = place.invoices()["flagged"], place.invoices()["named"]
    assert (flagged.total, flagged.provider_cost, flagged.unpriced_requests) == (Decimal("3.00"), Decimal(2), 2)
    assert [item.description for item in flagged.items] == [
        "All lines: provider cost plus 50% (requests of unknown price, at 0: 2)"
    ]
    # gpt-4.1-mini: 0.40 USD per million in.
    assert (named.total, named.provider_cost, named.unpriced_requests) == (Decimal("4.20"), Decimal("2.8"), 0)
    words = words_of_index(place)
    assert "without 2 requests of unknown price" in words
    assert "mystery openai 6 6,000,000 0 0.80 4 unpriced" in words
    for kind in ("html", "csv", "json"):
        assert "unknown price, at 0: 2" in (place.out / PERIOD / "invoices" / f"flagged-2023-11.{kind}").read_text()


def test_a_margin_is_shown_where_cost_and_total_are_known_in_one_currency(place: Place) -> None:
    place.plans(RESALES)
    place.account("dollars", "named")
    place.account("euros", "euros")
    place.account("unknown", "flagged")
    million = TokenUsage(input_tokens=1_000_000)
    place.add(event("dollars", usage=million), event("euros", usage=million))
    place.add(event("unknown", usage=million), event("unknown", model="mystery", usage=million))
    place.aggregate()
    place.invoice()
    margins = {name: _account_row(invoice).margin for name, invoice in place.invoices().items()}
    assert margins == {"dollars": Decimal("1.00"), "euros": None, "unknown": None}


def test_a_free_call_on_the_customers_own_key_costs_nothing(place: Place) -> None:
    place.account("acme")
    place.add(event(platform_paid=False), event(model="mystery", platform_paid=False), event())
    place.aggregate()
    place.invoice()
    invoice = place.invoices()["acme"]
    assert (invoice.requests, invoice.provider_cost, invoice.unpriced_requests) == (3, Decimal("0.0028"), 0)


def test_files_of_another_day_go(place: Place) -> None:
    place.account("acme")
    original = event()
    place.add(original)
    place.cycle()
    folder = place.out / PERIOD / "invoices"
    kept = place.files()
    for name in ("gone-2023-11.json", "gone-2023-11.html", ".0123456789abcdef.tmp"):
        (folder / name).write_text("{}")
    (folder.parent / ".fedcba9876543210.tmp").write_text("half a page")
    place.bill()
    assert place.files() == kept
    with place.meter() as meter:
        meter.correct(original.event_id, billable=False, reason="a test call")
    place.aggregate()
    place.invoice()
    assert sorted(path.name for path in folder.iterdir()) == []


HOSTILE = ["../x", "..", "/etc/passwd", "<script>alert(1)</script>", "a" * 255, "ж" * 255, "a b%2Fc", "acme.json", "~"]


def test_hostile_names_stay_inside_the_folder(place: Place) -> None:
    for name in HOSTILE:
        place.account(name)
        place.add(event(name))
    outside = {path for path in place.home.rglob("*") if path.is_file()}
    place.cycle()
    invoices = place.invoices()
    assert invoices.keys() == set(HOSTILE)
    folder = place.out / PERIOD / "invoices"
    expected = {
        folder / f"{file_stem(invoice)}{end}" for invoice in invoices.values() for end in (".json", ".csv", ".html")
    }
    written = {
        path for path in place.out.parent.rglob("*") if path.is_file() and path.suffix in (".json", ".csv", ".html")
    }
    assert written - outside == expected | {place.out / PERIOD / "index.html"}
    assert len(expected) == 3 * len(HOSTILE)
    pages = [path.read_text() for path in place.out.rglob("*.html")]
    assert not any("<script" in page for page in pages)


def test_a_warehouse_that_is_not_there_says_what_builds_it(place: Place) -> None:
    with pytest.raises(WarehouseError, match="is not there; `python -m flows aggregate-usage` builds it"):
        place.bill()
    assert not place.out.exists()


def test_a_file_in_the_way_is_said_in_one_line(place: Place) -> None:
    place.account("acme")
    place.add(event())
    place.cycle()
    before = place.files()
    page = place.out / PERIOD / "index.html"
    page.unlink()
    page.mkdir()
    with pytest.raises(ReportError, match=r"index.html: cannot be written: Is a directory"):
        place.bill()
    page.rmdir()
    assert {name: data for name, data in before.items() if not name.endswith("index.html")} == place.files()


@pytest.fixture
def longest_file() -> Iterator[Callable[[int], None]]:
    """After a call, no file of this process grows beyond so many bytes: what a full disk looks like."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN  # Python's own, so that writing fails instead
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_whole_files(place: Place, longest_file: Callable[[int], None]) -> None:
    place.account("acme")
    place.add(event())
    place.cycle()
    before = place.files()
    place.add(event())
    place.aggregate()
    whole = len(before["2023-11/index.html"])
    assert whole > 33_000  # SQLite's shared memory must still fit
    longest_file(whole - 1_000)
    with pytest.raises(ReportError, match=r"index\.html: cannot be written: File too large"):
        place.bill()
    after = place.files()
    assert after.keys() == before.keys()
    assert place.invoices()["acme"].requests == 2
    assert after["2023-11/index.html"] == before["2023-11/index.html"]
