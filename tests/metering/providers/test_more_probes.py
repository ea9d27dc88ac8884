"""Each of the other providers asked over HTTP, on the loopback: what is asked, with which header, what is found."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from metering.errors import AddressRefused, KeyRefused, NoProviderKey, UnexpectedAnswer
from metering.providers.registry import LIMIT_RULES, PROBE_RULES
from tests.metering.providers import answers, limit_answers
from tests.metering.providers.probe_server import COMPLETION, KEY, ProbeServer, reply

if TYPE_CHECKING:
    from collections.abc import Callable

    from metering.providers.probing import ProviderStatus

OPENAI_LIKE = {"object": "list", "data": [{"id": "small"}, {"id": "large"}]}
NAMED = {"models": [{"name": "small"}, {"name": "large"}]}
LISTED = [{"id": "small"}, {"id": "large"}]
BEARER = ("authorization", f"Bearer {KEY}")


class Case(NamedTuple):
    path: str
    windows: set[str]
    body: Any = OPENAI_LIKE
    headers: dict[str, str] = answers.OLLAMA
    login: tuple[str, str] = BEARER


CASES = {
    "azure": Case("/openai/v1/models", {"requests", "tokens"}, headers=answers.AZURE, login=("api-key", KEY)),
    "cerebras": Case("/v1/models", {"requests_day", "tokens_minute"}, headers=answers.CEREBRAS),
    "cohere": Case(
        "/v1/models?page_size=1000", {"requests_month", "trial_requests"}, body=NAMED, headers=answers.COHERE
    ),
    "deepseek": Case("/models", {"credits_cny", "credits_usd"}),
    "fireworks": Case(
        "/inference/v1/models",
        {"input_tokens", "uncached_input_tokens", "output_tokens"},
        headers=answers.FIREWORKS,
    ),
    "google": Case("/v1beta/models?pageSize=1000", set(), body=NAMED, login=("x-goog-api-key", KEY)),
    "groq": Case("/openai/v1/models", {"requests", "tokens"}, headers=answers.GROQ),
    "huggingface": Case(
        "/api/models?inference_provider=all&limit=100", {"api"}, body=LISTED, headers=answers.HUGGINGFACE
    ),
    "mistral": Case("/v1/models", {"requests_10s", "tokens_minute", "tokens_month"}, headers=answers.MISTRAL),
    "openai-compatible": Case("/v1/models", {"requests", "tokens"}, headers=answers.OPENAI),
    "openrouter": Case("/api/v1/key", {"credits_usd"}, body=limit_answers.OPENROUTER_KEY),
    "replicate": Case("/v1/account", {"requests"}, body={"username": "acme"}, headers=answers.REPLICATE),
    "together": Case("/v1/models", {"requests", "tokens"}, body=LISTED, headers=answers.TOGETHER),
    "x-ai": Case("/v1/models", set()),
}
FURTHER = {"deepseek": ("/user/balance", limit_answers.DEEPSEEK_BALANCE)}


@pytest.fixture
def provide(server: ProbeServer) -> Callable[[str], Case]:
    """Makes the server answer as a provider does."""

    def provider(name: str) -> Case:
        case = CASES[name]
        server.replies[f"GET {case.path}"] = reply(case.body, case.headers)
        if name in FURTHER:
            path, body = FURTHER[name]
            server.replies[f"GET {path}"] = reply(body, answers.OLLAMA)
        return case

    return provider


def test_each_provider_is_among_them() -> None:
    assert set(CASES) | {"anthropic", "openai", "ollama"} == set(PROBE_RULES) == set(LIMIT_RULES)


@pytest.mark.parametrize("provider", CASES)
def test_a_probe_tells_windows_and_models(
    ask: Callable[..., ProviderStatus], server: ProbeServer, provide: Callable[[str], Case], provider: str
) -> None:
    case = provide(provider)
    status = ask(provider, paid_probes_per_day=1)
    assert (status.provider, status.error, status.reachable, status.warnings) == (provider, None, True, ())
    assert set(status.windows) == case.windows
    assert status.models == (() if PROBE_RULES[provider].models_in is None else ("small", "large"))
    further = [f"GET {FURTHER[provider][0]}"] if provider in FURTHER else []
    assert server.asked == [f"GET {case.path}", *further]
    name, value = case.login
    assert [sent[name] for sent in server.headers] == [value] * len(server.asked)
    assert server.bodies == []
    json.dumps(status.to_dict())


@pytest.mark.parametrize("provider", CASES)
@pytest.mark.parametrize("body", [b"", b"\xff" * 1_000, b'{"data": ['])
def test_what_is_no_json_is_an_error(
    ask: Callable[..., ProviderStatus], server: ProbeServer, provider: str, body: bytes
) -> None:
    server.replies[f"GET {CASES[provider].path}"] = reply(body)
    assert isinstance(ask(provider).error, UnexpectedAnswer)


@pytest.mark.parametrize("provider", CASES)
def test_a_key_that_is_refused(ask: Callable[..., ProviderStatus], server: ProbeServer, provider: str) -> None:
    server.replies[f"GET {CASES[provider].path}"] = reply({"error": f"no such key: {KEY}"}, status=401)
    assert isinstance(ask(provider).error, KeyRefused)


@pytest.mark.parametrize("provider", CASES)
def test_who_wants_a_key_and_an_address(ask: Callable[..., ProviderStatus], server: ProbeServer, provider: str) -> None:
    rule = PROBE_RULES[provider]
    if rule.needs_key:
        assert isinstance(ask(provider, key=None).error, NoProviderKey)
        assert rule.key_variable is not None
    assert rule.url == "" or rule.url.startswith("https://")
    if rule.url == "":
        status = ask(provider, base_url=None)
        assert isinstance(status.error, AddressRefused)
        assert "no base URL is configured" in str(status.error)
    assert server.asked == []


def test_a_server_of_ones_own_wants_no_key(
    ask: Callable[..., ProviderStatus], server: ProbeServer, provide: Callable[[str], Case]
) -> None:
    provide("openai-compatible")
    assert ask("vllm", key=None).models == ("small", "large")
    assert "authorization" not in server.headers[0]


PAID = {
    "groq": ("llama-3.1-8b-instant", "POST /openai/v1/chat/completions", answers.GROQ),
    "mistral": ("ministral-3b-latest", "POST /v1/chat/completions", answers.MISTRAL),
    "cerebras": ("gpt-oss-120b", "POST /v1/chat/completions", answers.CEREBRAS),
}


@pytest.mark.parametrize("provider", PAID)
def test_a_call_that_costs_is_made_where_it_is_allowed_and_needed(
    ask: Callable[..., ProviderStatus], server: ProbeServer, provider: str
) -> None:
    model, path, headers = PAID[provider]
    server.replies[f"GET {CASES[provider].path}"] = reply({"data": [{"id": "large"}, {"id": model}]})
    server.replies[path] = reply(COMPLETION, headers)
    assert (ask(provider).windows, server.bodies) == ({}, [])
    status = ask(provider, paid_probes_per_day=1, force_refresh=True)
    assert set(status.windows) == CASES[provider].windows
    assert (status.sample_model, status.sample_input_tokens, status.sample_output_tokens) == (model, 9, 1)
    assert server.bodies == [{"model": model, "max_tokens": 1, "messages": [{"role": "user", "content": "hi"}]}]


def test_amounts_of_money_are_shown_as_texts(
    ask: Callable[..., ProviderStatus], provide: Callable[[str], Case]
) -> None:
    provide("openrouter")
    shown = json.loads(json.dumps(ask("openrouter").to_dict()))["windows"]["credits_usd"]
    assert shown == {
        "limit": "100",
        "remaining": "74.5",
        "used": "25.5",
        "percent_used": 25.5,
        "reset_at": "2026-04-01T00:00:00+00:00",
        "reset_in_ms": 19 * 86_400_000 + 43_200_000,
    }


def test_a_balance_that_is_not_told_is_a_warning(
    ask: Callable[..., ProviderStatus], server: ProbeServer, provide: Callable[[str], Case]
) -> None:
    provide("deepseek")
    server.replies["GET /user/balance"] = reply(b"", status=404)
    status = ask("deepseek")
    assert (status.error, status.models, status.windows) == (None, ("small", "large"), {})
    assert status.warnings == ("/user/balance: answered 404",)
