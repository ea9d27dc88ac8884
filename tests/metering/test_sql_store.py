"""What the SQL store remembers between transactions, and what it looks up last, changes no answer."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from metering import Limit, Meter, TokenUsage
from metering.admission import directory as directory_module
from metering.errors import RevokedKey, UnknownKey
from metering.plans import Plan

if TYPE_CHECKING:
    from collections.abc import Callable


def plan(most: int, name: str = "p") -> Plan:
    return Plan(name=name, retention_days=1, limits=(Limit(metric="requests", per="month", max=most),))


@pytest.fixture
def secret(meter: Meter) -> str:
    meter.apply_plans([plan(3)])
    secret = meter.keys.create("acme", plan="p").secret
    assert meter.consume(secret, line="a").allowed
    return secret


@pytest.fixture
def elsewhere(open_meter: Callable[..., Meter]) -> Meter:
    """Another process, as far as SQLite can tell."""
    return open_meter()


def test_a_change_made_elsewhere_counts_at_once(meter: Meter, secret: str, elsewhere: Meter) -> None:
    key_id = meter.authenticate(secret).key_id
    elsewhere.apply_plans([plan(1)])
    assert not meter.consume(secret, line="a").allowed
    elsewhere.apply_plans([plan(9, "q")])
    elsewhere.accounts.change_plan("acme", "q")
    assert meter.consume(secret, line="a").plan == "q"
    elsewhere.keys.revoke(key_id)
    with pytest.raises(RevokedKey):
        meter.consume(secret, line="a")
    with pytest.raises(UnknownKey):
        meter.consume(secret + "x", line="a")
    other = elsewhere.keys.create("acme").secret
    assert meter.consume(other, line="a").allowed


def test_a_plan_version_comes_into_force_and_goes_with_the_clock(meter: Meter, secret: str, clock: Any) -> None:
    first = meter.consume(secret, line="a").plan_version
    meter.apply_plans([plan(2)], effective_from=clock.now + timedelta(hours=1))
    assert meter.consume(secret, line="a").plan_version == first
    clock.advance(minutes=59)
    assert meter.consume(secret, line="a").limits[0].max == 3
    clock.advance(minutes=1)
    assert meter.consume(secret, line="a").limits[0].max == 2
    clock.advance(hours=-1)
    assert meter.consume(secret, line="a").limits[0].max == 3


def test_a_grace_time_ends_without_any_write(meter: Meter, secret: str, clock: Any) -> None:
    new = meter.keys.rotate(meter.authenticate(secret).key_id, grace=timedelta(minutes=5))
    assert meter.consume(secret, line="a").allowed
    clock.advance(minutes=5)
    with pytest.raises(RevokedKey):
        meter.consume(secret, line="a")
    assert meter.consume(new.secret, line="a").allowed


def test_a_period_ends_with_the_clock(meter: Meter, clock: Any) -> None:
    limit = Limit(metric="requests", per="period", max=1)
    meter.apply_plans([Plan(name="p", retention_days=1, limits=(limit,))])
    meter.accounts.create("acme", plan="p", time_zone="Asia/Kolkata", anchor_day=31)
    secret = meter.keys.create("acme").secret
    assert [meter.consume(secret, line="a").allowed for _ in range(2)] == [True, False]
    clock.now = meter.quota("acme")[0].reset_at - timedelta(microseconds=1)  # type: ignore[operator]
    assert not meter.consume(secret, line="a").allowed
    clock.advance(microseconds=1)
    assert meter.consume(secret, line="a").allowed


def test_the_last_use_of_a_key_is_kept_to_the_minute(meter: Meter, secret: str, clock: Any) -> None:
    start = clock.now
    for seconds, expected in ((59, 0), (1, 60), (59, 60), (2, 121)):
        clock.advance(seconds=seconds)
        meter.consume(secret, line="a")
        assert meter.authenticate(secret).last_used_at == start + timedelta(seconds=expected)


def test_only_so_much_is_remembered(meter: Meter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory_module, "MOST_REMEMBERED", 6)
    secrets = [meter.keys.create(f"account-{number}", plan="pro").secret for number in range(9)]
    for _ in range(2):
        assert all(meter.consume(secret, line="a").allowed for secret in secrets)
    known = meter._store._store._works._current  # type: ignore[attr-defined]
    assert len(known._keys) + len(known._places) <= 8


@pytest.mark.parametrize("most", [1, 5])
def test_a_call_without_a_key_that_is_sent_twice_is_one(meter: Meter, most: int) -> None:
    meter.apply_plans([plan(most)])
    secret = meter.keys.create("acme", plan="p").secret
    admission = meter._calls.consume(secret, line="a", usage=TokenUsage(input_tokens=5))
    first, again = (meter._store.admit(admission) for _ in range(2))
    assert (first.allowed, first.replayed) == (True, False)
    assert (again.allowed, again.replayed, again.event_id) == (True, True, admission.event_id)
    assert [total.requests for total in meter.usage("acme")] == [1]
    assert meter.quota("acme")[0].used == 1
