from __future__ import annotations

import csv
from collections import Counter
from datetime import UTC, datetime
from decimal import Decimal
from fnmatch import fnmatchcase
from itertools import groupby
from pathlib import Path
from uuid import UUID

import pytest
from genai_prices import Usage, calc_price

from examples.traffic import COLUMNS, MAX_ACCOUNTS, MODELS, Summary, write_month
from metering.errors import InvalidSetting
from metering.events import TokenUsage
from metering.plans import Plan, parse_plans

PLANS_TOML = Path(__file__).parents[2] / "examples" / "plans.toml"
PLANS = ["free", "pro", "premium", "enterprise"]
TOKEN_METRICS = ["uncached_input_tokens", "cache_read_tokens", "output_tokens"]


@pytest.fixture(scope="module")
def month(tmp_path_factory: pytest.TempPathFactory) -> tuple[Summary, list[dict[str, str]]]:
    path = tmp_path_factory.mktemp("traffic") / "month.csv"
    summary = write_month(path, period="2026-10", events=6_000)
    return summary, read(path)


@pytest.fixture(scope="module")
def rows(month: tuple[Summary, list[dict[str, str]]]) -> list[dict[str, str]]:
    return month[1]


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    return parse_plans(PLANS_TOML.read_text(encoding="utf-8"))


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def usage_of(row: dict[str, str]) -> TokenUsage:
    names = ("input_tokens", "cache_read_tokens", "output_tokens", "reasoning_tokens")
    return TokenUsage(**{name: int(row[name]) for name in names})


# Traffic


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    first, again, other_seed, other_month = (tmp_path / name for name in "abcd")
    write_month(first, period="2026-10", events=300)
    write_month(again, period="2026-10", events=300)
    write_month(other_seed, period="2026-10", events=300, seed=8)
    write_month(other_month, period="2026-09", events=300)
    assert first.read_bytes() == again.read_bytes()
    ids = [{row["request_id"] for row in read(path)} for path in (first, other_seed, other_month)]
    assert len(set().union(*ids)) == 900


def test_the_summary_counts_what_is_in_the_file(month: tuple[Summary, list[dict[str, str]]]) -> None:
    summary, rows = month
    assert summary == Summary(
        rows=6_000,
        accounts=36,
        rows_by_plan=Counter(row["plan"] for row in rows),
        rows_by_line=Counter(row["line"] for row in rows),
    )
    assert tuple(rows[0]) == COLUMNS
    assert len({row["account"] for row in rows}) == 36
    assert sum(summary.rows_by_plan.values()) == sum(summary.rows_by_line.values()) == len(rows) == 6_000


def test_rows_are_sorted_inside_the_month_and_keys_unique(rows: list[dict[str, str]]) -> None:
    times = [row["occurred_at"] for row in rows]
    assert times == sorted(times)
    assert all(time.endswith("Z") and len(time) == len("2026-10-01T00:00:00.000Z") for time in times)
    parsed = [datetime.fromisoformat(time) for time in times]
    assert datetime(2026, 10, 1, tzinfo=UTC) <= parsed[0]
    assert parsed[-1] < datetime(2026, 11, 1, tzinfo=UTC)
    assert {time.day for time in parsed} == set(range(1, 32))
    assert len({row["request_id"] for row in rows}) == len(rows)


def test_every_row_is_a_fact_that_can_be_billed(rows: list[dict[str, str]]) -> None:
    for row in rows:
        usage, quantity = usage_of(row), int(row["quantity"])
        assert row["plan"] in PLANS
        assert row["operation"]
        assert UUID(row["run_id"]).version == 4
        if row["line"] == "learnings_generated":
            assert usage == TokenUsage()
            assert quantity >= 1
            assert row["model"] == row["provider"] == ""
        else:
            assert row["line"] in ("application", "extraction_tokens")
            assert quantity == 0
            assert usage.uncached_input_tokens > 0
            assert usage.output_tokens > usage.reasoning_tokens
            assert row["provider"] == MODELS[row["model"]]
        if row["line"] == "extraction_tokens":
            assert row["model"] == "gemini-3.5-flash-lite"


def test_an_account_has_one_plan_and_a_run_one_account(rows: list[dict[str, str]]) -> None:
    assert len({(row["account"], row["plan"]) for row in rows}) == 36
    runs = {(row["run_id"], row["account"]) for row in rows}
    assert len({run for run, _ in runs}) == len(runs)


def test_the_month_is_shaped_like_real_traffic(rows: list[dict[str, str]]) -> None:
    calls = [row for row in rows if row["line"] == "application"]
    tokens = sorted(usage_of(row).total_tokens for row in calls)
    cached = sum(usage_of(row).cache_read_tokens for row in calls) / sum(usage_of(row).input_tokens for row in calls)
    days = Counter(datetime.fromisoformat(row["occurred_at"]).weekday() for row in rows)
    hours = Counter(row["occurred_at"][11:13] for row in rows)
    runs = Counter(row["run_id"] for row in calls)

    assert 0.7 < len(calls) / len(rows) < 0.9
    assert set(MODELS) == {row["model"] for row in calls}
    assert 0.3 < cached < 0.8
    assert sum(tokens[-len(tokens) // 10 :]) > 0.25 * sum(tokens)
    assert tokens[-1] > 10 * tokens[len(tokens) // 2]
    assert days[5] + days[6] < 0.5 * (days[1] + days[2])
    assert max(hours.values()) > 4 * min(hours.values())
    assert max(runs.values()) > 10
    assert Counter(runs.values()).most_common(1)[0][0] == 1


def test_a_few_accounts_make_most_of_it_and_free_ones_stay_small(rows: list[dict[str, str]]) -> None:
    sizes = Counter((row["plan"], row["account"]) for row in rows)
    by_size = [size for _, size in sizes.most_common()]
    accounts = Counter(plan for plan, _ in sizes)
    assert accounts == {"enterprise": 3, "premium": 6, "pro": 12, "free": 15}
    assert sum(by_size[:4]) > 0.33 * len(rows)
    assert max(size for (plan, _), size in sizes.items() if plan == "free") < 0.02 * len(rows)


@pytest.mark.parametrize(("accounts", "events"), [(1, 0), (1, 10), (4, 50), (MAX_ACCOUNTS, 2_000)])
def test_any_size_comes_out_exact(tmp_path: Path, accounts: int, events: int) -> None:
    summary = write_month(tmp_path / "m.csv", period="2028-02", accounts=accounts, events=events)
    rows = read(tmp_path / "m.csv")
    assert summary.rows == len(rows) == events
    assert len({row["account"] for row in rows}) == summary.accounts <= accounts
    assert summary.accounts > accounts // 2 or not events


def test_four_accounts_are_one_of_each_plan(tmp_path: Path) -> None:
    summary = write_month(tmp_path / "m.csv", period="2026-10", accounts=4, events=400)
    sizes = summary.rows_by_plan
    assert sizes["enterprise"] > sizes["premium"] > sizes["pro"] > sizes["free"] > 0


def test_account_names_do_not_repeat(tmp_path: Path) -> None:
    assert write_month(tmp_path / "m.csv", period="2026-10", accounts=MAX_ACCOUNTS, events=20_000).accounts == 288


def test_sizes_that_cannot_be_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    with pytest.raises(ValueError, match="accounts: got 289, expected 1 to 288"):
        write_month(path, period="2026-10", accounts=289)
    with pytest.raises(ValueError, match="accounts: got 0"):
        write_month(path, period="2026-10", accounts=0)
    with pytest.raises(ValueError, match="events: got -1"):
        write_month(path, period="2026-10", events=-1)
    with pytest.raises(InvalidSetting, match="month: got '2026-13'"):
        write_month(path, period="2026-13")
    assert not path.exists()


# Plans


def test_the_example_plans_are_the_four_tiers(plans: dict[str, Plan]) -> None:
    assert list(plans) == PLANS
    quotas = {
        name: [int(limit.max) for limit in plan.limits if limit.max is not None and limit.metric == "requests"]
        for name, plan in plans.items()
    }
    assert quotas == {"free": [1_000], "pro": [10_000], "premium": [50_000], "enterprise": []}
    assert [plan.retention_days for plan in plans.values()] == [7, 30, 90, 365]
    assert plans["free"].rates == ()
    assert (plans["pro"].base_fee, plans["pro"].minimum) == (Decimal("49.00"), Decimal("100.00"))
    assert [str(limit) for limit in plans["pro"].limits] == [
        "10,000 requests per month",
        "120 requests per minute (burst 20)",
    ]


def test_the_example_plans_show_every_rate_type(plans: dict[str, Plan]) -> None:
    types = {rate.type for plan in plans.values() for rate in plan.rates}
    assert types == {"flat", "per_unit", "graduated", "volume", "package", "cost_plus"}


@pytest.mark.parametrize("plan", ["pro", "premium", "enterprise"])
def test_each_call_has_one_price_per_metric_and_no_token_two(plans: dict[str, Plan], plan: str) -> None:
    rates = [rate for rate in plans[plan].rates if rate.line == "application"]
    assert {rate.metric for rate in rates} == set(TOKEN_METRICS)
    for metric, model in ((metric, model) for metric in TOKEN_METRICS for model in MODELS):
        globs = [rate.match.model for rate in rates if rate.metric == metric]
        assert globs.count(None) == 1
        assert sum(fnmatchcase(model, glob) for glob in globs if glob) <= 1, (metric, model)


@pytest.mark.parametrize("plan", ["pro", "premium", "enterprise"])
def test_lines_beside_the_api_have_one_price(plans: dict[str, Plan], plan: str) -> None:
    lines = sorted(rate.line for rate in plans[plan].rates if rate.line != "application")
    assert lines == ["extraction_tokens", "learnings_generated"]


@pytest.mark.parametrize("plan", ["pro", "premium", "enterprise"])
@pytest.mark.parametrize("model", MODELS)
def test_tokens_are_sold_above_what_the_provider_charges(plans: dict[str, Plan], plan: str, model: str) -> None:
    at = datetime(2026, 10, 15, tzinfo=UTC)
    calls = {
        "uncached_input_tokens": Usage(input_tokens=100_000),
        "cache_read_tokens": Usage(input_tokens=100_000, cache_read_tokens=100_000),
        "output_tokens": Usage(output_tokens=100_000),
    }
    for metric, usage in calls.items():
        rates = [rate for rate in plans[plan].rates if (rate.line, rate.metric) == ("application", metric)]
        matching = [rate for rate in rates if rate.match.model and fnmatchcase(model, rate.match.model)]
        (rate,) = matching or [rate for rate in rates if rate.match.model is None]
        cost = calc_price(usage, model_ref=model, provider_id=MODELS[model], genai_request_timestamp=at).total_price
        assert cost > 0
        assert rate.amount(10**9) > 10_000 * cost, (metric, model)


def test_a_conversation_reads_its_own_past_from_the_cache(rows: list[dict[str, str]]) -> None:
    calls = sorted((row for row in rows if row["line"] == "application"), key=lambda row: row["run_id"])
    for _, run in groupby(calls, key=lambda row: row["run_id"]):
        before = 0
        for usage in map(usage_of, run):
            assert usage.cache_read_tokens <= before
            before = usage.input_tokens
