"""Probes in the ledger, on both databases: what was read comes back, and a cap on paid ones holds for all."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from metering.errors import ProviderLimited, UnexpectedAnswer
from metering.ledger import Ledger
from metering.ledger.observations import MAX_PROBLEM, Recorded, readings_since, record_statuses
from metering.ledger.paid_probes import COSTED, LedgerPaidProbes, cost_paid_probes
from metering.ledger.schema import paid_probes, provider_probes
from metering.providers import LimitWindow
from metering.providers.forecast import Reading
from metering.providers.probes import ProviderStatus

if TYPE_CHECKING:
    from collections.abc import Iterator

    from metering.providers.paying import PaidProbe

AT = datetime(2026, 3, 12, 23, 58, tzinfo=UTC)
TOKENS = LimitWindow(
    limit=40_000, remaining=10_000, used=30_000, percent_used=75.0, reset_in_ms=61_001, reset_at=AT + timedelta(hours=9)
)


@pytest.fixture
def ledger(either_url: str) -> Iterator[Ledger]:
    with closing(Ledger(either_url)) as opened:
        yield opened


def status(minutes: int = 0, **said: Any) -> ProviderStatus:
    at = AT + timedelta(minutes=minutes)
    return ProviderStatus(**{"provider": "openai", "account_key": "prod", "checked_at": at, "reachable": True, **said})


def test_readings_come_back_by_window_in_the_order_of_time(ledger: Ledger) -> None:
    money = LimitWindow(limit=Decimal("20"), remaining=Decimal("3.999999"), percent_used=80.000005)
    with ledger.write() as connection:
        record_statuses(
            connection,
            [
                status(5, windows={"tokens": LimitWindow(remaining=2**53)}),
                status(0, windows={"tokens": TOKENS, "credits_usd": money}),
                status(0, account_key="other", windows={"tokens": LimitWindow()}),
                status(0, provider="anthropic", windows={"tokens": LimitWindow(percent_used=100 / 3)}),
                status(-1, windows={"tokens": TOKENS}),
            ],
        )
    with ledger.read() as connection:
        found = readings_since(connection, AT)
    assert found == {
        ("prod", "openai", "tokens"): [
            Reading(
                checked_at=AT,
                limit=Decimal(40_000),
                remaining=Decimal(10_000),
                percent_used=Decimal(75),
                reset_at=AT + timedelta(milliseconds=61_001),
            ),
            Reading(checked_at=AT + timedelta(minutes=5), remaining=Decimal(2**53)),
        ],
        ("prod", "openai", "credits_usd"): [
            Reading(
                checked_at=AT,
                limit=Decimal(20),
                remaining=Decimal("3.999999"),
                percent_used=Decimal("80.000005"),
            )
        ],
        ("other", "openai", "tokens"): [Reading(checked_at=AT)],
        ("prod", "anthropic", "tokens"): [Reading(checked_at=AT, percent_used=Decimal("33.333333333333"))],
    }
    of_a_probe = Reading.of(AT, money)
    assert found["prod", "openai", "credits_usd"] == [of_a_probe]


def test_what_a_probe_said_besides(ledger: Ledger) -> None:
    said = status(
        error=ProviderLimited("openai", "answered 429: a rate limit is reached", status=429),
        rate_limited=True,
        retry_after_s=1 / 3,
        models=("a", "b"),
        sample_model="gpt-4o-mini",
        sample_input_tokens=9,
        sample_output_tokens=1,
        sample_latency_ms=420,
        warnings=("x-ratelimit-reset-tokens: got 'soon', expected a duration",),
    )
    with ledger.write() as connection:
        assert record_statuses(connection, [said, status(1, reachable=None)]) == Recorded(kept=2, refused=0)
    with ledger.read() as connection:
        first, second = (
            row._asdict() for row in connection.execute(sa.select(provider_probes).order_by(provider_probes.c.seq))
        )
    assert first == {
        "seq": first["seq"],
        "credential": "prod",
        "provider": "openai",
        "checked_at": AT,
        "reachable": True,
        "error": "ProviderLimited",
        "problem": "openai: answered 429: a rate limit is reached",
        "rate_limited": True,
        "retry_after_s": Decimal("0.333"),
        "models": 2,
        "sample_model": "gpt-4o-mini",
        "sample_input_tokens": 9,
        "sample_output_tokens": 1,
        "sample_latency_ms": 420,
        "warnings": "[\"x-ratelimit-reset-tokens: got 'soon', expected a duration\"]",
    }
    assert {name for name, value in second.items() if value is None} == {
        name for name in first if name.startswith("sample_")
    } | {"reachable", "error", "problem", "retry_after_s", "warnings"}


def test_what_no_ledger_can_hold_is_refused_alone(ledger: Ledger, caplog: pytest.LogCaptureFixture) -> None:
    wrong = [
        status(1, account_key="wrong", sample_latency_ms=10**30, windows={"tokens": TOKENS}),
        status(2, account_key="wrong", checked_at=AT.replace(tzinfo=None)),
        status(3, account_key="wrong", models=None),
    ]
    with ledger.write() as connection:
        assert record_statuses(connection, [status(), *wrong[:2], status(5), status()]) == Recorded(kept=2, refused=2)
    with ledger.read() as connection:
        assert readings_since(connection, AT) == {}
        assert connection.execute(sa.select(provider_probes.c.credential)).scalars().all() == ["prod"] * 2
    ours = [record.getMessage() for record in caplog.records if record.name == "metering"]
    assert [message.partition(": ")[0] for message in ours] == ["a probe of 'wrong' is not kept"] * 2
    # What is no status at all is a mistake of ours, and keeps nothing.
    with pytest.raises(TypeError), ledger.write() as connection:
        record_statuses(connection, [status(6), wrong[2]])


def test_numbers_that_do_not_fit_are_not_kept(ledger: Ledger) -> None:
    problem = UnexpectedAnswer("openai", "x" * 5_000)
    odd = LimitWindow(limit=10**40, remaining=Decimal("1e-30"), percent_used=float("inf"), reset_in_ms=10**30)
    with ledger.write() as connection:
        said = status(error=problem, retry_after_s=float("inf"), windows={"tokens": odd})
        assert record_statuses(connection, [said]) == Recorded(kept=1, refused=0)
    with ledger.read() as connection:
        assert readings_since(connection, AT) == {
            ("prod", "openai", "tokens"): [Reading(checked_at=AT, remaining=Decimal(0))]
        }
        [row] = connection.execute(sa.select(provider_probes.c.problem, provider_probes.c.retry_after_s))
    assert (len(row.problem), row.retry_after_s) == (MAX_PROBLEM, None)


ASKED = {"credential": "prod", "provider": "openai", "base_url": "https://api.openai.com", "model": "gpt-4o-mini"}


def test_a_cap_holds_for_all_who_use_the_ledger(ledger: Ledger, either_url: str) -> None:
    """Two that opened it on their own, eight threads each."""
    with closing(Ledger(either_url)) as other, ThreadPoolExecutor(16) as threads:
        payers = [LedgerPaidProbes(ledger), LedgerPaidProbes(other)]
        taken = list(threads.map(lambda number: payers[number % 2].take(**ASKED, at=AT, most=5), range(24)))
    numbers = [paid.number for paid in taken if paid is not None]
    assert sorted(numbers) == [1, 2, 3, 4, 5]


def test_a_cap_is_of_a_credential_at_an_address_on_a_day(ledger: Ledger) -> None:
    payer = LedgerPaidProbes(ledger)
    assert payer.take(**ASKED, at=AT, most=1)
    assert not payer.take(**ASKED, at=AT + timedelta(minutes=1), most=1)
    for other in ({"credential": "b"}, {"provider": "groq"}, {"base_url": "https://eu.api.openai.com"}):
        assert payer.take(**{**ASKED, **other}, at=AT, most=1)
    tomorrow = payer.take(**ASKED, at=AT + timedelta(minutes=2), most=1)
    assert tomorrow is not None
    assert tomorrow.number == 1


def test_what_was_spent_is_in_the_ledger(ledger: Ledger) -> None:
    payer = LedgerPaidProbes(ledger)
    first, second, third = (payer.take(**ASKED, at=AT, most=3) for _ in range(3))
    assert first
    assert second
    assert third
    payer.spent(second, input_tokens=9, output_tokens=1, latency_ms=420)
    payer.spent(third, input_tokens=None, output_tokens=None, latency_ms=8_000)
    costed = []

    def cost_of(paid: PaidProbe, read: int, written: int) -> Decimal | None:
        costed.append(paid)
        return Decimal(f"0.{paid.number}{read}{written}") if len(costed) > 1 else None

    later = AT + timedelta(hours=1)
    assert cost_paid_probes(ledger, later + COSTED, cost_of) == 0
    assert [cost_paid_probes(ledger, later, cost_of) for _ in range(3)] == [0, 1, 0]
    assert costed == [second, second]
    columns = ("number", "asked_at", "model", "input_tokens", "output_tokens", "latency_ms", "cost")
    query = sa.select(*(paid_probes.c[name] for name in columns)).order_by(paid_probes.c.number)
    with ledger.read() as connection:
        rows = [tuple(row) for row in connection.execute(query)]
    # The first was never answered, or who asked was killed: it was made all the same.
    assert rows == [
        (1, AT, "gpt-4o-mini", None, None, None, None),
        (2, AT, "gpt-4o-mini", 9, 1, 420, Decimal("0.291")),
        (3, AT, "gpt-4o-mini", None, None, 8_000, None),
    ]
