"""What the other providers' answers say of limits, in headers and in bodies."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest

from metering.providers import Limits, LimitWindow, parse_limits
from metering.providers.registry import LIMIT_RULES, PROBE_RULES
from tests.metering.providers import answers, limit_answers

NOON = datetime(2026, 3, 12, 12, tzinfo=UTC)


def read(provider: str, headers: Any = (), *, status: int = 200, body: object = None) -> Limits:
    return parse_limits(provider, headers, now=NOON, status=status, body=body)


def window(
    limit: int | None = None,
    remaining: int | None = None,
    *,
    percent: float | None = None,
    reset_in_ms: int | None = None,
) -> LimitWindow:
    return LimitWindow(
        limit=limit,
        remaining=remaining,
        used=None if limit is None or remaining is None else limit - remaining,
        percent_used=percent,
        reset_at=None if reset_in_ms is None else NOON + timedelta(milliseconds=reset_in_ms),
        reset_in_ms=reset_in_ms,
    )


WINDOWS: dict[str, tuple[str, dict[str, str], dict[str, LimitWindow]]] = {
    "azure": (
        "azure-openai",
        answers.AZURE,
        {
            "requests": window(20_000, 19_999, percent=0.005, reset_in_ms=3),
            "tokens": window(1_000, 500, percent=50.0, reset_in_ms=30_000),
        },
    ),
    "azure, not known": ("azure", answers.AZURE_UNKNOWN, {"tokens": LimitWindow()}),
    "groq": (
        "groq",
        answers.GROQ,
        {
            "requests": window(14_400, 14_370, percent=100 * 30 / 14_400, reset_in_ms=179_560),
            "tokens": window(18_000, 17_997, percent=100 * 3 / 18_000, reset_in_ms=7_660),
        },
    ),
    "mistral": (
        "mistral",
        answers.MISTRAL,
        {
            "requests_10s": window(20, 19, percent=5.0),
            "tokens_minute": window(500_000, 499_948, percent=0.0104),
            "tokens_month": window(10**12, 999_998_798_434, percent=100 * 1_201_566 / 10**12),
        },
    ),
    "cohere": (
        "cohere",
        answers.COHERE,
        {"requests_month": window(1_000), "trial_requests": window(20, 19, percent=5.0)},
    ),
    "together": (
        "together",
        answers.TOGETHER,
        {
            "requests": window(10, 0, percent=100.0, reset_in_ms=1_000),
            "tokens": window(3_000, 2_750, percent=100 * 250 / 3_000),
        },
    ),
    "fireworks": (
        "fireworks",
        answers.FIREWORKS,
        {
            "input_tokens": window(60_000, 59_400, percent=1.0),
            "uncached_input_tokens": window(15_000),
            "output_tokens": window(1_200, 1_100, percent=100 * 100 / 1_200),
        },
    ),
    "cerebras": (
        "cerebras",
        answers.CEREBRAS,
        {
            "requests_day": LimitWindow(
                limit=14_400,
                remaining=14_399,
                used=1,
                percent_used=100 / 14_400,
                reset_at=NOON + timedelta(seconds=33_011, microseconds=382_867),
                reset_in_ms=33_011_383,
            ),
            "tokens_minute": window(60_000, 59_000, percent=100 * 1_000 / 60_000, reset_in_ms=11_500),
        },
    ),
    "hugging face": ("hf", answers.HUGGINGFACE, {"api": window(1_000, 999, percent=0.1, reset_in_ms=295_000)}),
    "replicate": ("replicate", answers.REPLICATE, {"requests": window(None, 599, reset_in_ms=1_000)}),
    "openrouter": ("openrouter", answers.OPENROUTER, {"requests": window(20, 0, percent=100.0, reset_in_ms=30_500)}),
    "xai": ("xai", answers.OPENAI, dict(read("openai", answers.OPENAI).windows)),
    "a gateway": ("vllm", answers.OPENAI, dict(read("openai", answers.OPENAI).windows)),
    "deepseek": ("deepseek", answers.OLLAMA, {}),
    "gemini": ("gemini", answers.OLLAMA, {}),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_the_windows_of_real_answers(name: str) -> None:
    provider, headers, windows = WINDOWS[name]
    limits = read(provider, headers)
    assert limits.windows == windows
    assert (limits.at, limits.warnings, limits.rate_limited) == (NOON, (), False)
    assert read(provider, headers, status=429).windows == windows
    assert set(limits.raw) <= set(headers) - {"date"}


def test_each_provider_is_among_them() -> None:
    assert {read(provider).provider for provider, *_ in WINDOWS.values()} | {"anthropic", "openai", "ollama"} == set(
        LIMIT_RULES
    )
    assert set(LIMIT_RULES) == set(PROBE_RULES)
    names = [name for rule in LIMIT_RULES.values() for name in (rule.provider, *rule.aliases)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("limit", "remaining", "period", "reset", "milliseconds"),
    [
        ("1000", "500", "60", "30", 30_000),
        ("1000", "500", "60", "30000", 30_000),
        ("1000", "500", "60", "29500", 29_500),
        ("1000", "0", "60", "58", 58_000),
        ("1000", "1000", "60", "0", 0),
        ("1000", "999", None, "0", 0),
        ("1000", "500", "60", "7", None),
        ("2000000", "1999962", "60", "1", None),
        ("1000", "500", None, "30", None),
        ("-1", "-1", "60", "30", None),
        ("0", "0", "60", "30", None),
        ("1000", "500", "soon", "30", None),
        ("1000", "500", "60", "1s", None),
    ],
)
def test_a_reset_of_azure_has_the_unit_that_fits(
    limit: str, remaining: str, period: str | None, reset: str, milliseconds: int | None
) -> None:
    said = {"limit": limit, "remaining": remaining, "renewalperiod": period, "reset": reset}
    limits = read("azure", {f"x-ratelimit-{part}-tokens": text for part, text in said.items() if text is not None})
    assert limits.windows["tokens"].reset_in_ms == milliseconds
    assert [warning.partition(":")[0] for warning in limits.warnings] == (
        ["x-ratelimit-reset-tokens"] if milliseconds is None else []
    )


def test_the_misspelt_header_of_azure_is_named() -> None:
    limits = read("azure", answers.AZURE_MISSPELT, status=429)
    assert limits.windows == {"tokens": LimitWindow(remaining=0)}
    assert (limits.retry_after_s, limits.rate_limited) == (55.0, True)
    [warning] = limits.warnings
    assert warning.startswith("x-rate-limit-reset-tokens: got '55'")


@pytest.mark.parametrize(
    ("ratelimit", "policy", "windows"),
    [
        ('"api";r=0;t=55', None, {"api": window(None, 0, reset_in_ms=55_000)}),
        (None, '"pages";q=100;w=300', {"pages": window(100)}),
        (
            '"api"; r=1; t=2, "token-bucket";r=3',
            '"fixed window";"api";q=4',
            {"api": window(4, 1, percent=75.0, reset_in_ms=2_000), "token_bucket": window(None, 3)},
        ),
    ],
)
def test_structured_fields(ratelimit: str | None, policy: str | None, windows: dict[str, LimitWindow]) -> None:
    headers = {name: text for name, text in (("RateLimit", ratelimit), ("RateLimit-Policy", policy)) if text}
    limits = read("huggingface", headers)
    assert (limits.windows, limits.warnings) == (windows, ())


@pytest.mark.parametrize(
    "said", ["10", "api;r=1", '"api";r=-1', '"api";r=1;', '"a\\"b";r=1', '"api";r="1"', "r=1", '"api", ']
)
def test_structured_fields_that_are_none(said: str) -> None:
    limits = read("huggingface", {"ratelimit": said})
    assert limits.windows == {}
    [warning] = limits.warnings
    assert warning.startswith("ratelimit: got")


GARBAGE = [
    ("groq", "x-ratelimit-reset-tokens", "60"),
    ("mistral", "x-ratelimit-limit-req-10-second", "-1"),
    ("cohere", "x-endpoint-monthly-call-limit", "1k"),
    ("together", "x-ratelimit-reset", "1s"),
    ("replicate", "ratelimit-reset", "1773316830"),
    ("cerebras", "x-ratelimit-reset-tokens-minute", "-0.5"),
    ("fireworks", "x-ratelimit-remaining-tokens-prompt", "many"),
    ("openrouter", "x-ratelimit-reset", "1773316830"),
    ("openrouter", "x-ratelimit-reset", "yearly"),
    ("xai", "x-ratelimit-limit-requests", "none"),
    ("openai-compatible", "x-ratelimit-reset-requests", "12"),
]


@pytest.mark.parametrize(("provider", "name", "said"), GARBAGE)
def test_garbage_is_none_and_a_warning_that_names_the_header(provider: str, name: str, said: str) -> None:
    limits = read(provider, {name: said})
    assert list(limits.windows.values()) == [LimitWindow()]
    [warning] = limits.warnings
    assert warning.startswith(f"{name}: got {said!r}, expected ")


def both(provider: str, body: object, status: int) -> Limits:
    """The same of a body as bytes and as it is decoded."""
    limits = read(provider, body=json.dumps(body).encode(), status=status)
    assert limits == read(provider, body=body, status=status)
    return limits


def test_what_a_key_of_openrouter_may_still_spend() -> None:
    limits = both("openrouter", limit_answers.OPENROUTER_KEY, 200)
    assert limits.windows == {
        "credits_usd": LimitWindow(
            limit=Decimal(100),
            remaining=Decimal("74.5"),
            used=Decimal("25.5"),
            percent_used=25.5,
            reset_at=datetime(2026, 4, 1, tzinfo=UTC),
            reset_in_ms=19 * 86_400_000 + 43_200_000,
        )
    }
    assert all(
        type(each) is Decimal for each in (limits.windows["credits_usd"].limit, limits.windows["credits_usd"].used)
    )
    assert (limits.warnings, limits.rate_limited) == ((), False)


def key(**more: Any) -> dict[str, Any]:
    return {"data": {**limit_answers.OPENROUTER_KEY["data"], **more}}


@pytest.mark.parametrize(
    ("reset", "at"),
    [
        ("daily", datetime(2026, 3, 13, tzinfo=UTC)),
        ("weekly", datetime(2026, 3, 16, tzinfo=UTC)),
        ("monthly", datetime(2026, 4, 1, tzinfo=UTC)),
        (None, None),
    ],
)
def test_when_a_key_of_openrouter_is_whole_again(reset: str | None, at: datetime | None) -> None:
    assert both("openrouter", key(limit_reset=reset), 200).windows["credits_usd"].reset_at == at


def test_a_key_of_openrouter_without_a_limit() -> None:
    limits = both("openrouter", key(limit=None, limit_remaining=None, limit_reset=None, usage=1e-7), 200)
    assert limits.windows == {"credits_usd": LimitWindow(used=Decimal("1e-7"))}


@pytest.mark.parametrize(
    ("said", "read"),
    [
        (0.30000000000000004, "0.3"),
        ("1.0000000000005", "1"),
        ("0.0000000000015001", "2e-12"),
        (1e-12, "1e-12"),
        ("0.00000000000000", "0"),
        ("999999999999999.99", "999999999999999.99"),
    ],
)
def test_amounts_are_read_to_twelve_places(said: Any, read: str) -> None:
    limits = both("openrouter", key(limit=None, limit_remaining=None, limit_reset=None, usage=said), 200)
    assert limits.windows == {"credits_usd": LimitWindow(used=Decimal(read))}
    assert limits.warnings == ()


def test_a_use_that_is_none_of_its_limit_has_no_percentage() -> None:
    limits = both("openrouter", key(limit=1e-9, limit_remaining=None, limit_reset=None, usage=1_000), 200)
    assert limits.windows == {"credits_usd": LimitWindow(limit=Decimal("1e-9"), used=Decimal(1_000))}
    assert limits.warnings == ("data.usage: 1000 of a limit of 1E-9",)


@pytest.mark.parametrize("value", [-0.5, "-1", "1,5", True, [], {}, 10**40, "1e999", "1e-31", "1e-13", "NaN"])
@pytest.mark.parametrize("name", ["limit", "limit_remaining"])
def test_amounts_that_are_none_are_named_and_not_shown_where_they_are_texts(name: str, value: Any) -> None:
    limits = both("openrouter", key(**{name: value}), 200)
    money = limits.windows["credits_usd"]
    assert getattr(money, name.removeprefix("limit_")) is None
    assert money.used == Decimal("25.5")
    [warning] = limits.warnings
    assert warning.startswith(f"data.{name}: got ")
    assert not isinstance(value, str) or "a text" in warning


def test_more_left_than_the_limit_is_said() -> None:
    limits = both("openrouter", key(limit_remaining=100.25), 200)
    assert limits.windows["credits_usd"].used is None
    assert limits.warnings == ("data.limit_remaining: 100.25 of a limit of 100",)


def test_a_refusal_of_openrouter_says_the_limit_of_a_free_model() -> None:
    limits = both("openrouter", limit_answers.OPENROUTER_REFUSED, 429)
    assert limits.windows == {"requests": window(50, 0, percent=100.0, reset_in_ms=43_200_000)}
    assert (limits.rate_limited, limits.warnings) == (True, ())
    headers = {**answers.OPENROUTER, "x-ratelimit-limit": "40"}
    limits = read("openrouter", headers, status=429, body=limit_answers.OPENROUTER_REFUSED)
    assert limits.windows["requests"].limit == 40


def test_the_balance_of_deepseek_is_what_remains_of_no_limit() -> None:
    limits = both("deepseek", limit_answers.DEEPSEEK_BALANCE, 200)
    assert limits.windows == {
        "credits_cny": LimitWindow(remaining=Decimal("110.00")),
        "credits_usd": LimitWindow(remaining=Decimal("0.07")),
    }


@pytest.mark.parametrize("provider", ["deepseek", "openrouter"])
def test_a_402_is_no_rate_limit_and_no_waiting_helps(provider: str) -> None:
    limits = both(provider, {"error": {"message": "Insufficient Balance", "code": "invalid_request_error"}}, 402)
    assert (limits.rate_limited, limits.waiting_helps) == (False, False)


def test_a_refusal_of_gemini_says_which_quotas() -> None:
    limits = both("gemini", limit_answers.GEMINI_REFUSED, 429)
    assert limits.windows == {
        "requests_day/gemini-2.5-flash": window(20),
        "input_tokens_minute/gemini-2.5-flash": window(250_000),
        "SomethingNew": window(),
    }
    assert (limits.rate_limited, limits.waiting_helps, limits.retry_after_s) == (True, True, 14.5)
    assert (limits.provider, limits.warnings) == ("google", ())
    assert read("gemini", body=[limit_answers.GEMINI_REFUSED], status=429) == limits
    assert read("gemini", {"retry-after": "3"}, body=limit_answers.GEMINI_REFUSED, status=429).retry_after_s == 3.0


def test_a_delay_of_gemini_that_is_none() -> None:
    body = {"error": {"details": [{"@type": "a/google.rpc.RetryInfo", "retryDelay": "soon"}]}}
    limits = both("gemini", body, 429)
    assert limits.retry_after_s is None
    assert limits.warnings == ("error.details[0].retryDelay: got a text, expected a duration such as 6m0s",)


def test_the_limits_of_a_project_of_openai_are_of_its_models() -> None:
    limits = both("openai", limit_answers.OPENAI_PROJECT, 200)
    assert limits.windows == {
        "requests_minute/gpt-4o": window(500),
        "requests_day/gpt-4o": window(10_000),
        "tokens_minute/gpt-4o": window(30_000),
        "requests_minute/ada": window(600),
        "tokens_minute/ada": window(150_000),
    }
    assert limits.warnings == ()
    assert both("openai", {"data": [{**project_limit("gpt-4o"), "object": "model"}]}, 200).windows == {}


def test_the_limits_of_an_organization_of_anthropic_are_of_groups() -> None:
    limits = both("anthropic", limit_answers.ANTHROPIC_ORGANIZATION, 200)
    assert limits.windows == {
        "requests_minute/claude-opus-4-5": window(4_000),
        "input_tokens_minute/claude-opus-4-5": window(10_000_000),
        "output_tokens_minute/claude-opus-4-5": window(800_000),
        "enqueued_batch_requests/batch": window(500_000),
    }
    assert limits.warnings == ()


def project_limit(model: str) -> dict[str, Any]:
    return {"object": "project.rate_limit", "model": model, "max_requests_per_1_minute": 1}


def test_there_is_an_end_to_windows_and_to_their_names() -> None:
    body = {"data": [project_limit(f"m{number}") for number in range(300)]}
    limits = read("openai", body=body)
    assert (len(limits.windows), limits.warnings) == (256, ("body: no window after the first 256 is read",))
    limits = read("openai", body={"data": [project_limit("x" * 1_000), project_limit("a\nb"), project_limit("a")]})
    assert list(limits.windows) == ["requests_minute/a"]
    assert [warning.endswith("is not the name of a window") and len(warning) < 120 for warning in limits.warnings] == [
        True,
        True,
    ]
