"""A hold settled with a provider's answer or stream."""

from __future__ import annotations

import asyncio
import copy
from typing import Any

import pytest

from metering import AsyncMeter, Meter, TokenUsage
from metering.errors import InvalidEvent
from metering.integrations.asgi import RequestHold
from metering.payloads import UsageStream, reply_of
from tests.metering.payload_cases import STREAMS, WHOLE, Plain, made_of


@pytest.fixture
def secret(meter: Meter) -> str:
    return meter.keys.create(account="acme", plan="free").secret


def billed(meter: Meter) -> tuple[Any, ...]:
    with meter.ledger.read() as connection:
        [row] = connection.exec_driver_sql(
            "SELECT input_tokens, output_tokens, provider, model, estimated FROM events"
        ).all()
    return tuple(row)


ANSWER = WHOLE["anthropic: message with a cache write"]["payload"]
ESTIMATE = TokenUsage(input_tokens=900, output_tokens=900)


@pytest.mark.parametrize("told", ["nothing", "reserve", "settle"])
def test_a_hold_takes_the_answer_and_what_it_names(meter: Meter, secret: str, told: str) -> None:
    said = {"provider": "ours", "model": "m"}
    reserved, settled = (said if told == "reserve" else {}), (said if told == "settle" else {})
    with meter.reserve(secret, line="application", estimate=ESTIMATE, **reserved) as hold:  # type: ignore[arg-type]
        hold.settle(made_of(Plain, ANSWER), **settled)  # type: ignore[arg-type]
    names = ("anthropic", "claude-sonnet-4-20250514") if told == "nothing" else ("ours", "m")
    assert billed(meter) == (627, 97, *names, False)


def test_a_hold_takes_a_stream(meter: Meter, secret: str) -> None:
    stream = UsageStream()
    with meter.reserve(secret, line="application", estimate=ESTIMATE) as hold:
        for chunk in STREAMS["anthropic: stream"]["stream"]:
            stream.add(chunk)
        hold.settle(stream)
    assert billed(meter) == (25, 15, "anthropic", "claude-opus-4-20250514", False)


def test_the_provider_of_the_hold_tells_what_the_counts_do_not(meter: Meter, secret: str) -> None:
    counts = {"prompt_tokens": 10, "completion_tokens": 8, "completion_tokens_details": {"reasoning_tokens": 5}}
    with meter.reserve(secret, line="application", estimate=ESTIMATE, provider="xai") as hold:
        hold.settle(counts, model="grok-4")
    assert billed(meter) == (10, 13, "xai", "grok-4", False)


def test_the_same_answer_twice_is_one_settle_and_a_strange_one_bills_the_estimate(meter: Meter, secret: str) -> None:
    with meter.reserve(secret, line="application", estimate=ESTIMATE) as hold:
        first = hold.settle(ANSWER)
        assert hold.settle(copy.deepcopy(ANSWER)).event_id == first.event_id
    strange = meter.reserve(secret, line="application", estimate=ESTIMATE)
    with pytest.raises(InvalidEvent, match="names seen: id, content"), strange as hold:
        hold.settle({"id": 1, "content": "what was said"})
    with meter.ledger.read() as connection:
        rows = connection.exec_driver_sql("SELECT input_tokens, estimated FROM events ORDER BY seq").all()
    assert [tuple(row) for row in rows] == [(627, 0), (900, 1)]


def test_an_async_hold_and_that_of_a_request_take_it_too(ledger_url: str, clock: Any) -> None:
    async def settle(meter: AsyncMeter) -> None:
        key = await meter.keys.create(account="acme", plan="free")
        async with meter, meter.reserve(key.secret, line="application", estimate=ESTIMATE) as hold:
            RequestHold(hold).settle(ANSWER)
            await hold.settle(ANSWER)

    asyncio.run(settle(AsyncMeter(ledger_url, clock=clock)))
    with Meter(ledger_url, clock=clock) as meter:
        assert billed(meter) == (627, 97, "anthropic", "claude-sonnet-4-20250514", False)


@pytest.mark.parametrize("model", ["m" * 300, "a\nb", "", 7])
def test_a_model_that_no_event_could_keep_is_left_out(model: object) -> None:
    counts = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    reply = reply_of({"model": model, "usage": counts})
    assert (reply.model, reply.usage.total_tokens) == (None, 3)
