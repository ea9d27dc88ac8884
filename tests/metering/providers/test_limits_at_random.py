"""Whatever an answer says, it is read or said not to be, and nothing in between."""

from __future__ import annotations

import decimal
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from json import dumps
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from metering.ledger import Ledger
from metering.ledger.observations import readings_since, record_statuses
from metering.providers import LimitWindow, observe, parse_limits
from metering.providers.forecast import Reading
from metering.providers.probes import ProviderStatus
from metering.providers.registry import LIMIT_RULES
from tests.metering.providers import answers, limit_answers

if TYPE_CHECKING:
    from metering.providers import Limits

REAL = [value for name, value in vars(answers).items() if name.isupper() and isinstance(value, dict)]
NAMES = sorted({name for headers in REAL for name in headers if "limit" in name or "priority" in name})
NAMES += ["date", "Date", "retry-after", "Retry-After-Ms", "x-ratelimit-limit-", "anthropic-ratelimit--limit"]
VALUES = sorted({value for headers in REAL for value in headers.values()})


def as_bytes(text: str) -> bytes:
    return text.encode("utf-8", "replace")


names = st.sampled_from(NAMES) | st.text(max_size=12) | st.text(max_size=5).map("x-ratelimit-limit-".__add__)
numbers = st.integers(-1, 30).map(str) | st.integers().map(str) | st.floats().map(str) | st.decimals().map(str)
durations = st.lists(
    st.tuples(numbers, st.sampled_from(["ns", "us", "ms", "s", "m", "h", "d", ""])).map("".join), max_size=3
).map("".join)
times = st.datetimes(timezones=st.none() | st.timezones()).map(lambda moment: moment.isoformat())
values = st.sampled_from(VALUES) | numbers | durations | times | st.text(max_size=20)
either = values | values.map(as_bytes) | st.none() | st.integers() | st.lists(values)
maps: st.SearchStrategy[Any] = st.dictionaries(names, either, max_size=12) | st.lists(
    st.tuples(names | names.map(as_bytes), either), max_size=12
)
json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["insufficient_quota", "rate_limit_error"]) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["error", "type", "code"]), inner),
    max_leaves=6,
)
LONG_AGO = {
    "date": "Mon, 01 Jan 1000 00:00:00 GMT",
    "anthropic-ratelimit-tokens-limit": "8",
    "anthropic-ratelimit-tokens-reset": "9000-01-01T00:00:00Z",
}
BODIES = [value for name, value in vars(limit_answers).items() if name.isupper()]
leaves = (
    json | values | st.floats() | st.decimals() | st.integers() | st.dictionaries(st.text(max_size=3), json, max_size=2)
)


@st.composite
def almost(draw: st.DrawFn) -> Any:
    """A body that says limits, and some of it something else, or not there."""
    body = deepcopy(draw(st.sampled_from(BODIES)))
    for _ in range(draw(st.integers(0, 3))):
        part, within = body, draw(st.integers(0, 8))
        while True:
            keys = list(part) if isinstance(part, dict) else list(range(len(part)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if within and isinstance(part[key], dict | list):
                part, within = part[key], within - 1
                continue
            if isinstance(part, dict) and draw(st.booleans()):
                del part[key]
            else:
                part[key] = draw(leaves)
            break
    return body


def encoded(body: Any) -> bytes:
    return dumps(body, default=str).encode("utf-8", "replace")


bodies = json | st.binary(max_size=20) | st.text(max_size=20) | almost() | almost().map(encoded)
nows = st.datetimes(datetime(1900, 1, 1), datetime(9000, 1, 1), timezones=st.timezones())  # noqa: DTZ001


def hold(name: str, window: LimitWindow, warnings: tuple[str, ...]) -> None:
    kind = Decimal if name.startswith("credits_") else int
    for number in (window.limit, window.remaining, window.used):
        assert number is None or (type(number) is kind and 0 <= number < 10**18)
    assert window.reset_in_ms is None or window.reset_in_ms >= 0
    if window.limit is not None and window.remaining is not None and window.remaining > window.limit:
        assert any(f"{window.remaining} of a limit of {window.limit}" in warning for warning in warnings)
        assert window.used is None
    assert window.percent_used is None or 0 <= window.percent_used <= 10**6
    assert (window.reset_at is None) == (window.reset_in_ms is None)
    assert window.reset_at is None or window.reset_at.tzinfo is UTC
    assert window.reset_in_ms is None or window.reset_in_ms <= timedelta(days=3_661) / timedelta(milliseconds=1)
    read = Reading.of(datetime(9000, 1, 1, tzinfo=UTC), window)
    assert (read.reset_at is None) == (window.reset_in_ms is None)
    for number, kept in ((window.limit, read.limit), (window.remaining, read.remaining)):
        assert kept == number
        assert kept is None or (kept < 10**26 and int(kept.as_tuple().exponent) >= -12)
    assert (read.percent_used is None) == (window.percent_used is None)


def hold_all(limits: Limits) -> None:
    assert limits.at.tzinfo is UTC
    for name, window in limits.windows.items():
        assert name.isprintable()
        hold(name, window, limits.warnings)
    assert limits.retry_after_s is None or limits.retry_after_s >= 0
    assert all(text.isprintable() and len(text) < 300 for text in limits.warnings)
    assert all(name.isascii() and name.isprintable() and value.isprintable() for name, value in limits.raw.items())


@settings(max_examples=400)
@given(st.sampled_from(list(LIMIT_RULES)), maps, nows, st.integers(100, 599), bodies)
def test_nothing_in_an_answer_raises(provider: str, headers: Any, now: datetime, status: int, body: object) -> None:
    limits = parse_limits(provider, headers, now=now, status=status, body=body)
    hold_all(limits)
    assert limits.rate_limited or status != 429


@settings(max_examples=400)
@given(st.sampled_from(list(LIMIT_RULES)), nows, almost())
def test_what_looks_like_a_body_is_read_or_named(provider: str, now: datetime, body: Any) -> None:
    for each in (body, encoded(body)):
        hold_all(parse_limits(provider, {}, now=now, status=429, body=each))


@settings(max_examples=200)
@given(st.sampled_from(list(LIMIT_RULES)), st.dictionaries(st.sampled_from(NAMES), values, min_size=4), nows)
def test_what_looks_like_a_header_is_read_or_named(provider: str, headers: Any, now: datetime) -> None:
    hold_all(parse_limits(provider, headers, now=now))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(list(LIMIT_RULES)), maps, nows, bodies), min_size=1, max_size=8))
@example([("openrouter", {}, datetime(2026, 3, 12, tzinfo=UTC), {"data": {"limit": 1e-30, "usage": 999999999999999}})])
@example([("openrouter", {}, datetime(2026, 3, 12, tzinfo=UTC), {"data": {"limit": 1e-12, "usage": 999999999999999}})])
@example([("anthropic", LONG_AGO, datetime(2026, 3, 12, tzinfo=UTC), None)])
def test_whatever_is_said_can_be_kept(ledger_url: str, said: list[tuple[str, Any, datetime, Any]]) -> None:
    found = [
        ProviderStatus(
            provider=provider,
            account_key=f"c{number}",
            checked_at=now.astimezone(UTC),
            windows=parse_limits(provider, headers, now=now, body=body).windows,
        )
        for number, (provider, headers, now, body) in enumerate(said)
    ]
    ledger = Ledger(ledger_url)
    try:
        with ledger.write() as connection:
            assert record_statuses(connection, found).refused == 0
            kept = readings_since(connection, datetime(1, 1, 1, tzinfo=UTC))
            connection.exec_driver_sql("DELETE FROM provider_windows")
            connection.exec_driver_sql("DELETE FROM provider_probes")
    finally:
        ledger.close()
    assert kept == {
        (each.account_key, each.provider, name): [Reading.of(each.checked_at, window)]
        for each in found
        for name, window in each.windows.items()
    }


@given(st.text(), st.none() | st.integers() | maps)
def test_observing_whatever_never_raises(provider: str, response: Any) -> None:
    assert observe(provider, response).warnings


@pytest.mark.parametrize("provider", list(LIMIT_RULES))
def test_an_apps_decimal_context_is_of_no_account(provider: str) -> None:
    with decimal.localcontext(decimal.Context(prec=1, traps=[decimal.Inexact, decimal.Rounded])):
        for headers in REAL:
            hold_all(parse_limits(provider, headers, now=datetime(2026, 3, 12, tzinfo=UTC)))
        for body in BODIES:
            hold_all(parse_limits(provider, {}, now=datetime(2026, 3, 12, tzinfo=UTC), body=body))
