"""Same key, same request: one event for ever. Same key, other request: a conflict. Nothing else is written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from metering.errors import IdempotencyConflict, IdempotencyInProgress, LimitExceeded, Replayed, RevokedKey, UnknownKey
from metering.events import TokenUsage, derive_event_id
from metering.plans import Limit

if TYPE_CHECKING:
    from collections.abc import Callable

KB = 1024


def test_a_call_is_admitted_and_billed_at_once(shop: Any, clock: Any) -> None:
    secret = shop.open_account()

    decision = shop.consume(secret, 7, operation="POST /x", model="m", provider="p", error="slow", latency_ms=9)

    assert decision.allowed
    assert not decision.replayed
    [event] = shop.events()
    assert event["event_id"] == decision.event_id.hex
    assert (event["account"], event["line"], event["operation"]) == ("acme", "a", "POST /x")
    assert (event["kind"], event["requests"], event["input_tokens"], event["quantity"]) == ("usage", 1, 7, "0")
    assert (event["model"], event["provider"], event["error"], event["latency_ms"]) == ("m", "p", "slow", 9)
    assert (event["counted"], event["billable"], event["estimated"], event["late"]) == (1, 1, 0, 0)
    assert event["occurred_at"] == event["recorded_at"] == "2026-03-12T12:00:00.000000Z"
    assert event["period"] == "2026-03"


@pytest.mark.parametrize("response", [{"text": "hello"}, [1, 2], "", 0, False, {"deep": {"null": None}}])
def test_a_replay_answers_what_was_stored_and_takes_nothing(shop: Any, requests_limit: Any, response: Any) -> None:
    secret = shop.open_account(requests_limit(10))
    first = shop.consume(secret, 7, idempotency_key="k", request={"q": 1}, response=response)
    before = shop.written()

    again = shop.consume(secret, 9_999, idempotency_key="k", request={"q": 1}, response="another", latency_ms=1)

    assert (again.allowed, again.replayed, again.response_expired) == (True, True, False)
    assert again.response == response
    assert again.event_id == first.event_id
    assert shop.written() == before
    assert shop.used() == [1]


def test_a_key_names_one_fact_whatever_api_key_sends_it(shop: Any) -> None:
    first, second = shop.open_account(), shop.meter.keys.create("acme").secret
    assert not shop.consume(first, idempotency_key="k").replayed
    assert shop.consume(second, idempotency_key="k").replayed


def test_keys_are_scoped_to_account_and_line(shop: Any) -> None:
    acme, other = shop.open_account(), shop.open_account(account="other")
    decisions = [
        shop.consume(acme, idempotency_key="k"),
        shop.consume(acme, idempotency_key="k", line="b"),
        shop.consume(other, idempotency_key="k"),
    ]
    assert [decision.replayed for decision in decisions] == [False, False, False]
    assert decisions[0].event_id == derive_event_id("usage", "acme", "a", "k")
    assert len({decision.event_id for decision in decisions}) == 3


def test_calls_without_a_key_are_all_different(shop: Any) -> None:
    secret = shop.open_account()
    assert len({shop.consume(secret, request={"q": 1}).event_id for _ in range(5)}) == 5
    assert shop.count("events") == 5
    assert shop.kept("replays") == 0


def test_a_response_is_kept_for_a_day(shop: Any, clock: Any) -> None:
    secret = shop.open_account()
    shop.consume(secret, idempotency_key="k", response="r")
    clock.advance(hours=23, minutes=59)
    assert shop.consume(secret, idempotency_key="k").response == "r"
    clock.advance(minutes=1)
    late = shop.consume(secret, idempotency_key="k")
    assert (late.replayed, late.response, late.response_expired) == (True, None, True)
    clock.advance(days=400)
    assert shop.consume(secret, idempotency_key="k").replayed
    assert shop.count("events") == 1


def test_a_long_response_is_not_kept(shop: Any) -> None:
    secret, longest = shop.open_account(), shop.place.longest_reply
    shop.consume(secret, idempotency_key="fits", response="x" * (longest - 2))
    shop.consume(secret, idempotency_key="large", response="x" * (longest - 1))
    assert shop.consume(secret, idempotency_key="fits").response == "x" * (longest - 2)
    large = shop.consume(secret, idempotency_key="large")
    assert (large.replayed, large.response, large.response_expired) == (True, None, True)


def test_no_response_is_an_expired_one(shop: Any) -> None:
    secret = shop.open_account()
    shop.consume(secret, idempotency_key="k")
    assert shop.consume(secret, idempotency_key="k").response_expired


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"request": {"q": 1}}, {"request": {"q": 2}}),
        ({"operation": "a"}, {"operation": "b"}),
        ({"fingerprint": "f1"}, {"fingerprint": "f2"}),
        ({"request": 1}, {"request": "1"}),
    ],
)
def test_another_request_under_the_same_key_is_a_conflict(shop: Any, first: Any, second: Any) -> None:
    secret = shop.open_account()
    shop.consume(secret, idempotency_key="k", **first)
    before = shop.written()
    with pytest.raises(IdempotencyConflict) as caught:
        shop.consume(secret, idempotency_key="k", **second)
    assert (caught.value.line, caught.value.idempotency_key) == ("a", "k")
    assert shop.written() == before


def test_the_fingerprint_is_of_the_request_alone(shop: Any) -> None:
    secret = shop.open_account()
    shop.consume(secret, 1, idempotency_key="k", request={"a": 1, "b": 2}, model="m", response="r", error="e")
    again = shop.consume(secret, 2, idempotency_key="k", request={"b": 2, "a": 1}, model="n", latency_ms=4)
    assert again.replayed


def test_a_key_in_flight_is_in_progress_until_its_hold_ends(shop: Any, clock: Any) -> None:
    secret = shop.open_account()
    shop.reserve(secret, 5, idempotency_key="k")
    clock.advance(minutes=5)
    with pytest.raises(IdempotencyInProgress) as caught:
        shop.consume(secret, idempotency_key="k")
    assert caught.value.retry_after_s == 600
    with pytest.raises(IdempotencyInProgress):
        shop.reserve(secret, 5, idempotency_key="k")
    with pytest.raises(IdempotencyConflict):
        shop.consume(secret, idempotency_key="k", request="another")
    clock.advance(minutes=10)
    assert not shop.consume(secret, idempotency_key="k").replayed


def test_reserve_raises_what_was_stored(shop: Any) -> None:
    secret = shop.open_account()
    with shop.reserve(secret, 5, idempotency_key="k", request={"q": 1}) as hold:
        hold.settle(TokenUsage(input_tokens=4), response={"text": "hi"})
    with pytest.raises(Replayed) as caught:
        shop.reserve(secret, 5, idempotency_key="k", request={"q": 1})
    assert caught.value.response == {"text": "hi"}
    assert caught.value.decision.replayed
    assert shop.consume(secret, idempotency_key="k", request={"q": 1}).response == {"text": "hi"}


def test_a_refused_key_is_forgotten(shop: Any, requests_limit: Callable[..., Limit]) -> None:
    secret = shop.open_account(requests_limit(0))
    assert not shop.consume(secret, idempotency_key="k", request="one").allowed
    with pytest.raises(LimitExceeded):
        shop.reserve(secret, idempotency_key="k", request="two")
    shop.set_plan("acme", requests_limit(1))
    decision = shop.consume(secret, idempotency_key="k", request="three")
    assert (decision.allowed, decision.replayed) == (True, False)


def test_a_released_key_is_forgotten(shop: Any) -> None:
    secret = shop.open_account()
    assert shop.reserve(secret, 5, idempotency_key="k", request="one").release()
    assert not shop.consume(secret, idempotency_key="k", request="two").replayed


def test_a_replay_needs_no_room_and_no_usage(shop: Any) -> None:
    secret = shop.open_account(Limit(metric="tokens", per="day", max=10))
    assert shop.consume(secret, 10, idempotency_key="k").allowed
    assert not shop.consume(secret, 1).allowed
    assert shop.consume(secret, 10, idempotency_key="k").replayed
    assert shop.consume(secret, idempotency_key="k").replayed


def test_unknown_revoked_and_rotated_keys(shop: Any, clock: Any) -> None:
    secret = shop.open_account()
    key = shop.meter.authenticate(secret)
    with pytest.raises(UnknownKey):
        shop.consume("tsk_" + "x" * 43)
    successor = shop.meter.keys.rotate(key.key_id)
    assert shop.consume(secret).key_id == key.key_id
    assert shop.consume(successor.secret).key_id == successor.key_id
    clock.advance(days=1)
    with pytest.raises(RevokedKey) as caught:
        shop.consume(secret)
    assert (caught.value.key_id, caught.value.account) == (key.key_id, "acme")
    shop.meter.keys.revoke(successor.key_id)
    with pytest.raises(RevokedKey):
        shop.consume(successor.secret)
    assert shop.count("events") == 2
