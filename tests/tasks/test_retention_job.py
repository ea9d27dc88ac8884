"""The job of retention: what it says, what a dry run leaves alone, and what it keeps longer."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from metering.ledger import Ledger
from metering.ledger.retention import Kept
from metering.legal_holds import place_hold
from tasks.retention import delete_over, find_over
from tests.tasks.place import NOVEMBER, Place

LATER = NOVEMBER + timedelta(days=100)
TABLES = (
    "request_log",
    "replays",
    "spans",
    "provider_probes",
    "provider_windows",
    "paid_probes",
    "events",
    "event_ids",
)


@pytest.fixture
def ledger_url(either_url: str) -> str:
    return either_url


def fill(place: Place) -> None:
    """Two accounts with a call each, one on hold; spans, a probe with a window, and a paid one."""
    with place.meter() as meter:
        for name in ("acme", "held"):
            secret = meter.keys.create(name, plan="free").secret
            meter.consume(secret, line="a", request={}, response={}, idempotency_key="k")
        place_hold(meter.ledger, "held", reason="case", actor="counsel", now=NOVEMBER)
    at = NOVEMBER.isoformat().replace("+00:00", "Z") if place.is_on_postgres else "2023-11-16T18:17:00.000000Z"
    tokens = ", ".join(
        f"{name}_tokens"
        for name in ("input", "cache_read", "cache_write", "cache_write_1h", "input_audio", "output", "reasoning")
    )
    for number, account in enumerate(["'acme'", "'held'", "'open'", "NULL"]):
        place.change(
            "INSERT INTO spans (trace_id, span_id, run_id, account, name, recorded_at, output_audio_tokens, "
            f"{tokens}) VALUES ('t', 's{number}', 'r', {account}, 'n', '{at}', 0, 0, 0, 0, 0, 0, 0, 0)"
        )
    place.change(
        "INSERT INTO provider_probes (credential, provider, checked_at, rate_limited, models) "
        f"VALUES ('c', 'p', '{at}', {'false' if place.is_on_postgres else 0}, 0)"
    )
    place.change("INSERT INTO provider_windows (seq, name) VALUES (1, 'requests')")
    place.change(
        "INSERT INTO paid_probes (credential, provider, base_url, day, number, asked_at, model) "
        f"VALUES ('c', 'p', '', '2023-11-16', 1, '{at}', 'm')"
    )
    for account in ("acme", "held"):
        place.change(
            "INSERT INTO closes (account, period, period_end, closed_at, actor, content, previous, digest) VALUES "
            f"('{account}', '2023-11', '2023-12-01T00:00:00.000000Z', '2023-12-02T00:00:00.000000Z', 'a', '', '', '')"
        )


def counts(place: Place) -> dict[str, Any]:
    return {name: place.ledger_rows(f"SELECT count(*) FROM {name}")[0][0] for name in TABLES}


def test_each_rule_takes_its_own(place: Place) -> None:
    fill(place)
    before = counts(place)
    assert find_over.fn(place.ledger_url, NOVEMBER + timedelta(days=6), Kept(), 400) == []
    expected = [
        "request_log: 1 rows of acme",
        "request_log: 1 rows of held stay: legal hold",
        "replays: 1 rows of acme",
        "replays: 1 rows of held stay: legal hold",
        "spans: 1 rows",
        "spans: 1 rows of acme",
        "spans: 1 rows of held stay: legal hold",
        "provider_probes: 1 rows",
        "paid_probes: 1 rows",
    ]
    assert [str(line) for line in find_over.fn(place.ledger_url, LATER, Kept(), 400)] == expected
    assert counts(place) == before
    assert [str(line) for line in delete_over.fn(place.ledger_url, LATER, Kept())] == expected
    assert counts(place) == {
        **before,
        "request_log": 1,
        "replays": 1,
        # Of an account whose period is open, and of the one on hold.
        "spans": 2,
        "provider_probes": 0,
        "provider_windows": 0,
        "paid_probes": 0,
    }
    stays = [line for line in expected if "legal hold" in line]
    assert [str(line) for line in delete_over.fn(place.ledger_url, LATER, Kept())] == stays


def test_days_can_be_said(place: Place) -> None:
    fill(place)
    kept = Kept(replay_days=200, span_days=200, observation_days=200)
    found = [str(line) for line in find_over.fn(place.ledger_url, LATER, kept, 400)]
    assert found == ["request_log: 1 rows of acme", "request_log: 1 rows of held stay: legal hold"]


def test_a_replay_is_answered_as_long_as_it_is_to_be(place: Place) -> None:
    now = [NOVEMBER]
    with Place(place.home, place.url, lambda: now[0]).meter() as meter:
        secret = meter.keys.create("acme", plan="free").secret
        meter.consume(secret, line="a", response={"a": 1}, idempotency_key="k")
        now[0] += timedelta(hours=23)
        delete_over.fn(place.ledger_url, now[0], Kept())
        assert meter.consume(secret, line="a", idempotency_key="k").response == {"a": 1}
        now[0] += timedelta(days=8)
        delete_over.fn(place.ledger_url, now[0], Kept())
        again = meter.consume(secret, line="a", idempotency_key="k")
        # Without the answer, it is still the same call, and billed once.
        assert (again.replayed, again.response, again.response_expired) == (True, None, True)
    ledger = Ledger(place.ledger_url)
    with ledger.read() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM events").scalar_one() == 1
    ledger.close()
