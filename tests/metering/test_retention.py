"""Retention: what goes when, by the plan in force when it was written, and what a legal hold keeps."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from metering import TokenUsage
from metering.errors import Conflict, InvalidEvent, InvalidSetting, UnknownAccount
from metering.ledger import admin_log
from metering.ledger.retention import LEAST_SIZE, MAX_SIZE, Kept, due, next_size, rules, sweep
from metering.ledger.schema import events, request_log
from metering.legal_holds import holds_of, place_hold, release_hold
from metering.plans import Plan
from tests.metering.retaining import call, logged, run

if TYPE_CHECKING:
    from metering import Meter

TIERS = {"free": 7, "pro": 30, "premium": 90, "enterprise": 365}


@pytest.fixture
def ledger_url(either_url: str) -> str:
    return either_url


def test_each_tier_keeps_its_own_rows_for_its_own_time(meter: Meter, clock: Any) -> None:
    for plan in TIERS:
        call(meter, meter.keys.create(plan, plan=plan).secret)
    began = clock.now
    for days, left in [(6.9, 4), (7, 3), (29.9, 3), (30, 2), (89.9, 2), (90, 1), (364.9, 1), (365, 0)]:
        clock.now = began + timedelta(days=days)
        run(meter, clock)
        assert len(logged(meter)) == left, days
    with meter.ledger.read() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(events)).scalar_one() == 4


def test_a_row_goes_by_the_plan_it_was_written_under(meter: Meter, clock: Any) -> None:
    secret = meter.keys.create("acme", plan="pro").secret
    call(meter, secret)
    meter.accounts.change_plan("acme", "free")
    clock.advance(hours=1)
    call(meter, secret)
    clock.advance(days=7)
    run(meter, clock)
    assert logged(meter) == {"acme": 1}
    clock.advance(days=30 - 7, hours=-1)
    run(meter, clock)
    assert logged(meter) == {}


def test_a_new_version_of_a_plan_is_for_new_rows(meter: Meter, clock: Any) -> None:
    meter.apply_plans([Plan(name="p", retention_days=10)])
    secret = meter.keys.create("acme", plan="p").secret
    call(meter, secret)
    clock.advance(days=1)
    meter.apply_plans([Plan(name="p", retention_days=1)])
    call(meter, secret)
    clock.advance(days=1)
    run(meter, clock)
    assert logged(meter) == {"acme": 1}
    clock.advance(days=8)
    run(meter, clock)
    assert logged(meter) == {}


def test_a_settle_is_logged_by_the_plan_then_in_force(meter: Meter, clock: Any) -> None:
    secret = meter.keys.create("acme", plan="enterprise").secret
    hold = meter.reserve(secret, line="a", request={"q": 1})
    released = meter.reserve(secret, line="a", request={"q": 1})
    meter.accounts.change_plan("acme", "free")
    clock.advance(minutes=1)
    hold.settle(TokenUsage(input_tokens=1), response={"a": 1})
    released.release(error="boom")
    with meter.ledger.read() as connection:
        found = connection.execute(sa.select(request_log.c.logged_at, request_log.c.expires_at)).all()
    assert [(row.expires_at - row.logged_at).days for row in found] == [7, 7]


def test_a_revoked_key_changes_nothing(meter: Meter, clock: Any) -> None:
    key = meter.keys.create("acme", plan="free")
    call(meter, key.secret)
    meter.keys.revoke(key.key_id)
    clock.advance(days=6)
    assert run(meter, clock)["request_log"] == {}
    assert meter.log(key_id=key.key_id)
    clock.advance(days=1)
    assert run(meter, clock)["request_log"] == {"acme": 1}


def test_nothing_of_a_held_account_goes_until_it_is_released(meter: Meter, clock: Any) -> None:
    secrets = {name: meter.keys.create(name, plan="free").secret for name in ("held", "other")}
    for secret in secrets.values():
        call(meter, secret, idempotency_key="k")
    place_hold(meter.ledger, "held", reason="case 4711", actor="counsel", now=clock.now)
    clock.advance(days=8)
    request_rule, replay_rule, *_ = rules(clock.now, Kept())
    with meter.ledger.read() as connection:
        assert due(connection, request_rule) == ({"other": 1}, {"held": 1})
        assert due(connection, replay_rule) == ({"other": 1}, {"held": 1})
    gone = run(meter, clock)
    assert (gone["request_log"], gone["replays"]) == ({"other": 1}, {"other": 1})
    assert logged(meter) == {"held": 1}
    clock.advance(days=400)
    assert run(meter, clock)["request_log"] == {}
    release_hold(meter.ledger, "held", actor="counsel", now=clock.now)
    gone = run(meter, clock)
    assert (gone["request_log"], gone["replays"]) == ({"held": 1}, {"held": 1})
    assert logged(meter) == {}


def test_a_hold_that_comes_between_the_look_and_the_deletion_wins(
    meter: Meter, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(meter, meter.keys.create("acme", plan="free").secret)
    clock.advance(days=8)
    write = meter.ledger.write

    def write_after_the_hold() -> Any:
        monkeypatch.setattr(meter.ledger, "write", write)
        place_hold(meter.ledger, "acme", reason="case", actor="counsel", now=clock.now)
        return write()

    monkeypatch.setattr(meter.ledger, "write", write_after_the_hold)
    assert sweep(meter.ledger, rules(clock.now, Kept())[0], rest=lambda _: None).gone == {}
    assert len(holds_of(meter.ledger)) == 1
    assert logged(meter) == {"acme": 1}


def test_a_hold_says_who_when_and_why(meter: Meter, clock: Any) -> None:
    meter.accounts.create("acme", plan="pro")
    placed_at = clock.now
    place_hold(meter.ledger, "acme", reason="case 4711", actor="counsel", now=placed_at)
    with pytest.raises(Conflict, match="account 'acme' is on hold since 2026-03-12T12:00"):
        place_hold(meter.ledger, "acme", reason="again", actor="counsel", now=placed_at)
    released = release_hold(meter.ledger, "acme", actor="judge", now=clock.advance(days=3))
    assert [released] == holds_of(meter.ledger, "acme") == holds_of(meter.ledger)
    assert (released.placed_at, released.placed_by, released.reason) == (placed_at, "counsel", "case 4711")
    assert (released.released_at, released.released_by) == (clock.now, "judge")
    with pytest.raises(Conflict, match="account 'acme' is not on hold"):
        release_hold(meter.ledger, "acme", actor="judge", now=clock.now)
    place_hold(meter.ledger, "acme", reason="another case", actor="counsel", now=clock.now)
    assert len(holds_of(meter.ledger, "acme")) == 2
    with meter.ledger.read() as connection:
        noted = [(e.actor, e.action, e.subject) for e in admin_log.entries(connection, limit=3)]
    assert noted == [
        ("counsel", "account.hold", "acme"),
        ("judge", "account.release", "acme"),
        ("counsel", "account.hold", "acme"),
    ]


def test_a_hold_needs_an_account_and_a_reason(meter: Meter, clock: Any) -> None:
    meter.accounts.create("acme", plan="pro")
    with pytest.raises(UnknownAccount):
        place_hold(meter.ledger, "nobody", reason="case", actor="counsel", now=clock.now)
    with pytest.raises(InvalidEvent, match="reason"):
        place_hold(meter.ledger, "acme", reason="", actor="counsel", now=clock.now)
    assert holds_of(meter.ledger) == []


def test_many_batches_take_every_row_once(meter: Meter, clock: Any) -> None:
    secrets = [meter.keys.create(name, plan="free").secret for name in ("a", "b", "c")]
    for number in range(150):
        call(meter, secrets[number % 3])
    place_hold(meter.ledger, "b", reason="case", actor="counsel", now=clock.now)
    clock.advance(days=7)
    for secret in secrets:
        call(meter, secret)
    told: list[int] = []
    rule = rules(clock.now, Kept())[0]
    swept = sweep(meter.ledger, rule, told=told.append, rest=lambda _: None)
    assert swept.gone == {"a": 50, "c": 50}
    assert logged(meter) == {"a": 1, "b": 51, "c": 1}
    assert told == sorted(told)
    assert (len(told) > 1, told[-1]) == (True, 100)


def test_what_is_kept_for_a_number_of_days_needs_a_number() -> None:
    with pytest.raises(InvalidSetting, match="span_days: got -1, expected 0 to 36500 days"):
        Kept(span_days=-1)


@given(st.integers(LEAST_SIZE, MAX_SIZE), st.floats(0, 10))
def test_a_batch_is_as_large_as_its_time_allows(size: int, took_s: float) -> None:
    following = next_size(size, took_s)
    assert LEAST_SIZE <= following <= MAX_SIZE
    if took_s > 0.1:
        assert following == max(LEAST_SIZE, size // 2)
    if took_s == 0:
        assert following == min(MAX_SIZE, size * 2)
