"""Problem documents and RateLimit fields, without a server."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import msgspec
import pytest

from metering import Limit, LimitStatus
from metering.admission.protocol import Decision
from metering.errors import LimitExceeded, Replayed, SchemaMismatch, UnknownAccount
from metering.events import new_event_id
from metering.integrations import problems

NOW = datetime(2026, 3, 12, 12, tzinfo=UTC)


def standing(limit: Limit, used: int | Decimal, most: int | Decimal, **said: Any) -> LimitStatus:
    return LimitStatus(limit=limit, used=used, max=most, **said)


def fields(*statuses: LimitStatus) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in problems.rate_limit_headers(statuses, NOW)}


@pytest.mark.parametrize(
    ("status", "policy", "left"),
    [
        (
            standing(
                Limit(metric="requests", per="hour", max=Decimal(10)), 4, 10, reset_at=NOW + timedelta(seconds=9.2)
            ),
            '"requests/hour/account/*";q=10;w=3600',
            '"requests/hour/account/*";r=6;t=10',
        ),
        (
            standing(Limit(metric="tokens", per="month", max=Decimal(2**53), scope="key"), 2**54, 2**53),
            '"tokens/month/key/*";q=999999999999999;qu="tokens"',
            '"tokens/month/key/*";r=0',
        ),
        (
            standing(
                Limit(metric="quantity", per="day", max=Decimal("2.5"), line='a "é" %'),
                Decimal("0.7"),
                Decimal("2.5"),
                reset_at=NOW - timedelta(seconds=1),
            ),
            '"quantity/day/account/a %22%C3%A9%22 %25";q=2;qu="quantity";w=86400',
            '"quantity/day/account/a %22%C3%A9%22 %25";r=1;t=0',
        ),
        (
            standing(Limit(metric="requests", rate="120/minute", burst=25), 5, 25, reset_at=NOW),
            '"requests/120 per minute burst 25/account/*";q=25;w=13',
            '"requests/120 per minute burst 25/account/*";r=20;t=0',
        ),
    ],
)
def test_rate_limit_fields(status: LimitStatus, policy: str, left: str) -> None:
    assert fields(status) == {"ratelimit-policy": policy, "ratelimit": left}
    assert fields(status, status) == {"ratelimit-policy": f"{policy}, {policy}", "ratelimit": f"{left}, {left}"}


def test_nothing_is_said_of_no_limit() -> None:
    assert fields() == {}


def decision(**said: Any) -> Decision:
    return Decision(event_id=new_event_id(), account="acme", plan="p", plan_version=1, key_id="k", **said)


def test_a_refusal_in_parts_of_a_unit_is_exact() -> None:
    limit = Limit(metric="quantity", per="day", max=Decimal("2.5"))
    refused = standing(limit, Decimal("2.25"), Decimal("2.5"), asked=Decimal(1), retry_after_s=0.2, reset_at=NOW)
    answer = problems.answer_to(LimitExceeded(decision(allowed=False, limits=[refused], refused_by=refused)), NOW)
    assert answer is not None
    said = msgspec.json.decode(answer.body)
    assert (said["used"], said["max"], said["remaining"], said["asked"]) == ("2.25", "2.5", "0.25", 1)
    assert (said["retry_after_s"], said["reset_at"]) == (1, "2026-03-12T12:00:00+00:00")
    assert dict(answer.headers)[b"retry-after"] == b"1"


@pytest.mark.parametrize("response", [None, "stored by consume", {"status": 200}])
def test_a_replay_of_what_no_endpoint_answered_is_not_made_up(response: object) -> None:
    answer = problems.answer_to(Replayed(decision(allowed=True, replayed=True, response=response)), NOW)
    assert answer is not None
    assert (answer.status, msgspec.json.decode(answer.body)["type"]) == (409, "urn:tallystick:response-not-kept")


@pytest.mark.parametrize("body", [b'{"a": 1}', "é".encode(), bytes(range(256)), b""])
def test_a_reply_is_stored_and_read_again(body: bytes) -> None:
    headers = {b"content-type": b"text/x", b"location": b"/1", b"content-encoding": b"gzip", b"x-own": b"1"}
    stored = msgspec.json.decode(msgspec.json.encode(problems.stored_reply(201, headers, body)))
    answer = problems.answer_to(Replayed(decision(allowed=True, replayed=True, response=stored)), NOW)
    assert answer is not None
    assert (answer.status, answer.body) == (201, body)
    del headers[b"x-own"]
    assert dict(answer.headers) == {**headers, b"idempotent-replayed": b"true"}


def test_the_apps_own_faults_are_not_the_callers() -> None:
    for error in (UnknownAccount("acme"), SchemaMismatch("old"), ValueError()):
        assert problems.answer_to(error, NOW) is None
