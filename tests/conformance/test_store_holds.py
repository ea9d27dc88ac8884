"""Holds: reserved before, settled once into the window they were made in, never shrunk, never leaked."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from metering.billing.pricing import Match, Rate
from metering.errors import InvalidEvent, LimitExceeded, SettleConflict
from metering.events import TokenUsage, derive_event_id
from metering.plans import Limit

TOKENS_A_DAY = Limit(metric="tokens", per="day", max=100)


def tokens(count: int) -> TokenUsage:
    return TokenUsage(input_tokens=count)


def only_event(shop: Any) -> Any:
    [event] = shop.events()
    return event


def test_a_hold_takes_its_estimate_and_makes_no_event(shop: Any) -> None:
    secret = shop.open_account(TOKENS_A_DAY)
    hold = shop.reserve(secret, 80)
    assert (hold.decision.remaining, shop.used()) == (20, [80])
    assert shop.count("events") == 0
    with pytest.raises(LimitExceeded) as caught:
        shop.reserve(secret, 21)
    assert (caught.value.decision.refused_by.asked, caught.value.used) == (21, 80)
    assert shop.reserve(secret, 20).decision.allowed


def test_a_settle_bills_the_real_cost(shop: Any, clock: Any) -> None:
    secret = shop.open_account(TOKENS_A_DAY)
    hold = shop.reserve(secret, 80, operation="op", model="planned")
    clock.advance(seconds=30)
    settled = hold.settle(tokens(50), model="real", provider="p", latency_ms=30_000)
    assert (settled.billable, settled.late, settled.repeated) == (True, False, False)
    assert shop.used() == [50]
    event = only_event(shop)
    assert event["event_id"] == settled.event_id.hex == hold.decision.event_id.hex
    assert (event["input_tokens"], event["model"], event["provider"], event["operation"]) == (50, "real", "p", "op")
    assert (event["occurred_at"], event["recorded_at"]) == (
        "2026-03-12T12:00:00.000000Z",
        "2026-03-12T12:00:30.000000Z",
    )
    assert (event["estimated"], event["late"], event["counted"], event["latency_ms"]) == (0, 0, 1, 30_000)


def test_the_same_settle_twice_is_one(shop: Any) -> None:
    hold = shop.reserve(shop.open_account(TOKENS_A_DAY), 80)
    first = hold.settle(tokens(50), model="m")
    again = hold.settle(tokens(50), model="m", response="another", latency_ms=5)
    assert (again.event_id, again.repeated, again.billable) == (first.event_id, True, True)
    assert (shop.count("events"), shop.used()) == (1, [50])


@pytest.mark.parametrize(
    "second",
    [{"usage": tokens(51)}, {"usage": tokens(50), "model": "n"}, {"usage": tokens(50), "quantity": Decimal("0.1")}],
)
def test_another_settle_is_a_conflict_and_the_first_stands(shop: Any, second: dict[str, Any]) -> None:
    hold = shop.reserve(shop.open_account(TOKENS_A_DAY), 80)
    first = hold.settle(tokens(50), model="m")
    with pytest.raises(SettleConflict):
        hold.settle(**second)
    assert hold.settled == first
    assert hold.settle(tokens(50), model="m").repeated
    assert (shop.count("events"), shop.used()) == (1, [50])


def test_a_release_gives_back_and_bills_nothing(shop: Any) -> None:
    secret = shop.open_account(TOKENS_A_DAY)
    hold = shop.reserve(secret, 80, request={"q": 1})
    assert hold.release(ValueError("model is down"))
    assert (shop.used(), shop.count("events")) == ([0], 0)
    [entry] = shop.log("acme")
    assert (entry.event_id, entry.request, entry.error) == (None, {"q": 1}, "ValueError: model is down")
    assert not hold.release()
    assert len(shop.log("acme")) == 1


def test_a_settle_after_a_release_is_billed_and_late(shop: Any) -> None:
    hold = shop.reserve(shop.open_account(TOKENS_A_DAY), 80)
    hold.release()
    settled = hold.settle(tokens(30))
    assert (settled.billable, settled.late) == (True, True)
    assert shop.used() == [30]


def test_a_release_after_a_settle_changes_nothing(shop: Any) -> None:
    hold = shop.reserve(shop.open_account(TOKENS_A_DAY), 80, request="q")
    hold.settle(tokens(30))
    before = shop.written()
    assert not hold.release("too late")
    assert (shop.written(), shop.used()) == (before, [30])


def test_an_expired_hold_gives_back_at_the_next_admission(shop: Any, clock: Any) -> None:
    secret = shop.open_account(TOKENS_A_DAY)
    shop.reserve(secret, 100)
    clock.advance(minutes=15, microseconds=-1)
    assert not shop.consume(secret, 1).allowed
    clock.advance(microseconds=1)
    assert shop.consume(secret, 100).allowed
    assert (shop.holds("expired"), shop.count("events")) == (1, 1)


def test_an_admission_expires_sixteen_and_the_sweep_the_rest(shop: Any, clock: Any) -> None:
    secret, other = shop.open_account(Limit(metric="requests", per="day", max=40)), shop.open_account(account="other")
    for _ in range(40):
        shop.reserve(secret)
    clock.advance(minutes=15)
    shop.consume(other)
    assert shop.holds("open") == 40
    assert shop.consume(secret).allowed
    assert (shop.holds("open"), shop.used()) == (24, [25])
    assert shop.meter.expire_holds() == 24
    assert shop.meter.expire_holds() == 0
    assert shop.used() == [1]


def test_a_key_is_free_once_its_hold_is_over_however_many_are_before_it(shop: Any, clock: Any) -> None:
    secret = shop.open_account(Limit(metric="requests", per="day", max=40))
    for _ in range(17):
        shop.reserve(secret)
    clock.advance(seconds=1)
    shop.reserve(secret, idempotency_key="k")
    clock.advance(minutes=15)
    assert not shop.consume(secret, idempotency_key="k").replayed
    assert (shop.holds("open"), shop.used()) == (1, [2])


def test_a_renewed_hold_lives_on(shop: Any, clock: Any) -> None:
    secret = shop.open_account(TOKENS_A_DAY)
    hold = shop.reserve(secret, 100)
    clock.advance(minutes=14)
    assert shop.meter._store.renew(hold.decision.hold, 900)
    clock.advance(minutes=14)
    assert not shop.consume(secret, 1).allowed
    assert not hold.settle(tokens(100)).late
    assert not shop.meter._store.renew(hold.decision.hold, 900)


def test_a_settle_after_expiry_is_billed_in_full_and_late(shop: Any, clock: Any) -> None:
    secret = shop.open_account(TOKENS_A_DAY)
    hold = shop.reserve(secret, 80)
    clock.advance(minutes=15)
    shop.meter.expire_holds()
    assert shop.used() == [0]
    settled = hold.settle(tokens(60))
    assert (settled.billable, settled.late) == (True, True)
    assert (shop.used(), only_event(shop)["late"]) == ([60], 1)
    assert hold.settle(tokens(60)).repeated


def test_the_second_attempt_under_a_key_is_kept_and_not_billed(shop: Any, clock: Any) -> None:
    secret = shop.open_account(TOKENS_A_DAY)
    first = shop.reserve(secret, 10, idempotency_key="k")
    clock.advance(minutes=15)
    second = shop.reserve(secret, 10, idempotency_key="k")
    winner = second.settle(tokens(9), response="second")
    loser = first.settle(tokens(8), response="first")
    assert (winner.billable, winner.late) == (True, False)
    assert (loser.billable, loser.late) == (False, True)
    assert winner.event_id == derive_event_id("usage", "acme", "a", "k") != loser.event_id
    assert shop.used() == [17], "both were spent"
    assert (shop.count("events", "billable"), shop.kept("replays")) == (1, 1)
    assert shop.consume(secret, 1, idempotency_key="k").response == "second"
    assert first.settle(tokens(8)).repeated


def test_a_settle_above_the_limit_is_an_overrun_and_closes_the_door(shop: Any, clock: Any) -> None:
    secret = shop.open_account(TOKENS_A_DAY)
    shop.reserve(secret, 90).settle(tokens(130))
    [status] = shop.meter.quota("acme")
    assert (status.used, status.overrun, status.remaining) == (130, 30, 0)
    refused = shop.consume(secret, 0)
    assert (refused.allowed, refused.remaining) == (False, 0)
    clock.advance(days=1)
    assert shop.consume(secret, 100).allowed


def test_a_settle_moves_the_window_of_its_hold(shop: Any, clock: Any) -> None:
    secret = shop.open_account(TOKENS_A_DAY)
    clock.advance(hours=11, minutes=55)
    hold, dropped = shop.reserve(secret, 60), shop.reserve(secret, 40)
    clock.advance(minutes=10)
    assert shop.consume(secret, 100).allowed, "the new day is empty"
    hold.settle(tokens(50))
    dropped.release()
    assert shop.used() == [100], "and stays as it was"
    clock.now = clock.now.replace(day=12)
    assert shop.used() == [50]
    assert only_period(shop) == {"2026-03-12T23:55:00.000000Z": 50, "2026-03-13T00:05:00.000000Z": 100}


def only_period(shop: Any) -> dict[str, int]:
    return {event["occurred_at"]: event["input_tokens"] for event in shop.events()}


def test_what_settle_does_not_say_stays_as_reserved(shop: Any) -> None:
    secret = shop.open_account()
    shop.reserve(secret, 5, quantity=3, model="m", provider="p", service_tier="batch").settle(tokens(4))
    event = only_event(shop)
    assert (event["quantity"], event["model"], event["provider"], event["service_tier"]) == ("3", "m", "p", "batch")


def test_an_estimate_is_no_cost(shop: Any) -> None:
    hold = shop.reserve(shop.open_account(TOKENS_A_DAY), 5)
    with pytest.raises(InvalidEvent, match="usage: got None"):
        hold.settle(model="m")
    assert shop.count("events") == 0


def test_a_name_that_a_rate_needs_is_asked_for(shop: Any) -> None:
    by_model = Rate(type="per_unit", metric="input_tokens", match=Match(model="gpt*"), unit_amount=Decimal(1))
    by_cost = Rate(type="cost_plus", line="b", markup_percent=Decimal(20))
    secret = shop.open_account(rates=(by_model, by_cost))
    for line in ("a", "b"):
        hold = shop.reserve(secret, 5, line=line)
        with pytest.raises(InvalidEvent, match="model: got None, expected the model"):
            hold.settle(tokens(4))
        assert hold.settle(tokens(4), model="gpt").billable
    assert shop.reserve(secret, 5).settle(TokenUsage(output_tokens=4)).billable, "no rate asks for output tokens"


def test_an_upgrade_changes_limits_at_once_and_holds_keep_their_plan(shop: Any) -> None:
    secret = shop.open_account(TOKENS_A_DAY)
    shop.set_plan("large", Limit(metric="tokens", per="day", max=1_000))
    hold = shop.reserve(secret, 100)
    assert not shop.consume(secret, 1).allowed
    shop.meter.accounts.change_plan("acme", "large")
    decision = shop.consume(secret, 900)
    assert (decision.allowed, decision.plan, decision.remaining) == (True, "large", 0)
    hold.settle(tokens(100))
    versions = [event["plan_version"] for event in sorted(shop.events(), key=lambda event: event["input_tokens"])]
    assert versions == [hold.decision.plan_version, decision.plan_version]
    assert shop.meter.accounts.change_plan("acme", "acme").plan == "acme"
    assert not shop.consume(secret, 1).allowed


def test_a_new_metric_or_window_starts_from_what_the_ledger_has(shop: Any, clock: Any) -> None:
    secret = shop.open_account(Limit(metric="requests", per="day", max=100))
    shop.consume(secret, 30)
    clock.advance(hours=1)
    shop.consume(secret, 20, line="b")
    shop.meter.record(account="acme", line="a", usage=tokens(1_000))
    hold = shop.reserve(secret, 7)
    shop.set_plan(
        "acme",
        Limit(metric="tokens", per="month", max=60),
        Limit(metric="tokens", per="hour", max=60),
        Limit(metric="input_tokens", per="day", max=60, line="b"),
        Limit(metric="tokens", per="day", max=60, scope="key"),
    )
    key_id = shop.meter.authenticate(secret).key_id
    assert shop.used(key_id=key_id) == [57, 27, 20, 57]
    assert not shop.consume(secret, 4).allowed
    assert shop.consume(secret, 3).allowed
    hold.settle(tokens(5))
    assert shop.used(key_id=key_id) == [58, 28, 20, 58]
    assert [status.used for status in shop.consume(secret, 2).limits] == [60, 30, 60]


def test_a_settle_days_later_counts_where_the_hold_was_made(shop: Any, clock: Any) -> None:
    secret = shop.open_account(TOKENS_A_DAY)
    hold = shop.reserve(secret, 10)
    clock.advance(days=3)
    shop.consume(secret, 1)
    hold.settle(tokens(12))
    clock.advance(days=-3)
    assert shop.used() == [12]
