"""A month of LLM usage that looks like the real thing: what the demo, the benchmarks and many tests bill.

Work comes in runs. A run is a handful of LLM calls on one model within minutes, each call carrying the growing
conversation, much of it read from the provider's cache; some runs end by extracting facts and storing learnings.
Runs follow office hours and weekdays, arrive in bursts, and a few accounts make most of them.
"""

from __future__ import annotations

import csv
import random
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate, pairwise
from operator import itemgetter
from typing import TYPE_CHECKING
from uuid import UUID

from metering.windows import period_of_month

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path

__all__ = ["COLUMNS", "MAX_ACCOUNTS", "MODELS", "Summary", "write_month"]

COLUMNS = (
    "account",
    "plan",
    "line",
    "operation",
    "occurred_at",
    "provider",
    "model",
    "input_tokens",
    "cache_read_tokens",
    "output_tokens",
    "reasoning_tokens",
    "quantity",
    "request_id",
    "run_id",
)

MODELS = {
    "gpt-5.6-terra": "openai",
    "gpt-5.6-luna": "openai",
    "claude-opus-5": "anthropic",
    "claude-sonnet-5": "anthropic",
    "claude-haiku-4-5": "anthropic",
    "gemini-3.5-flash": "google",
    "gemini-3.5-flash-lite": "google",
}
"""Every model that occurs, and its provider, as genai-prices names them."""

_REASONING = frozenset({"gpt-5.6-terra", "claude-opus-5", "claude-sonnet-5", "gemini-3.5-flash"})
_EXTRACTION_MODEL = "gemini-3.5-flash-lite"

# How often a run takes each model of MODELS, in that order.
_MODEL_WEIGHTS = {
    "enterprise": (28, 14, 8, 24, 10, 12, 4),
    "premium": (26, 18, 5, 24, 10, 12, 5),
    "pro": (24, 24, 0, 20, 12, 14, 6),
    "free": (0, 48, 0, 0, 10, 12, 30),
}
# Median tokens of the first prompt and of a visible answer.
_OPERATIONS = {
    "POST /evaluate": (6_000, 400),
    "POST /chat": (2_500, 650),
    "POST /summarize": (12_000, 500),
    "POST /search": (4_000, 200),
}
_OPERATION_WEIGHTS = (35, 40, 15, 10)
# Share of a business day's runs that start in each hour after local midnight.
_HOURS = (1, 1, 1, 1, 1, 2, 4, 9, 18, 26, 29, 27, 20, 24, 29, 28, 24, 17, 10, 7, 5, 4, 3, 2)
_WEEKDAYS = (1.0, 1.08, 1.1, 1.05, 0.92, 0.32, 0.28)
_UTC_OFFSETS_H = (-8, -5, -5, -5, 0, 1, 1, 1, 2, 8)

_MAX_CALLS = 40
_MAX_INPUT = 180_000
_MAX_OUTPUT = 16_000
_DAY_MS = 86_400_000

_ROOTS = (
    *("tarnivo", "belqora", "ordanex", "fenwarrow", "lumivask", "kestrivo", "quorvane", "mistrelle", "haldivar"),
    *("brontica", "sylvaro", "peltwick", "zenthica", "calyptra", "dravenmoor", "oskelia", "vintarro", "grelloway"),
    *("nuvessa", "thackeron", "pyrelune", "wexmoor", "jundaro", "solvantis", "eldermarsh", "corvessa", "ashbrindle"),
    *(
        "trellico",
        "umbraveil",
        "yarrowgate",
        "ivorlane",
        "maplevend",
        "norvessen",
        "rivenholt",
        "stavrone",
        "xylovane",
    ),
)
_TRADES = ("labs", "freight", "health", "legal", "retail", "energy", "travel", "foods")
_Row = tuple[int, tuple[object, ...]]
"""Milliseconds into the month, and the values of the other columns in their order."""
_AT = itemgetter(0)

MAX_ACCOUNTS = len(_ROOTS) * len(_TRADES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What was written."""

    rows: int
    accounts: int
    """Accounts with at least one row."""
    rows_by_plan: dict[str, int]
    rows_by_line: dict[str, int]


@dataclass(slots=True, kw_only=True)
class _Account:
    name: str
    plan: str
    model_weights: list[float]
    utc_offset_h: int
    verbosity: float
    rows_by_day: list[int]
    """Rows due by the end of each day; the last is the month's total."""
    written: int = 0


def write_month(path: Path, *, period: str, seed: int = 7, accounts: int = 36, events: int = 60_000) -> Summary:
    """Write `events` rows of `accounts` accounts in the UTC month `period` (such as `2026-10`) to a CSV at `path`.

    Rows are sorted by `occurred_at`. `request_id` is unique and serves as the idempotency key. The same arguments
    give the same bytes. Raises `ValueError` for fewer accounts than 1 or more than `MAX_ACCOUNTS`, or for negative
    `events`.
    """
    if not 1 <= accounts <= MAX_ACCOUNTS:
        raise ValueError(f"accounts: got {accounts}, expected 1 to {MAX_ACCOUNTS}")
    if events < 0:
        raise ValueError(f"events: got {events}, expected 0 or more")
    month = period_of_month(period, time_zone="UTC", anchor_day=1)
    days = (month.end - month.start).days
    rng = random.Random(f"{seed}:{period}")
    customers = _accounts(rng, accounts, events, [(month.start + timedelta(days=d)).weekday() for d in range(days)])

    by_plan: Counter[str] = Counter()
    by_line: Counter[str] = Counter()
    by_account: Counter[str] = Counter()
    pending: list[_Row] = []
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for day in range(days):
            for customer in customers:
                _add_day(rng, customer, day, pending, last_ms=days * _DAY_MS - 1)
            pending.sort(key=_AT)
            # A run that began before midnight may go on after it: those rows wait for the next day's.
            done = bisect_left(pending, (day + 1) * _DAY_MS, key=_AT)
            for at_ms, (account, plan, line, operation, *rest) in pending[:done]:
                writer.writerow((account, plan, line, operation, _iso(month.start, at_ms), *rest))
                by_plan[str(plan)] += 1
                by_line[str(line)] += 1
                by_account[str(account)] += 1
            del pending[:done]
    return Summary(
        rows=by_line.total(), accounts=len(by_account), rows_by_plan=dict(by_plan), rows_by_line=dict(by_line)
    )


def _iso(start: datetime, ms: int) -> str:
    at = start + timedelta(milliseconds=ms)
    return at.replace(tzinfo=None).isoformat(timespec="milliseconds") + "Z"


def _accounts(rng: random.Random, count: int, events: int, weekdays: list[int]) -> list[_Account]:
    roots = rng.sample(_ROOTS, len(_ROOTS))
    laps = [divmod(rank, len(roots)) for rank in range(count)]
    names = [f"{roots[place]}-{_TRADES[(lap + place) % len(_TRADES)]}" for lap, place in laps]
    plans = [_plan_of_rank(rank, count) for rank in range(count)]
    sizes = [
        (rank + 2) ** -1.05 * rng.lognormvariate(0, 0.25) * (0.35 if plan == "free" else 1.0)
        for rank, plan in enumerate(plans)
    ]
    totals = _shares(events, sizes)
    return [
        _Account(
            name=name,
            plan=plan,
            model_weights=[weight * rng.lognormvariate(0, 0.7) for weight in _MODEL_WEIGHTS[plan]],
            utc_offset_h=rng.choice(_UTC_OFFSETS_H),
            verbosity=rng.lognormvariate(0, 0.35),
            rows_by_day=list(accumulate(_shares(total, [_busyness(rng, weekday) for weekday in weekdays]))),
        )
        for name, plan, total in zip(names, plans, totals, strict=True)
    ]


def _plan_of_rank(rank: int, count: int) -> str:
    """The largest twelfth is enterprise, the next sixth premium, the next third pro, each at least one; then free."""
    for least, (plan, twelfths) in enumerate((("enterprise", 1), ("premium", 3), ("pro", 7)), start=1):
        if rank < max(twelfths * count / 12, least):
            return plan
    return "free"


def _busyness(rng: random.Random, weekday: int) -> float:
    backfill = 3.0 if rng.random() < 0.03 else 1.0
    return _WEEKDAYS[weekday] * backfill * rng.lognormvariate(0, 0.3)


def _shares(total: int, weights: list[float]) -> list[int]:
    """`total` in whole parts that follow `weights` and add up."""
    sums = list(accumulate(weights))
    ends = [round(total * each / sums[-1]) for each in sums]
    return [end - start for start, end in pairwise([0, *ends])]


def _add_day(rng: random.Random, customer: _Account, day: int, rows: list[_Row], *, last_ms: int) -> None:
    """Append the customer's runs of one day to `rows`."""
    begins_ms = 0
    while customer.written < customer.rows_by_day[day]:
        if begins_ms and rng.random() < 0.2:
            begins_ms += int(rng.expovariate(1 / 15_000))
        else:
            hour = (rng.choices(range(24), _HOURS)[0] - customer.utc_offset_h) % 24
            begins_ms = day * _DAY_MS + hour * 3_600_000 + rng.randrange(3_600_000)
        for at_ms, values in _run(rng, customer, begins_ms)[: customer.rows_by_day[-1] - customer.written]:
            rows.append((min(at_ms, last_ms), values))
            customer.written += 1


def _run(rng: random.Random, customer: _Account, begins_ms: int) -> list[_Row]:
    run_id = str(UUID(int=rng.getrandbits(128), version=4))
    model = rng.choices(tuple(MODELS), customer.model_weights)[0]
    operation = rng.choices(tuple(_OPERATIONS), _OPERATION_WEIGHTS)[0]
    prompt_median, answer_median = _OPERATIONS[operation]
    rows: list[_Row] = []

    def add(line: str, what: str, model: str, tokens: tuple[int, int, int, int], quantity: int) -> None:
        request_id = f"req_{rng.getrandbits(96):024x}"
        identity = (customer.name, customer.plan, line, what, MODELS.get(model, ""), model)
        rows.append((at_ms, (*identity, *tokens, quantity, request_id, run_id)))

    at_ms = begins_ms
    prompt = int(prompt_median * customer.verbosity * rng.lognormvariate(0, 0.9))
    if rng.random() < 0.04:
        prompt = int(prompt * rng.paretovariate(0.9))
    prompt = min(prompt + 20, _MAX_INPUT)
    cached = 0
    for _ in range(min(int(rng.paretovariate(1.25)), _MAX_CALLS)):
        visible = int(answer_median * customer.verbosity * rng.lognormvariate(0, 0.8)) + 1
        reasoning = int(rng.lognormvariate(6.3, 0.9)) if model in _REASONING and rng.random() < 0.5 else 0
        output = min(visible + reasoning, _MAX_OUTPUT)
        add("application", operation, model, (prompt, cached, output, min(reasoning, output - 1)), 0)
        at_ms += int(output * 9 + rng.lognormvariate(8.3, 1.1))
        # Providers cache whole blocks of 128 tokens, from 1,024 on, and not always.
        cached = prompt // 128 * 128 if prompt >= 1_024 and rng.random() < 0.75 else 0
        prompt = min(prompt + visible + int(rng.lognormvariate(5.5, 1.0)), _MAX_INPUT)
    if rng.random() < 0.5:
        source = min(int(prompt * rng.uniform(0.3, 1.0)) + 50, _MAX_INPUT)
        extracted = int(rng.lognormvariate(5.0, 0.6)) + 1
        add("extraction_tokens", "extract", _EXTRACTION_MODEL, (source, 0, extracted, 0), 0)
        at_ms += rng.randrange(500, 5_000)
        if rng.random() < 0.6:
            add("learnings_generated", "learn", "", (0, 0, 0, 0), min(int(rng.paretovariate(1.4)), 25))
    return rows
