"""What else is asked where it costs nothing: who is asked with which key, and what goes wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from metering.errors import InvalidSetting, KeyRefused
from metering.providers import LimitWindow
from metering.providers.probes import url_of
from metering.providers.probing import Credential, ProviderStatus
from tests.metering.providers import answers, limit_answers
from tests.metering.providers.probe_server import ADMIN_KEY, KEY, MODELS, OPENAI_MODELS, ProbeServer, reply

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.metering.providers.probe_server import Reply

PROJECT = "/v1/organization/projects/proj_abc/rate_limits?limit=100"
ORGANIZATION = "/v1/organizations/rate_limits"
ADMIN: dict[str, Any] = {"admin_key": ADMIN_KEY, "project": "proj_abc"}


@pytest.mark.parametrize(
    ("provider", "path", "body", "window"),
    [
        ("openai", PROJECT, limit_answers.OPENAI_PROJECT, "tokens_minute/gpt-4o"),
        ("anthropic", ORGANIZATION, limit_answers.ANTHROPIC_ORGANIZATION, "requests_minute/claude-opus-4-5"),
    ],
)
def test_an_admin_key_asks_for_limits_beside_what_the_key_is_told(
    ask: Callable[..., ProviderStatus], server: ProbeServer, provider: str, path: str, body: object, window: str
) -> None:
    server.replies[f"GET {path}"] = reply(body, {"date": answers.DATE})
    without = ask(provider)
    status = ask(provider, **ADMIN)
    assert server.asked == [MODELS[provider], MODELS[provider], f"GET {path}"]
    sent = [each["x-api-key" if provider == "anthropic" else "authorization"] for each in server.headers]
    assert [each.removeprefix("Bearer ") for each in sent] == [KEY, KEY, ADMIN_KEY]
    assert {name: status.windows[name] for name in without.windows} == without.windows
    limit = status.windows[window]
    assert (limit.limit is not None, limit.remaining, limit.reset_at) == (True, None, None)
    assert (status.error, status.warnings) == (None, ())


def test_what_the_key_is_told_counts_for_more(ask: Callable[..., ProviderStatus], server: ProbeServer) -> None:
    said = {**answers.OPENAI, "x-ratelimit-limit-tokens": "7"}
    server.replies[f"GET {PROJECT}"] = reply(limit_answers.OPENAI_PROJECT, said)
    assert ask(**ADMIN).windows["tokens"].limit == 200_000


@pytest.mark.parametrize("more", [{"admin_key": ADMIN_KEY}, {"project": "proj_abc"}])
def test_without_an_admin_key_and_a_project_nothing_more_is_asked(
    ask: Callable[..., ProviderStatus], server: ProbeServer, more: dict[str, Any]
) -> None:
    assert ask(**more).error is None
    assert server.asked == [MODELS["openai"]]


def test_limits_without_what_remains_do_not_stand_in_for_a_call_that_costs(
    ask: Callable[..., ProviderStatus], server: ProbeServer
) -> None:
    server.replies[MODELS["openai"]] = reply(OPENAI_MODELS)
    server.replies[f"GET {PROJECT}"] = reply(limit_answers.OPENAI_PROJECT)
    status = ask(**ADMIN, paid_probes_per_day=1)
    assert server.asked == [MODELS["openai"], "POST /v1/chat/completions", f"GET {PROJECT}"]
    assert {"tokens", "tokens_minute/gpt-4o"} < set(status.windows)


WRONG: dict[str, tuple[Reply, str]] = {
    "no admin key": (
        reply({"error": {"message": f"Incorrect API key provided: {ADMIN_KEY}"}}, status=401),
        "answered 401",
    ),
    "no such project": (reply(b"", status=404), "answered 404"),
    "limited": (reply(b"", {"retry-after": "9"}, status=429), "answered 429"),
    "elsewhere": (reply(b"", {"location": "/elsewhere"}, status=302), "answered 302"),
    "cut": (reply(b'{"data": [', length=1_000), "its answer broke off (RemoteProtocolError)"),
    "junk": (reply(b"\xff" * 1_000), "its answer has no limits"),
    "1 MB of junk": (reply(b"\xff" * (1024 * 1024)), "its answer has no limits"),
    "a list": (reply([1]), "its answer has no limits"),
    "another object": (reply({"data": [{"object": "model", "id": "gpt-4o"}]}), "its answer has no limits"),
}


@pytest.mark.parametrize("how", WRONG)
def test_what_goes_wrong_with_it_is_a_warning(
    ask: Callable[..., ProviderStatus], server: ProbeServer, how: str
) -> None:
    server.replies[f"GET {PROJECT}"], problem = WRONG[how]
    status = ask(**ADMIN)
    assert (status.error, status.reachable, status.rate_limited, status.retry_after_s) == (None, True, False, None)
    assert set(status.windows) == {"requests", "tokens"}
    assert status.warnings == (f"{PROJECT}: {problem}",)


def test_an_answer_that_does_not_end_is_a_warning(ask: Callable[..., ProviderStatus], server: ProbeServer) -> None:
    server.replies[f"GET {PROJECT}"] = server.slow()
    status = ask(**ADMIN, timeout_s=3)
    assert (status.error, set(status.windows)) == (None, {"requests", "tokens"})
    assert status.warnings == (f"{PROJECT}: its answer did not end in time",)


def test_after_an_error_nothing_more_is_asked(ask: Callable[..., ProviderStatus], server: ProbeServer) -> None:
    server.replies[MODELS["openai"]] = reply(b"", status=401)
    assert isinstance(ask(**ADMIN).error, KeyRefused)
    assert server.asked == [MODELS["openai"]]


def test_a_limit_of_nothing_that_is_told_is_nothing(ask: Callable[..., ProviderStatus], server: ProbeServer) -> None:
    body = {"data": [{"object": "project.rate_limit", "model": "a", "max_tokens_per_1_minute": 0}]}
    server.replies[f"GET {PROJECT}"] = reply(body)
    assert ask(**ADMIN).windows["tokens_minute/a"] == LimitWindow(limit=0)


@pytest.mark.parametrize("admin_key", ["two words", "ünïcödé", "line\nbreak", 7])
def test_an_admin_key_that_no_header_can_hold_is_not_shown(admin_key: Any) -> None:
    with pytest.raises(InvalidSetting, match="admin_key") as caught:
        Credential(id="acme", provider="openai", admin_key=admin_key)
    assert str(admin_key) not in str(caught.value)
    assert ADMIN_KEY not in repr(Credential(id="acme", provider="openai", admin_key=ADMIN_KEY))


@pytest.mark.parametrize("project", ["", "../x", "a/b", "a?b", "{project}", "proj abc", "x" * 101, 7])
def test_a_project_is_an_id(project: Any) -> None:
    with pytest.raises(InvalidSetting, match="project"):
        Credential(id="acme", provider="openai", project=project)


@pytest.mark.parametrize(
    ("base", "path", "url"),
    [
        ("https://api.openai.com", "/v1/models", "https://api.openai.com/v1/models"),
        ("https://api.openai.com/v1", "/v1/models", "https://api.openai.com/v1/models"),
        ("https://gateway.example/openai", "/v1/models", "https://gateway.example/openai/v1/models"),
        ("https://api.groq.com/openai/v1", "/openai/v1/models", "https://api.groq.com/openai/v1/models"),
        ("https://api.groq.com/openai", "/openai/v1/models", "https://api.groq.com/openai/v1/models"),
        ("https://api.groq.com", "/openai/v1/models", "https://api.groq.com/openai/v1/models"),
        ("https://openrouter.ai/api/v1", "/api/v1/key", "https://openrouter.ai/api/v1/key"),
        (
            "https://google.example/v1beta",
            "/v1beta/models?pageSize=1",
            "https://google.example/v1beta/models?pageSize=1",
        ),
        ("https://ollama.example/api", "/api/tags", "https://ollama.example/api/tags"),
        ("https://openai", "/openai/v1/models", "https://openai/openai/v1/models"),
        ("https://myopenai", "/openai/v1/models", "https://myopenai/openai/v1/models"),
    ],
)
def test_a_base_url_may_have_the_beginning_of_a_path(base: str, path: str, url: str) -> None:
    assert url_of(base, path) == url
