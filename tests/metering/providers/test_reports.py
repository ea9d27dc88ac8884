"""Providers' reports as days of rows: what counts include, what money is in, and what is refused."""

from __future__ import annotations

import json
from datetime import date, timedelta
from decimal import Decimal
from typing import Any

import pytest

from metering.errors import InvalidReport, InvalidSetting
from metering.providers import PROVIDERS, Counts, Page, ReportRow, provider_named
from metering.providers.reports import decode, summed
from tests.metering.providers.pages import (
    AUGUST,
    activity,
    anthropic_bucket,
    anthropic_cost,
    completions,
    embeddings,
    messages,
    openai_bucket,
    openai_cost,
    paged,
)

NEXT = AUGUST + timedelta(days=1)
LONG = dict.fromkeys(("description", "model", "cost_type", "token_type"), "x" * 255)


def read(provider: str, report: str, page: Any) -> Page:
    """A page as it comes over the wire."""
    return provider_named(provider).report(report).page(decode(json.dumps(page)))


def rows(provider: str, report: str, *results: Any) -> tuple[ReportRow, ...]:
    bucket = anthropic_bucket if provider == "anthropic" else openai_bucket
    [day] = read(provider, report, paged(bucket(*results))).days
    return day.rows


def test_openai_counts_the_cache_within_its_input() -> None:
    [row] = rows("openai", "usage", completions())
    assert row == ReportRow(
        dimensions='{"batch":false,"model":"gpt-4.1-2025-04-14"}',
        model="gpt-4.1-2025-04-14",
        counts=Counts(
            requests=5,
            input_tokens=27_444,
            cache_read_tokens=8_448,
            cache_write_tokens=100,
            input_audio_tokens=3,
            output_tokens=500,
            output_audio_tokens=2,
        ),
        cost=None,
    )


def test_anthropic_counts_the_cache_beside_its_input() -> None:
    [row] = rows("anthropic", "usage", messages())
    assert row.counts == Counts(
        input_tokens=1_500 + 200 + 500 + 1_000,
        cache_read_tokens=200,
        cache_write_tokens=1_500,
        cache_write_1h_tokens=1_000,
        output_tokens=500,
    )
    assert json.loads(row.dimensions) == {"model": "claude-sonnet-4-20250514", "service_tier": "standard"}


def test_an_embedding_says_nothing_of_output() -> None:
    [row] = rows("openai", "embeddings", embeddings())
    assert row.counts == Counts(requests=2, input_tokens=1_600)


def test_openrouter_says_tokens_and_money_in_one() -> None:
    page = {"data": [activity(NEXT), activity(), activity(endpoint_id="another", usage=1e-05, requests=1)]}
    [first, second] = read("openrouter", "usage", page).days
    assert (first.day, second.day) == (AUGUST, NEXT)
    [row] = first.rows
    assert row.counts == Counts(requests=6, input_tokens=100, output_tokens=250, reasoning_tokens=50)
    assert (row.model, row.cost) == ("openai/gpt-4.1", Decimal("0.01501"))
    assert read("openrouter", "usage", {"data": [activity(date="2025-08-01 00:00:00")]}).days[0].day == AUGUST


@pytest.mark.parametrize(
    ("provider", "result", "usd"),
    [
        ("openai", openai_cost(0.06), "0.06"),
        ("openai", openai_cost(1), "1"),
        ("openai", openai_cost("12.50"), "12.50"),  # real answers also have texts
        ("openai", openai_cost("0.13080438340307526171875"), "0.130804383403"),
        ("openai", openai_cost(1e-7), "0.0000001"),
        ("openai", openai_cost(-3.5), "-3.5"),
        ("anthropic", anthropic_cost("123.45"), "1.2345"),
        ("anthropic", anthropic_cost("291.9015"), "2.919015"),  # 2,919,015 tokens at 1 USD a million
        ("anthropic", anthropic_cost("0"), "0"),
    ],
)
def test_money_is_exact_and_in_dollars(provider: str, result: Any, usd: str) -> None:
    [row] = rows(provider, "cost", result)
    assert row.cost == Decimal(usd)
    assert row.counts == Counts()


def test_a_float_is_read_as_it_is_written() -> None:
    page = json.dumps(paged(openai_bucket(openai_cost(0)))).replace('"value": 0', '"value": 0.1000000000000000055')
    [day] = PROVIDERS["openai"].report("cost").page(decode(page)).days
    assert day.rows[0].cost == Decimal("0.1")
    assert decode("0.1000000000000000055") == Decimal("0.1000000000000000055")


def test_what_it_is_not_grouped_by_is_left_out() -> None:
    [row] = rows("openai", "usage", completions(model=None, batch=None, service_tier=""))
    assert (row.dimensions, row.model) == ("{}", None)
    [row] = rows("openai", "cost", {"amount": {"value": 1, "currency": "USD"}})
    assert (row.dimensions, row.model) == ("{}", None)


def test_counts_that_are_not_said_are_none_and_zeros_stay() -> None:
    [row] = rows("openai", "usage", {"input_tokens": 1, "output_tokens": 0, "input_cached_tokens": None})
    assert row.counts == Counts(input_tokens=1, output_tokens=0)


def test_rows_that_differ_in_what_is_not_kept_are_added_up() -> None:
    one, other = completions(user_id="u1"), completions(user_id="u2", input_cached_tokens=None)
    [row] = rows("openai", "usage", one, other)
    assert (row.counts.input_tokens, row.counts.cache_read_tokens) == (54_888, 8_448)
    [row] = rows("anthropic", "cost", anthropic_cost("1"), anthropic_cost("2", inference_geo="us"))
    assert row.cost == Decimal("0.03")
    assert len(rows("openai", "usage", completions(), completions(batch=True))) == 2


def test_fields_that_are_not_known_and_whole_doubles_are_taken() -> None:
    [row] = rows("openai", "usage", completions(input_tokens=71.0, surprise={"deep": [1, None]}))
    assert row.counts.input_tokens == 71


def test_a_day_without_usage_is_a_day() -> None:
    page = read("anthropic", "usage", paged(anthropic_bucket(), anthropic_bucket(messages(), day=NEXT)))
    assert [(day.day, len(day.rows)) for day in page.days] == [(AUGUST, 0), (NEXT, 1)]


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_pages_follow_each_other(provider: str) -> None:
    report = provider_named(provider).report("usage")
    assert read(provider, "usage", paged(next_page="page_2")).next_page == "page_2"
    assert read(provider, "usage", {"data": [], "has_more": False, "next_page": "page_2"}).next_page is None
    first, second = (dict(report.question(AUGUST, NEXT, page).params) for page in (None, "page_2"))
    assert "page" not in first
    assert second == first | {"page": "page_2"}
    with pytest.raises(InvalidReport, match="next_page: got None, expected the token"):
        read(provider, "usage", {"data": [], "has_more": True, "next_page": None})


@pytest.mark.parametrize(
    ("provider", "report", "path", "params"),
    [
        ("openai", "usage", "/v1/organization/usage/completions", ("start_time", "1754006400")),
        ("openai", "usage", "/v1/organization/usage/completions", ("end_time", "1754092800")),
        ("openai", "embeddings", "/v1/organization/usage/embeddings", ("group_by", "model")),
        ("openai", "cost", "/v1/organization/costs", ("group_by", "line_item")),
        ("anthropic", "usage", "/v1/organizations/usage_report/messages", ("starting_at", "2025-08-01T00:00:00Z")),
        ("anthropic", "usage", "/v1/organizations/usage_report/messages", ("group_by[]", "model")),
        ("anthropic", "cost", "/v1/organizations/cost_report", ("group_by[]", "description")),
    ],
)
def test_what_is_asked(provider: str, report: str, path: str, params: tuple[str, str]) -> None:
    question = provider_named(provider).report(report).question(AUGUST, NEXT, None)
    assert question.path == path
    assert params in question.params
    assert ("bucket_width", "1d") in question.params


def test_the_key_goes_into_headers_alone() -> None:
    headers = {name: dict(provider.headers("sk-admin")) for name, provider in PROVIDERS.items()}
    assert headers == {
        "openai": {"authorization": "Bearer sk-admin"},
        "anthropic": {"x-api-key": "sk-admin", "anthropic-version": "2023-06-01"},
        "openrouter": {"authorization": "Bearer sk-admin"},
    }


def test_what_can_be_asked_for() -> None:
    end = AUGUST + timedelta(days=365)
    today = date(2025, 9, 10)
    assert PROVIDERS["openai"].report("usage").reach(AUGUST, end, today) == (AUGUST, date(2025, 9, 11))
    assert PROVIDERS["openrouter"].report("usage").reach(AUGUST, end, today) == (date(2025, 8, 11), today)


@pytest.mark.parametrize(
    ("provider", "report", "page", "said"),
    [
        ("openai", "usage", [], r"report: got \[\], expected a JSON object"),
        ("openai", "usage", {"error": {}}, "data: got None, expected a list; names seen: error"),
        ("openai", "usage", paged(1), r"data\[0\]: got 1, expected a JSON object"),
        ("openai", "usage", paged(openai_bucket(1)), r"data\[0\]\.results\[0\]: got 1, expected a JSON object"),
        ("openai", "usage", paged(openai_bucket(), openai_bucket()), "expected each day once"),
        ("openai", "usage", paged({"start_time": 60, "end_time": 86_460, "results": []}), "one whole UTC day"),
        ("openai", "usage", paged({"start_time": 0, "end_time": 3_600, "results": []}), "one whole UTC day"),
        ("openai", "usage", paged({"start_time": 2**52, "end_time": 0, "results": []}), "seconds since 1970"),
        ("openai", "usage", paged(openai_bucket({"output_tokens": 1})), r"results\[0\]\.input_tokens: got None"),
        ("openai", "usage", paged(openai_bucket(completions(input_tokens=-1))), "input_tokens: got -1, expected"),
        ("openai", "usage", paged(openai_bucket(completions(output_tokens=1.5))), r"output_tokens: got Decimal"),
        ("openai", "usage", paged(openai_bucket(completions(input_tokens=True))), "input_tokens: got True"),
        ("openai", "usage", paged(openai_bucket(completions(model=7))), "model: got 7, expected a text"),
        ("openai", "usage", paged(openai_bucket(completions(model="x" * 256))), "at most 255 printable"),
        ("openai", "cost", paged(openai_bucket(openai_cost(None))), r"amount\.value: got None, expected a decimal"),
        ("openai", "cost", paged(openai_bucket(openai_cost("1.2.3"))), r"amount\.value: got '1\.2\.3'"),
        ("openai", "cost", paged(openai_bucket(openai_cost("1e99"))), r"below 10\^15"),
        ("openai", "cost", paged(openai_bucket({"amount": {"value": 1, "currency": "eur"}})), "'eur', expected USD"),
        ("openai", "cost", paged(openai_bucket({})), r"results\[0\]\.amount: got None, expected a JSON object"),
        ("anthropic", "usage", paged(anthropic_bucket(messages(cache_creation=None))), "cache_creation: got None"),
        ("anthropic", "usage", paged(anthropic_bucket(messages(cache_read_input_tokens=None))), "cache_read_input_"),
        ("anthropic", "usage", paged({"starting_at": "2025-08-01"}), "starting_at: got '2025-08-01', expected a time"),
        ("anthropic", "usage", paged({"starting_at": "0001-01-01T00:00:00+02:00"}), "expected a time with an offset"),
        ("anthropic", "cost", paged(anthropic_bucket(anthropic_cost("nan"))), "amount: got 'nan'"),
        ("anthropic", "cost", paged(anthropic_bucket(anthropic_cost("1", **LONG))), "at most 1000 characters"),
        ("openrouter", "usage", {"data": [activity(date="soon")]}, "date: got 'soon', expected a day"),
        ("openrouter", "usage", {"data": [activity(usage=None)]}, r"data\[0\]\.usage: got None"),
    ],
)
def test_what_cannot_be_is_refused_by_place_and_value(provider: str, report: str, page: Any, said: str) -> None:
    with pytest.raises(InvalidReport, match=said) as caught:
        read(provider, report, page)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": NaN}'])
def test_what_is_no_json_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidReport, match="expected JSON"):
        decode(body)


def test_names_that_are_not_known() -> None:
    with pytest.raises(InvalidSetting, match="provider: got 'nobody', expected one of openai, anthropic, openrouter"):
        provider_named("nobody")
    with pytest.raises(InvalidSetting, match="report: got 'costs', expected one of those of openai: usage, embeddings"):
        PROVIDERS["openai"].report("costs")


def test_sums_are_of_what_is_said() -> None:
    assert summed([]) == Counts()
    assert summed([Counts(requests=1), Counts(requests=2, output_tokens=0)]) == Counts(requests=3, output_tokens=0)
