"""What answers say of limits: each header of each provider, and what no provider says."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone
from email.message import Message
from http import HTTPStatus
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from metering.errors import InvalidSetting, NotFound, UnknownProvider
from metering.providers import Limits, LimitWindow, observe, parse_limits
from metering.providers.registry import LIMIT_RULES
from tests.metering.providers import answers
from tests.metering.providers.answers import refused

if TYPE_CHECKING:
    from collections.abc import Callable

NOON = datetime(2026, 3, 12, 12, tzinfo=UTC)
FAR = datetime(2031, 1, 1, tzinfo=UTC)
"""Our clock: what has a `Date` does not look at it."""


def read(provider: str, headers: Any, *, now: datetime = FAR, status: int = 200, body: object = None) -> Limits:
    return parse_limits(provider, headers, now=now, status=status, body=body)


def window(limit: int, remaining: int, percent: float, reset_in_ms: int, **ago: float) -> LimitWindow:
    return LimitWindow(
        limit=limit,
        remaining=remaining,
        used=limit - remaining,
        percent_used=percent,
        reset_at=NOON - timedelta(**ago) if ago else NOON + timedelta(milliseconds=reset_in_ms),
        reset_in_ms=reset_in_ms,
    )


WINDOWS = {
    "anthropic": (
        "anthropic",
        answers.ANTHROPIC,
        {
            "requests": window(4000, 3999, 0.025, 1_000),
            "tokens": window(480_000, 479_000, 100 / 480, 0),
            "input_tokens": window(400_000, 399_000, 0.25, 0),
            "output_tokens": window(80_000, 80_000, 0.0, 0, seconds=1),
        },
    ),
    "anthropic, priority": (
        "claude",
        answers.ANTHROPIC_PRIORITY,
        {
            "priority_input_tokens": window(10_000, 9_618, 3.82, 60_000),
            "priority_output_tokens": window(10_000, 6_000, 40.0, 30_000),
        },
    ),
    "anthropic, a subscription": (
        "Anthropic",
        answers.ANTHROPIC_UNIFIED,
        {
            "unified": LimitWindow(reset_at=NOON + timedelta(hours=1), reset_in_ms=3_600_000),
            "unified_5h": LimitWindow(percent_used=7.0, reset_at=NOON + timedelta(hours=1), reset_in_ms=3_600_000),
            "unified_7d": LimitWindow(
                percent_used=102.0,
                reset_at=datetime(2026, 3, 18, tzinfo=UTC),
                reset_in_ms=5 * 86_400_000 + 12 * 3_600_000,
            ),
        },
    ),
    "openai": (
        "openai",
        answers.OPENAI,
        {
            "requests": window(10_000, 9_999, 0.01, 8_640),
            "tokens": window(200_000, 199_963, 0.0185, 12),
        },
    ),
    "openai, images and a project": (
        "codex",
        answers.OPENAI_IMAGES,
        {
            "input_images": window(250, 249, 0.4, 240),
            "project_tokens": window(1_000_000, 999_500, 0.05, 0),
        },
    ),
    "ollama": ("ollama", answers.OLLAMA, {}),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_the_windows_of_real_answers(name: str) -> None:
    provider, headers, windows = WINDOWS[name]
    limits = read(provider, headers)
    assert limits.windows == windows
    assert (limits.at, limits.warnings, limits.rate_limited) == (NOON, (), False)
    assert all(moment.tzinfo is UTC for moment in resets(limits))


def resets(limits: Limits) -> list[datetime]:
    return [each.reset_at for each in limits.windows.values() if each.reset_at is not None]


@pytest.mark.parametrize(
    ("said", "milliseconds"),
    [
        ("0s", 0),
        ("0", 0),
        ("120ms", 120),
        ("12ms", 12),
        ("1s", 1_000),
        ("8.64s", 8_640),
        ("17.333s", 17_333),
        ("6m0s", 360_000),
        ("1m53.425s", 113_425),
        ("20m52.666s", 1_252_666),
        ("1h2m3.5s", 3_723_500),
        ("1d2h", 93_600_000),
        ("24h0m0s", 86_400_000),
        ("1.5h", 5_400_000),
        ("250us", 1),
        ("250µs", 1),
        ("999999ns", 1),
        ("2026-03-12T12:00:02.5Z", 2_500),
        ("2026-03-12t12:00:02.5z", 2_500),
        ("2026-03-12T14:00:02+02:00", 2_000),
    ],
)
def test_resets_of_openai_are_durations_or_times(said: str, milliseconds: int) -> None:
    limits = read("openai", {**answers.OPENAI, "x-ratelimit-reset-tokens": said})
    assert (limits.windows["tokens"].reset_in_ms, limits.warnings) == (milliseconds, ())


GARBAGE = {
    "x-ratelimit-limit-tokens": ["", "-1", "many", "1e5", "0x10", "1,00", "1.000,5", "٣", "1 000", "9" * 17,
                                 "9" * 300, "nan"],
    "x-ratelimit-remaining-tokens": ["-1", "∞", "null", "12 tokens"],
    "x-ratelimit-reset-tokens": ["60", "soon", "-5s", "1m 5s", "s", "2026-03-12T12:00:02", "99999d", "1s\x00",
                                 "1x", "9" * 300],
}  # fmt: skip


@pytest.mark.parametrize(("name", "said"), [(name, said) for name, listed in GARBAGE.items() for said in listed])
def test_garbage_is_none_and_a_warning_that_names_the_header(name: str, said: str) -> None:
    limits = read("openai", {**answers.OPENAI, name: said})
    tokens = limits.windows["tokens"]
    part = name.split("-")[2]
    assert getattr(tokens, {"reset": "reset_at"}.get(part, part)) is None
    assert (tokens.used is None) == (part != "reset")
    assert [name in warning and len(warning) < 250 for warning in limits.warnings] == [True][: len(said)]
    assert limits.windows["requests"].limit == 10_000


@pytest.mark.parametrize("said", ["soon", "60", "2026-03-12T12:00:00", "99999999999999999", "2026-13-12T12:00:00Z"])
def test_resets_of_anthropic_that_are_no_times(said: str) -> None:
    name = "anthropic-ratelimit-requests-reset"
    limits = read("anthropic", {**answers.ANTHROPIC, name: said})
    assert limits.windows["requests"] == LimitWindow(limit=4000, remaining=3999, used=1, percent_used=0.025)
    [warning] = limits.warnings
    assert warning.startswith(name)


@pytest.mark.parametrize("said", ["-0.1", "1.2.3", "half", "1000"])
def test_a_utilization_that_is_no_fraction(said: str) -> None:
    limits = read("anthropic", {"anthropic-ratelimit-unified-5h-utilization": said})
    assert limits.windows == {"unified_5h": LimitWindow()}
    assert "unified-5h-utilization" in limits.warnings[0]


def test_what_is_not_said_is_none_and_a_window_that_is_not_there_is_not() -> None:
    limits = read("anthropic", {"anthropic-ratelimit-requests-limit": "50"}, now=NOON)
    assert limits.windows == {"requests": LimitWindow(limit=50)}
    assert (limits.retry_after_s, limits.waiting_helps, limits.at) == (None, None, NOON)
    assert read("anthropic", {}).windows == {}


def test_more_left_than_the_limit_is_said_and_nothing_made_of_it() -> None:
    limits = read("openai", {"x-ratelimit-limit-tokens": "10", "x-ratelimit-remaining-tokens": "11"})
    assert limits.windows["tokens"] == LimitWindow(limit=10, remaining=11)
    assert limits.warnings == ("x-ratelimit-remaining-tokens: 11 of a limit of 10",)


def test_a_limit_of_nothing_has_no_share() -> None:
    limits = read("openai", {"x-ratelimit-limit-tokens": "0", "x-ratelimit-remaining-tokens": "0"})
    assert limits.windows["tokens"] == LimitWindow(limit=0, remaining=0, used=0)


@pytest.mark.parametrize("skew", [timedelta(days=-400), timedelta(hours=-1), timedelta(), timedelta(days=400)])
def test_the_servers_date_is_the_clock(skew: timedelta) -> None:
    for provider, headers, window in (
        ("anthropic", answers.ANTHROPIC, "requests"),
        ("openai", answers.OPENAI, "requests"),
    ):
        assert read(provider, headers, now=NOON + skew) == read(provider, headers, now=NOON)
        assert read(provider, headers, now=NOON + skew).windows[window].reset_in_ms is not None


@pytest.mark.parametrize("date", ["yesterday", "", "Thu, 99 Mar 2026 12:00:00 GMT", "Thu, 12 Mar 9999 23:59:59 -1200"])
def test_without_a_date_our_clock_serves(date: str) -> None:
    now = NOON.astimezone(timezone(timedelta(hours=13)))
    limits = read("openai", {**answers.OPENAI, "date": date}, now=now)
    assert (limits.at, limits.at.tzinfo) == (NOON, UTC)
    assert limits.windows["requests"].reset_at == NOON + timedelta(seconds=8.64)
    assert ["date: " in warning for warning in limits.warnings] == [True] * bool(date)


def test_what_is_ages_away_is_a_mistake() -> None:
    resets = {"anthropic-ratelimit-requests-reset": "9000-01-01T00:00:00Z"}
    for date in ("Mon, 01 Jan 1000 00:00:00 GMT", "Sat, 12 Apr 2036 12:00:00 GMT"):
        limits = read("anthropic", {**answers.ANTHROPIC, **resets, "date": date}, now=NOON)
        assert limits.at == NOON
        assert [warning.partition(":")[0] for warning in limits.warnings] == ["date", *resets]
        assert (limits.windows["requests"].reset_at, limits.windows["requests"].limit) == (None, 4_000)
    decade = read("openai", {**answers.OPENAI, "date": "Sun, 13 Mar 2016 12:00:00 GMT"}, now=NOON)
    assert (decade.at.year, decade.warnings) == (2016, ())


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "43"}, 43.0),
        ({"retry-after": "Wed, 01 Jan 9000 00:00:00 GMT"}, None),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "Thu, 12 Mar 2026 12:01:30 GMT"}, 90.0),
        ({"retry-after": "Thu, 12 Mar 2026 11:00:00 GMT"}, 0.0),
        ({"retry-after": "20", "retry-after-ms": "1500"}, 1.5),
        ({"retry-after": "20", "retry-after-ms": "soon"}, 20.0),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "later"}, None),
        ({}, None),
    ],
)
@pytest.mark.parametrize("provider", ["anthropic", "openai", "ollama"])
def test_retry_after(provider: str, headers: dict[str, str], seconds: float | None) -> None:
    limits = read(provider, {"date": answers.DATE, **headers})
    assert (limits.retry_after_s, limits.rate_limited) == (seconds, False)
    unread = [name for name, value in headers.items() if value in ("-3", "later", "soon") or "9000" in value]
    assert [warning.partition(":")[0] for warning in limits.warnings] == unread
    assert limits.raw == headers


REFUSALS: list[tuple[str, int, object, tuple[bool, bool | None]]] = [
    ("anthropic", 429, refused(type="rate_limit_error"), (True, True)),
    ("anthropic", 200, refused(type="rate_limit_error"), (True, True)),
    ("anthropic", 529, refused(type="overloaded_error"), (False, None)),
    ("anthropic", 400, refused(type="invalid_request_error"), (False, None)),
    ("anthropic", 429, None, (True, None)),
    ("openai", 429, refused(type="tokens", code="rate_limit_exceeded"), (True, True)),
    ("openai", 429, refused(type="insufficient_quota", code="insufficient_quota"), (True, False)),
    ("openai", 429, refused(type="insufficient_quota", code="rate_limit_exceeded"), (True, False)),
    ("openai", 429, {"type": "insufficient_quota", "message": "as the SDK's error holds it"}, (True, False)),
    ("openai", 500, refused(type="server_error"), (False, None)),
    ("openai", 200, {"error": None, "output": []}, (False, None)),
    ("openai", 200, ["insufficient_quota"], (False, None)),
    ("openai", 200, refused(type=["insufficient_quota"], code={}), (False, None)),  # type: ignore[arg-type]
    ("openai", 200, {"error": "insufficient_quota"}, (False, None)),
    ("ollama", 429, {"error": "too many"}, (True, None)),
]


@pytest.mark.parametrize(("provider", "status", "body", "expected"), REFUSALS)
def test_who_is_limited(provider: str, status: int, body: object, expected: tuple[bool, bool | None]) -> None:
    for each in (body, json.dumps(body), json.dumps(body).encode()):
        limits = read(provider, answers.OPENAI_LIMITED, status=status, body=each)
        assert (limits.rate_limited, limits.waiting_helps) == expected
        assert limits.retry_after_s == 113.425


def test_a_429_has_its_windows() -> None:
    limits = read("openai", answers.OPENAI_LIMITED, status=429)
    assert limits.windows["tokens"] == window(200_000, 0, 100.0, 113_425)


@pytest.mark.parametrize(
    "body", [b'{"error": {"type": "rate_lim', b"\xff\xfe", "[" * 100_000, "[" * 60_000, "", "<html>"]
)
def test_a_body_that_is_no_json_tells_nothing(body: bytes | str) -> None:
    limits = read("anthropic", {}, status=429, body=body)
    assert (limits.rate_limited, limits.waiting_helps) == (True, None)
    assert limits.warnings == (() if len(body) > 64 * 1024 else ("body: not JSON",))
    assert read("anthropic", {}, body=body) == read("anthropic", {}, now=FAR)


def as_message(headers: dict[str, str]) -> Message:
    message = Message()
    for name, value in headers.items():
        message[name] = value
    return message


SHAPES: dict[str, Any] = {
    "httpx": httpx.Headers,
    "pairs": lambda headers: list(headers.items()),
    "an iterator": lambda headers: iter(headers.items()),
    "bytes": lambda headers: [(name.encode(), value.encode()) for name, value in headers.items()],
    "asgi": lambda headers: [[name.lower().encode(), value.encode()] for name, value in headers.items()],
    "upper case": lambda headers: {name.upper(): value for name, value in headers.items()},
    "title case": lambda headers: {name.title(): f"  {value} " for name, value in headers.items()},
    "lists": lambda headers: {name: [value] for name, value in headers.items()},
    "twice": lambda headers: [*headers.items(), *headers.items()],
    "httpx, twice": lambda headers: httpx.Headers([*headers.items(), *headers.items()]),
    "joined": lambda headers: {name: ", ".join([value] * (1 + (name != "date"))) for name, value in headers.items()},
    "an email message": as_message,
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("headers", [answers.ANTHROPIC, answers.OPENAI, answers.OPENAI_IMAGES])
def test_headers_of_every_kind(shape: str, headers: dict[str, str]) -> None:
    provider = "anthropic" if headers is answers.ANTHROPIC else "openai"
    assert read(provider, SHAPES[shape](headers)) == read(provider, headers)


def test_a_header_that_says_two_things_says_nothing() -> None:
    twice = [*answers.OPENAI.items(), ("X-RateLimit-Limit-Tokens", "7"), ("Date", "Thu, 12 Mar 2026 12:00:09 GMT")]
    for headers in (twice, httpx.Headers(twice)):
        limits = read("openai", headers, now=NOON)
        assert limits.windows["tokens"].limit is None
        assert limits.windows["tokens"].remaining == 199_963
        assert [warning.partition(":")[0] for warning in limits.warnings] == ["date", "x-ratelimit-limit-tokens"]
    joined = read("openai", {**answers.OPENAI, "x-ratelimit-limit-tokens": "200000, 7"})
    assert (joined.windows["tokens"].limit, len(joined.warnings)) == (None, 1)


def test_only_the_rate_limit_headers_are_kept() -> None:
    kept = read("openai", answers.OPENAI).raw
    assert kept == {name: value for name, value in answers.OPENAI.items() if name.startswith("x-ratelimit-")}
    assert "secret" not in repr(read("anthropic", answers.ANTHROPIC))
    assert set(read("anthropic", answers.ANTHROPIC).raw) == {
        name for name in answers.ANTHROPIC if name.startswith(("anthropic-ratelimit-", "retry-after"))
    }


def test_there_is_an_end_to_headers() -> None:
    limits = read("openai", {f"x-ratelimit-limit-a{number}": "1" for number in range(1_000)})
    assert (len(limits.raw), len(limits.windows), len(limits.warnings)) == (64, 64, 1)


@pytest.mark.parametrize("provider", ["nobody", "", "open ai", None, 7, "x" * 1_000])
def test_a_provider_that_is_not_known(provider: Any) -> None:
    with pytest.raises(UnknownProvider, match="known: anthropic, openai, ollama") as caught:
        read(provider, {})
    assert isinstance(caught.value, NotFound)
    assert caught.value.known == list(LIMIT_RULES)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("now", [datetime(2026, 3, 12), None, "2026-03-12T12:00:00Z"])  # noqa: DTZ001
def test_the_clock_has_a_zone(now: Any) -> None:
    with pytest.raises(InvalidSetting, match="now: got"):
        parse_limits("openai", {}, now=now)


REFUSED = json.dumps(refused(code="insufficient_quota")).encode()


def answered(status: int = 429, headers: Any = answers.OPENAI_LIMITED, **more: Any) -> Any:
    return SimpleNamespace(headers=headers, **{"status_code": status, **more})


class Stream(httpx.SyncByteStream):
    """A body that nobody but the app may read."""

    def __iter__(self) -> Any:
        raise AssertionError("read")


RESPONSES: dict[str, tuple[Any, bool | None]] = {
    "httpx": (httpx.Response(429, headers=answers.OPENAI_LIMITED, content=REFUSED), False),
    "httpx, a stream": (httpx.Response(429, headers=answers.OPENAI_LIMITED, stream=Stream()), None),
    "requests": (answered(content=REFUSED), None),
    "aiohttp": (SimpleNamespace(status=429, headers=answers.OPENAI_LIMITED), None),
    "an SDK's raw response": (
        SimpleNamespace(http_response=httpx.Response(429, headers=answers.OPENAI_LIMITED, content=REFUSED)),
        False,
    ),
    "an SDK's error": (
        SimpleNamespace(
            status_code=429,
            body={"code": "insufficient_quota"},
            response=httpx.Response(429, headers=answers.OPENAI_LIMITED, content=REFUSED),
        ),
        False,
    ),
}


@pytest.mark.parametrize("kind", RESPONSES)
def test_responses_of_an_app_are_observed(kind: str) -> None:
    response, waiting_helps = RESPONSES[kind]
    limits = observe("openai", response, now=FAR)
    assert limits.windows == read("openai", answers.OPENAI_LIMITED).windows
    assert (limits.rate_limited, limits.waiting_helps, limits.warnings) == (True, waiting_helps, ())
    assert observe("openai", response, body=refused(code="rate_limit_exceeded")).waiting_helps is True


class Hostile:
    """An object of the app that is of no use, and has a secret."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("sk-secret")


@pytest.mark.parametrize(
    "made",
    [
        lambda: None,
        lambda: 7,
        Hostile,
        lambda: answered(headers=None),
        lambda: answered(headers=3),
        lambda: answered(headers=Hostile()),
        lambda: answered(None),  # type: ignore[arg-type]
        lambda: answered("429"),  # type: ignore[arg-type]
    ],
)
def test_observing_never_raises(made: Callable[[], Any]) -> None:
    response = made()
    for limits in (observe("openai", response, now=NOON), observe("openai", response)):
        assert (limits.provider, limits.windows, limits.rate_limited) == ("openai", {}, False)
        [warning] = limits.warnings
        assert "cannot be read" in warning
        assert "sk-secret" not in warning


def test_observing_a_provider_that_is_not_known_says_so() -> None:
    limits = observe("nobody", httpx.Response(200, headers=answers.OPENAI), now=NOON)
    assert limits.windows == {}
    assert "'nobody' are not known; known: anthropic" in limits.warnings[0]


def test_without_a_clock_observing_takes_ours() -> None:
    before = datetime.now(UTC)
    limits = observe("openai", httpx.Response(200, headers={"x-ratelimit-reset-tokens": "1s"}))
    assert before <= limits.at <= datetime.now(UTC)
    assert limits.windows["tokens"].reset_in_ms == 1_000


@pytest.mark.parametrize(
    "wrong",
    [*({"status": status} for status in (None, "429", True, 4.29)), *({"headers": headers} for headers in (None, 7))],
)
def test_what_is_no_answer_at_all_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidSetting, match=next(iter(wrong))):
        parse_limits("openai", **{"headers": {}, "now": NOON, **wrong})
    assert parse_limits("openai", {}, now=NOON, status=HTTPStatus.TOO_MANY_REQUESTS).rate_limited


class Refusal:
    """As `requests.Response` is: false where it is an error."""

    def __init__(self, status: int) -> None:
        self.status_code = status
        self.headers = answers.OPENAI_LIMITED

    def __bool__(self) -> bool:
        return self.status_code < 400


@pytest.mark.parametrize("held", ["response", "http_response"])
def test_a_response_that_is_false_is_one(held: str) -> None:
    error = Exception("429 Client Error")
    setattr(error, held, Refusal(429))
    expected = read("openai", answers.OPENAI_LIMITED, status=429)
    assert observe("openai", error, now=FAR) == expected
    assert observe("openai", Refusal(429), now=FAR) == expected
    setattr(error, held, None)
    assert observe("openai", error, now=FAR).warnings == ("response: cannot be read (TypeError)",)
