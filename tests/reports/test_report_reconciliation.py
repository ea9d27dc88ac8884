from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest

from metering.billing.reconciliation import Correction, Reconciliation, RunVerdict, Stake, Tolerance
from metering.events import TokenUsage
from metering.providers.reports import Counts, ProviderDay
from reports.reconciliation import (
    corrections_csv,
    corrections_json,
    providers_csv,
    reconciliation_html,
    summary_markdown,
    verdict_rows,
    verdicts_csv,
)

AT = datetime(2023, 12, 1, 9, tzinfo=UTC)
HOSTILE = "<script>alert('x')</script>"
USED = TokenUsage(input_tokens=1_000, cache_read_tokens=400, output_tokens=100)


def words_of(html: str) -> str:
    body = html[html.index("<body>") :]
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def verdict(number: int, name: Any, **said: Any) -> RunVerdict:
    values: dict[str, Any] = {
        "account": "acme",
        "run_id": f"run-{number}",
        "reason": "why",
        "state": "0" * 32,
        "amount": Decimal("1.25"),
        "currency": "USD",
        "cost": Decimal("0.5"),
        "evidence": {
            "billed": [],
            "traced": [{"model": "gpt-4.1", "calls": 1, **USED.to_dict()}],
            "events": [],
            "holds": [],
        },
        "corrections": (Correction(action="add", line="application", model="gpt-4.1", usage=USED, occurred_at=AT),),
        **said,
    }
    return RunVerdict(number=number, verdict=name, **values)


TWICE = verdict(
    2,
    "double-counted",
    amount=Decimal("-3.5"),
    cost=Decimal(-2),
    corrections=(Correction(action="take_back", event_id=UUID(int=7), line="application"),),
)
UNPROVEN = verdict(3, "untraced", amount=Decimal(-4), corrections=(Correction(action="accept"),))
NOBODYS = verdict(4, "unbilled", account=None, amount=None, currency=None, cost=None, corrections=())
FOUND = [verdict(1, "unbilled"), TWICE, UNPROVEN, NOBODYS, verdict(5, "unbilled", account="euro", currency="EUR")]
RECONCILED = Reconciliation(
    number=12,
    period="2023-11",
    made_at=AT,
    events_to=1,
    spans_to=1,
    tolerance=Tolerance(),
    runs={
        "acme": {"matched": 1_000, "unbilled": 1, "double-counted": 1, "untraced": 1, "pending": 2},
        "": {"unbilled": 1},
        "euro": {"unbilled": 1},
    },
    stakes={
        "acme": Stake(currency="USD", change=Decimal("-2.25"), unproven=Decimal(4), cost=Decimal("-1.5"), unpriced=2),
        "": Stake(uncosted=1),
        "euro": Stake(currency="EUR", change=Decimal("1.25"), cost=Decimal("0.5"), looks_sampled=True),
    },
)


@pytest.fixture(scope="module")
def day() -> ProviderDay:
    ours = Counts(requests=3, input_tokens=3_000, output_tokens=300)
    return ProviderDay(
        day=date(2023, 11, 16),
        provider="openai",
        model="*",
        ours=ours,
        theirs=replace(ours, input_tokens=9_000),
        difference=Counts(requests=0, input_tokens=-6_000, output_tokens=0),
        our_cost=Decimal("0.01"),
        their_cost=Decimal("0.03"),
        provisional=True,
        agrees=False,
    )


def test_the_page_says_what_agrees_and_what_is_at_stake(day: ProviderDay) -> None:
    words = words_of(reconciliation_html(RECONCILED, FOUND, [day, replace(day, agrees=True)]))
    for said in (
        "Number 12, of periods that start in 2023-11. Billed against traced; a count may differ by 2 tokens or 0.1%.",
        "Runs that agree 1,000 Runs that differ 5 3 unbilled 1 untraced 1 double-counted",
        "Not billed so far 1.25 EUR 0.00 USD Billed too much 0.00 EUR 2.25 USD",
        "Billed without a trace 0.00 EUR 4.00 USD",
        "Provider cost of corrections -1.00 USD without 1 runs of unknown cost",
        "Traced less than billed So many runs are that tracing may leave calls out",
        "Left alone 2 without a price 2 pending",
        "acme 1,000 1 1 0 1 0 -2.25 USD 2 unpriced 4.00 USD -1.50",
        "not known 0 1 0 0 0 0 \N{EN DASH} \N{EN DASH} 0.00",
        "python -m flows reconcile apply 12",
        "2 double-counted acme run-2 0 1,100 -3.50 USD -2.00 why take 00000000-0000-0000-0000-000000000007 back",
        "why bill 1,100 tokens of gpt-4.1 on application",
        "why accept as it is",
        "1 of 2 days and models differ from what was metered",
        "16 November 2023 provisional openai all 3,300 9,300 0.01 0.03",
    ):
        assert said in words
    assert words.index("run-2") < words.index("run-4")  # most money first


def test_the_page_of_nothing_says_how_to_begin() -> None:
    words = words_of(reconciliation_html(replace(RECONCILED, runs={}, stakes={}), []))
    assert 'a plan that says reconcile = "traces" does' in words.replace("&#34;", '"')
    assert "Runs that agree 0 Runs that differ 0" in words


def test_what_others_wrote_is_escaped_and_never_a_formula() -> None:
    hostile = [verdict(1, "unbilled", account="=1+1", run_id=HOSTILE, reason=HOSTILE)]
    assert HOSTILE not in reconciliation_html(RECONCILED, hostile)
    for text in (verdicts_csv(RECONCILED, hostile), corrections_csv(RECONCILED, hostile)):
        (row,) = csv.DictReader(io.StringIO(text))
        assert (row["account"], row["run_id"]) == ("'=1+1", HOSTILE)


def test_files_to_review_have_reason_and_evidence() -> None:
    rows = list(csv.DictReader(io.StringIO(verdicts_csv(RECONCILED, FOUND))))
    assert [(row["number"], row["verdict"], row["amount"], row["traced_tokens"], row["reason"]) for row in rows] == [
        ("1", "unbilled", "1.25", "1100", "why"),
        ("2", "double-counted", "-3.5", "1100", "why"),
        ("3", "untraced", "-4", "1100", "why"),
        ("4", "unbilled", "", "1100", "why"),
        ("5", "unbilled", "1.25", "1100", "why"),
    ]
    steps = list(csv.DictReader(io.StringIO(corrections_csv(RECONCILED, FOUND))))
    assert [(step["number"], step["action"], step["event_id"], step["input_tokens"]) for step in steps] == [
        ("1", "add", "", "1000"),
        ("2", "take_back", "00000000-0000-0000-0000-000000000007", "0"),
        ("3", "accept", "", ""),
        ("5", "add", "", "1000"),
    ]
    assert json.loads(steps[0]["evidence"])["traced"][0]["input_tokens"] == 1_000
    document = json.loads(corrections_json(RECONCILED, FOUND))
    assert (document["reconciliation"], document["tolerance"]) == (12, {"tokens": 2, "percent": "0.1"})
    assert document["differing"][1]["corrections"][0]["action"] == "take_back"
    assert document["differing"][3]["account"] is None
    assert document["stakes"]["acme"]["change"] == "-2.25"
    assert corrections_json(RECONCILED, FOUND) == corrections_json(RECONCILED, list(FOUND))


def test_the_providers_days_are_a_file_too(day: ProviderDay) -> None:
    (row,) = csv.DictReader(io.StringIO(providers_csv([day])))
    assert (row["day"], row["model"], row["agrees"], row["provisional"]) == ("2023-11-16", "*", "no", "yes")
    assert (row["our_input_tokens"], row["their_input_tokens"], row["their_reasoning_tokens"]) == ("3000", "9000", "")
    assert (row["our_cost_usd"], row["their_cost_usd"]) == ("0.01", "0.03")


def test_artifacts_say_the_same_in_short(day: ProviderDay) -> None:
    said = summary_markdown(RECONCILED, FOUND, [day])
    assert "- unbilled: 3\n" in said
    assert "- money at stake in USD: 0 not billed so far, 2.25 billed too much, 4 billed without a trace\n" in said
    assert "- unpriced, and in no such sum: 2 runs\n- uncosted, and in no such sum: 1 runs\n- **euro: so many" in said
    assert "- what providers report, by day and model: 1 of 1 differ\n" in said
    assert said.endswith("`python -m flows reconcile apply 12`")
    assert verdict_rows(FOUND)[0] == {
        "run": "run-2",
        "account": "acme",
        "verdict": "double-counted",
        "at stake": "-3.5 USD",
        "cost, USD": "-2",
        "why": "why",
    }


def test_a_plan_that_asks_for_providers_is_told_when_nothing_was_pulled() -> None:
    asked = "A plan asks for what providers report, and no day of it was pulled"
    assert asked in words_of(reconciliation_html(RECONCILED, FOUND, is_missing=True))
    assert asked in summary_markdown(RECONCILED, FOUND, is_missing=True)
    assert asked not in reconciliation_html(RECONCILED, FOUND)
