from __future__ import annotations

import subprocess
import sys
import tomllib
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metering.errors import InvalidPlan
from metering.plans import BUILT_IN, Limit, Plan, parse_plans
from metering.toml_lines import line_of

DESIGN_SAMPLE = """\
[plans.pro]                       # `tallystick plans apply` writes an immutable version into the ledger
currency = "USD"
base_fee = "49.00"                # prorated by day
minimum = "100.00"                # of the period's total
retention_days = 30
reconcile = "traces"
limits = [
  { metric = "requests", per = "month", max = 10_000 },      # UTC month; per = "period" follows the account
  { metric = "tokens", per = "day", max = 2_000_000, scope = "key" },
  { metric = "requests", rate = "120/minute", burst = 20 },
]
rates = [
  { line = "application", metric = "uncached_input_tokens", type = "per_unit", unit_amount = "2.50", per = 1_000_000, match = { model = "gpt-4.1*" } },
  { line = "application", metric = "output_tokens", type = "per_unit", unit_amount = "10.00", per = 1_000_000 },
  { line = "learnings_generated", metric = "quantity", type = "graduated", tiers = [{ up_to = 1000, unit_amount = "0" }, { unit_amount = "0.004" }] },
]
"""  # noqa: E501


def test_the_sample_of_the_design_parses() -> None:
    plan = parse_plans(DESIGN_SAMPLE)["pro"]
    assert (plan.currency, plan.base_fee, plan.minimum) == ("USD", Decimal(49), Decimal(100))
    assert (plan.retention_days, plan.reconcile) == (30, "traces")
    assert [limit.counter for limit in plan.limits] == [
        "requests/month/account/*",
        "tokens/day/key/*",
        "requests/120 per minute burst 20/account/*",
    ]
    assert [str(limit) for limit in plan.limits] == [
        "10,000 requests per month",
        "2,000,000 tokens per day per key",
        "120 requests per minute (burst 20)",
    ]
    assert [rate.type for rate in plan.rates] == ["per_unit", "per_unit", "graduated"]
    assert plan.rates[0].match.model == "gpt-4.1*"
    assert plan.rates[2].amount(1500) == 2


def test_a_plan_survives_the_ledger() -> None:
    plan = parse_plans(DESIGN_SAMPLE)["pro"]
    again = Plan.from_dict("pro", plan.to_dict())
    assert again == plan
    assert again.to_json() == plan.to_json()
    assert again.digest == plan.digest


@pytest.mark.parametrize("said", ["zero_and_flag", "openai:gpt-4.1-mini", "aws:amazon.nova-pro-v1:0", "x-ai:grok-4"])
def test_what_becomes_of_usage_without_a_price(said: str) -> None:
    plan = Plan.from_dict("pro", {"retention_days": 1, "unknown_price": said})
    assert plan.unknown_price == said
    assert plan.named_price == (None if said == "zero_and_flag" else said)
    assert Plan.from_dict("pro", plan.to_dict()) == plan


def test_a_plan_of_before_unknown_price_is_the_same_version() -> None:
    plan = Plan.from_dict("pro", {"retention_days": 30})
    assert plan.unknown_price == "refuse"
    assert Plan.from_dict("pro", {"retention_days": 30, "unknown_price": "refuse"}).digest == plan.digest
    assert plan.digest == "d937508f2e753394bb5f2c0939094198"
    assert Plan.from_dict("pro", {"retention_days": 30, "unknown_price": "zero_and_flag"}).digest != plan.digest


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ("gpt-4.1-mini", "got 'gpt-4.1-mini', expected one of refuse, zero_and_flag, or a provider and its model"),
        ("zero", "such as openai:gpt-4.1-mini"),
        ("", "1 to 38 characters"),
        ("openai:", "such as"),
        (":gpt-4.1-mini", "such as"),
        ("OpenAI:gpt-4.1-mini", "such as"),
        ("openai: gpt-4.1-mini", "such as"),
        ("openai:" + "x" * 32, "1 to 38 characters"),
        (0, "expected a string"),
    ],
)
def test_another_unknown_price_is_refused(said: object, problem: str) -> None:
    with pytest.raises(InvalidPlan) as caught:
        Plan.from_dict("pro", {"retention_days": 1, "unknown_price": said})
    assert caught.value.where == "plans.pro.unknown_price"
    assert problem in caught.value.problem


def test_the_digest_is_of_what_the_plan_says_not_of_how() -> None:
    plan = parse_plans(DESIGN_SAMPLE)["pro"]
    same = parse_plans(DESIGN_SAMPLE.replace('"49.00"', "49").replace("10_000", "10000"))["pro"]
    other = parse_plans(DESIGN_SAMPLE.replace('"49.00"', '"49.01"'))["pro"]
    assert same.digest == plan.digest
    assert other.digest != plan.digest


@pytest.mark.parametrize(
    ("wrote", "instead", "line", "where", "problem"),
    [
        ('"49.00"', "49.0", 3, "plans.pro.base_fee", "write money as a string"),
        ('"49.00"', "nan", 3, "plans.pro.base_fee", "write money as a string"),
        ('"49.00"', '"-1"', 3, "plans.pro.base_fee", "0 or more"),
        ('"49.00"', '"Infinity"', 3, "plans.pro.base_fee", "expected a number"),
        ('"49.00"', "true", 3, "plans.pro.base_fee", "expected a number"),
        ('"USD"', '"usd"', 2, "plans.pro.currency", "ISO 4217"),
        ('"USD"', "840", 2, "plans.pro.currency", "expected a string"),
        ("= 30", "= -1", 5, "plans.pro.retention_days", "0 to 36,500 days"),
        ("retention_days = 30", "", 1, "plans.pro", "retention_days is missing"),
        ("reconcile =", "recncile =", 6, "plans.pro.recncile", "allowed here: currency, base_fee"),
        ('"traces"', '"trace"', 6, "plans.pro.reconcile", "none, traces, provider"),
        ("10_000", "10_000.0", 8, "plans.pro.limits[0].max", "whole number"),
        ("10_000", '"10000"', 8, "plans.pro.limits[0].max", "whole number"),
        ("10_000", "-1", 8, "plans.pro.limits[0].max", "0 or more"),
        ('"month"', '"moon"', 8, "plans.pro.limits[0].per", "period"),
        ('"tokens"', '"spend"', 9, "plans.pro.limits[1].metric", "come in a later version"),
        ('"tokens"', '"words"', 9, "plans.pro.limits[1].metric", "uncached_input_tokens"),
        ('scope = "key"', 'scop = "key"', 9, "plans.pro.limits[1].scop", "unknown key 'scop'"),
        ('scope = "key"', 'scope = "team"', 9, "plans.pro.limits[1].scope", "account, key"),
        ('"120/minute"', '"120/week"', 10, "plans.pro.limits[2].rate", "120/minute"),
        ('"120/minute"', '"0/minute"', 10, "plans.pro.limits[2].rate", "120/minute"),
        ("burst = 20", "burst = 0", 10, "plans.pro.limits[2].burst", "1 or more"),
        ('rate = "120/minute", burst = 20', 'per = "month", max = 5', 10, "plans.pro.limits[2]", "same as limits[0]"),
        ('rate = "120/minute"', 'max = 5, rate = "120/minute"', 10, "plans.pro.limits[2]", "either per and max"),
        ('rate = "120/minute", burst = 20', 'per = "hour"', 10, "plans.pro.limits[2]", "max is missing"),
        ('rate = "120/minute", burst', 'per = "hour", max = 5, burst', 10, "plans.pro.limits[2].burst", "only a rate"),
        ('"output_tokens"', '"spend"', 14, "plans.pro.rates[1].metric", "output_tokens"),
        ('up_to = 1000, unit_amount = "0"', "up_to = 1000", 15, "plans.pro.rates[2].tiers[0]", "unit_amount"),
        ('"0.004"', "0.004", 15, "plans.pro.rates[2].tiers[1].unit_amount", "a float is not exact"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(wrote: str, instead: str, line: int, where: str, problem: str) -> None:
    assert DESIGN_SAMPLE.count(wrote) >= 1
    with pytest.raises(InvalidPlan) as caught:
        parse_plans(DESIGN_SAMPLE.replace(wrote, instead, 1))
    assert caught.value.where == where
    assert caught.value.line == line
    assert problem in caught.value.problem


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('[plans.pro]\nbase_fee = "49.00\n', 2),
        ("[plans.pro]\nretention_days = 30\nretention_days = 31\n", 3),
        ("[plans.pro]\n\nlimits = [\n", 4),
        ("\n\n[plans.pro\n", 3),
        ("[plans.pro]\nretention_days = 30\n[plans.pro]\n", 3),
    ],
)
def test_malformed_toml_names_its_line(text: str, line: int) -> None:
    with pytest.raises(InvalidPlan, match="is not TOML") as caught:
        parse_plans(text)
    assert caught.value.line == line


def test_other_tables_are_refused() -> None:
    with pytest.raises(InvalidPlan, match="unknown key 'plan'; allowed here: plans") as caught:
        parse_plans('# tiers\n[plan.pro]\nbase_fee = "1"\n')
    assert caught.value.line == 2
    with pytest.raises(InvalidPlan, match="expected tables"):
        parse_plans("plans = 3")
    with pytest.raises(InvalidPlan, match="expected a table"):
        parse_plans("[plans]\npro = 3")


def test_no_text_is_no_plans() -> None:
    assert parse_plans("# nothing yet\n") == {}


@pytest.mark.parametrize("kind", ['type = "per_unit", unit_amount = "1"', 'type = "cost_plus", markup_percent = 1'])
def test_two_rates_for_the_same_usage_are_refused(kind: str) -> None:
    metric = "" if "cost_plus" in kind else 'metric = "requests", '
    text = f"[plans.pro]\nretention_days = 1\nrates = [\n  {{ {metric}{kind} }},\n  {{ {metric}{kind} }},\n]\n"
    with pytest.raises(InvalidPlan, match="two prices") as caught:
        parse_plans(text)
    assert (caught.value.where, caught.value.line) == ("plans.pro.rates[1]", 5)


def test_flat_rates_price_no_usage_so_a_line_may_have_two() -> None:
    fee = {"line": "application", "type": "flat", "amount": "1"}
    assert len(Plan.from_dict("pro", {"retention_days": 1, "rates": [fee, fee]}).rates) == 2


def test_cost_plus_bills_dollars() -> None:
    document = {"currency": "EUR", "retention_days": 1, "rates": [{"type": "cost_plus", "markup_percent": 20}]}
    with pytest.raises(InvalidPlan, match="in USD; the plan is in EUR"):
        Plan.from_dict("pro", document)
    assert Plan.from_dict("pro", document | {"currency": "USD"}).rates[0].metric == "cost"


@pytest.mark.parametrize(
    ("document", "counter", "text", "rate"),
    [
        ({"per": "period", "max": 1}, "tokens/period/account/*", "1 tokens per billing period", (0, 0, 0)),
        ({"rate": "5/second"}, "tokens/5 per second burst 5/account/*", "5 tokens per second (burst 5)", (5, 1, 5)),
        (
            {"rate": "1000/day", "burst": 7, "scope": "key", "line": "a/b"},
            "tokens/1000 per day burst 7/key/a/b",
            "1,000 tokens per day (burst 7) per key on line a/b",
            (1000, 86_400, 7),
        ),
        ({"rate": "2/hour"}, "tokens/2 per hour burst 2/account/*", "2 tokens per hour (burst 2)", (2, 3600, 2)),
    ],
)
def test_limits_have_a_counter_and_a_name(
    document: dict[str, Any], counter: str, text: str, rate: tuple[int, int, int]
) -> None:
    limit = Limit.from_dict({"metric": "tokens", **document})
    assert limit.counter == counter
    assert str(limit) == text
    assert (limit.rate_count, limit.rate_period_s, limit.burst) == rate
    assert Limit.from_dict(limit.to_dict()) == limit


def test_only_quantity_may_be_limited_to_a_fraction() -> None:
    limit = Limit.from_dict({"metric": "quantity", "per": "day", "max": "1234567.50"})
    assert limit.max == Decimal("1234567.5")
    assert str(limit) == "1,234,567.50 units per day"
    assert Limit.from_dict(limit.to_dict()) == limit
    with pytest.raises(InvalidPlan, match="a float is not exact"):
        Limit.from_dict({"metric": "quantity", "per": "day", "max": 1.5})
    with pytest.raises(InvalidPlan, match="whole number of tokens"):
        Limit(metric="tokens", per="day", max=Decimal("1.5"))


def test_max_is_no_part_of_a_counter() -> None:
    one, other = (Limit(metric="requests", per="month", max=Decimal(most)) for most in (1, 2))
    assert one.counter == other.counter


def test_built_in_tiers() -> None:
    assert {
        name: ([(str(limit), str(limit.max)) for limit in plan.limits], plan.retention_days)
        for name, plan in BUILT_IN.items()
    } == {
        "free": ([("1,000 requests per month", "1000")], 7),
        "pro": ([("10,000 requests per month", "10000")], 30),
        "premium": ([("50,000 requests per month", "50000")], 90),
        "enterprise": ([], 365),
    }
    assert all(not plan.rates and not plan.base_fee and plan.currency == "USD" for plan in BUILT_IN.values())


EVERY_LAYOUT = '''
title = """
[plans.decoy]
x = 1"""
when = 1979-05-27 07:32:00   # a scalar with a blank

[plans."pro.eu"]
deep.er.key = 1
'quoted' = 'a # b'
table = { a = 1, b = { c = [ 2, 3 ] } }   # { d = 4 }
many = [
  [1,
   2], # ]
  { p = "]", q = "\\"}" },
  """multi
line""",
  { after = 1 },
]

[[plans.free.rates]]
first = 1
[[plans.free.rates]]
second = 1
  [plans.free.rates.match]
  model = "x"
'''


def test_every_key_is_found_on_its_line() -> None:
    lines = EVERY_LAYOUT.splitlines()
    found = {path: line_of(EVERY_LAYOUT, path) for path in paths(tomllib.loads(EVERY_LAYOUT))}
    for path, line in found.items():
        assert line is not None, path
        name = path.rpartition(".")[2]
        if not name.endswith("]"):
            assert name in lines[line - 1], path
    assert found["plans.pro.eu.many[3].after"] == lines.index("  { after = 1 },") + 1
    assert found["plans.pro.eu.many[0][1]"] == lines.index("   2], # ]") + 1
    assert found["plans.free.rates[1].second"] == lines.index("second = 1") + 1
    assert found["plans.free.rates[1].match.model"] == lines.index('  model = "x"') + 1


def paths(value: object, path: str = "") -> list[str]:
    if isinstance(value, dict):
        inner = [(f"{path}.{key}" if path else key, each) for key, each in value.items()]
    elif isinstance(value, list):
        inner = [(f"{path}[{index}]", each) for index, each in enumerate(value)]
    else:
        inner = []
    return [place for place, _ in inner] + [deep for place, each in inner for deep in paths(each, place)]


def test_what_is_not_there_has_the_line_of_what_is_around_it() -> None:
    assert line_of(DESIGN_SAMPLE, "plans.pro.rates[1].unheard.of") == 14
    assert line_of(DESIGN_SAMPLE, "plans.pro.unheard") == 1
    assert line_of(DESIGN_SAMPLE, "unheard.of") is None
    assert line_of(DESIGN_SAMPLE, "plans[...]") == 1


@given(st.lists(st.sampled_from([".", "[", "]", "[0]", "[...]", "plans", "pro", "é"])).map("".join) | st.text())
def test_any_text_has_a_line_or_none(where: str) -> None:
    assert line_of(DESIGN_SAMPLE, where) in {None, *range(1, DESIGN_SAMPLE.count("\n") + 2)}


def test_plans_are_light_to_import() -> None:
    heavy = "sqlalchemy duckdb pandas prefect alembic redis fastapi typer"
    code = f"import sys, metering.plans; print([m for m in '{heavy}'.split() if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
