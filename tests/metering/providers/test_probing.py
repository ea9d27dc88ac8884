"""Providers asked for their limits over HTTP, on the loopback: what is asked, what is made of it, what goes wrong."""

from __future__ import annotations

import json
import logging
import socket
from typing import TYPE_CHECKING, Any

import pytest

from metering.errors import (
    AddressRefused,
    ConnectionFailed,
    HostNotFound,
    InvalidSetting,
    KeyRefused,
    NoProviderKey,
    ProbeFailed,
    ProbeTimeout,
    ProviderLimited,
    TlsFailed,
    UnexpectedAnswer,
    UnknownProvider,
)
from metering.providers import parse_limits
from metering.providers.probing import Credential, ProviderStatus
from tests.metering.providers import answers
from tests.metering.providers.probe_server import (
    ANTHROPIC_MODELS,
    GENERATED,
    KEY,
    MODELS,
    OPENAI_MODELS,
    ProbeServer,
    reply,
)
from tests.servers import HOST

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Clock

SAMPLES = {
    "anthropic": "POST /v1/messages",
    "openai": "POST /v1/chat/completions",
    "ollama": "POST /api/generate",
}


@pytest.mark.parametrize(("provider", "headers"), [("anthropic", answers.ANTHROPIC), ("openai", answers.OPENAI)])
def test_the_model_list_tells_windows_and_models(
    ask: Callable[..., ProviderStatus], server: ProbeServer, clock: Clock, provider: str, headers: dict[str, str]
) -> None:
    status = ask(provider, paid_probes_per_day=9)
    limits = parse_limits(provider, headers, now=clock())
    assert status == ProviderStatus(
        provider=provider,
        account_key="acme",
        checked_at=clock(),
        reachable=True,
        windows=limits.windows,
        retry_after_s=limits.retry_after_s,
        models=tuple(
            each["id"]
            for each in (ANTHROPIC_MODELS if provider == "anthropic" else OPENAI_MODELS)["data"]  # type: ignore[attr-defined]
        ),
    )
    assert server.asked == [MODELS[provider]]
    [sent] = server.headers
    assert sent["x-api-key" if provider == "anthropic" else "authorization"].endswith(KEY)
    assert sent["accept-encoding"] == "identity"
    assert sent.get("anthropic-version") == ("2023-06-01" if provider == "anthropic" else None)


def test_ollama_tells_its_models_and_wants_no_key(ask: Callable[..., ProviderStatus], server: ProbeServer) -> None:
    status = ask("ollama", key=None)
    assert (status.reachable, status.error, status.windows) == (True, None, {})
    assert status.models == ("llama3.2:1b", "qwen3:8b")
    assert "authorization" not in server.headers[0]
    assert ask("ollama").models == status.models
    assert server.headers[1]["authorization"] == f"Bearer {KEY}"


SAMPLED = {
    "anthropic": ("claude-haiku-4", 8, 1, {"max_tokens": 1, "messages": [{"role": "user", "content": "hi"}]}),
    "openai": ("gpt-4o-mini", 9, 1, {"max_tokens": 1, "messages": [{"role": "user", "content": "hi"}]}),
    "ollama": ("llama3.2:1b", 26, 1, {"prompt": "hi", "stream": False, "options": {"num_predict": 1}}),
}


@pytest.mark.parametrize("provider", SAMPLED)
def test_a_call_that_costs_is_made_where_it_is_allowed_and_needed(
    ask: Callable[..., ProviderStatus], server: ProbeServer, clock: Clock, provider: str
) -> None:
    model, tokens_in, tokens_out, body = SAMPLED[provider]
    if provider != "ollama":
        server.replies[MODELS[provider]] = reply(ANTHROPIC_MODELS if provider == "anthropic" else OPENAI_MODELS)
    status = ask(provider)
    assert (status.windows, status.sample_model, server.bodies) == ({}, None, [])
    status = ask(provider, paid_probes_per_day=1, force_refresh=True)
    assert server.asked == [MODELS[provider], MODELS[provider], SAMPLES[provider]]
    assert server.bodies == [{"model": model, **body}]
    assert (
        set(status.windows)
        == {
            "anthropic": {"requests", "tokens", "input_tokens", "output_tokens"},
            "openai": {"requests", "tokens"},
            "ollama": set(),
        }[provider]
    )
    assert (status.sample_model, status.sample_input_tokens, status.sample_output_tokens) == (
        model,
        tokens_in,
        tokens_out,
    )
    assert status.sample_latency_ms is not None
    if provider == "ollama":
        assert status.sample_latency_ms == GENERATED["total_duration"] // 1_000_000  # type: ignore[operator]
        for wrong in (10**30, -1, "soon", 1.5):
            server.replies[SAMPLES[provider]] = reply({**GENERATED, "total_duration": wrong})
            status = ask(provider, paid_probes_per_day=9, force_refresh=True)
            assert status.sample_latency_ms is not None
            assert 0 <= status.sample_latency_ms < 60_000
            assert status.warnings == ("/api/generate: its total_duration cannot be read",)
    assert (status.error, status.models != ()) == (None, True)


def test_calls_that_cost_are_capped_a_day(
    ask: Callable[..., ProviderStatus], server: ProbeServer, clock: Clock
) -> None:
    server.replies[MODELS["openai"]] = reply(OPENAI_MODELS)

    def paid(times: int, **more: Any) -> int:
        before = len(server.bodies)
        for _ in range(times):
            ask(force_refresh=True, **more)
        return len(server.bodies) - before

    assert paid(4, paid_probes_per_day=2) == 2
    assert paid(1, paid_probes_per_day=2, key=KEY + "2") == 0
    assert paid(1, paid_probes_per_day=2, id="other") == 1
    clock.advance(days=1)
    assert paid(4, paid_probes_per_day=2) == 2


@pytest.mark.parametrize(
    ("models", "chosen", "most"),
    [
        (["gpt-4o", "gpt-4.1", "gpt-4o-mini", "gpt-4.1-mini"], "gpt-4.1-mini", "max_tokens"),
        (["o4-mini", "gpt-4o"], "gpt-4o", "max_tokens"),
        (["gpt-6", "o4-mini"], "o4-mini", "max_completion_tokens"),
        (["gpt-6", "gpt-4o-mini-tts"], None, ""),
    ],
)
def test_the_cheapest_model_of_openai(
    ask: Callable[..., ProviderStatus], server: ProbeServer, models: list[str], chosen: str | None, most: str
) -> None:
    server.replies[MODELS["openai"]] = reply({"data": [{"id": model} for model in models]})
    assert ask(paid_probes_per_day=1).sample_model == chosen
    assert [(body["model"], body[most]) for body in server.bodies] == ([(chosen, 1)] if chosen else [])


@pytest.mark.parametrize(
    ("models", "chosen"),
    [
        (["claude-opus-4", "claude-3-5-haiku", "claude-haiku-4"], "claude-3-5-haiku"),
        (["claude-opus-4", "claude-sonnet-4"], "claude-sonnet-4"),
        (["claude-opus-4"], "claude-opus-4"),
        (["claude-new"], None),
    ],
)
def test_the_cheapest_model_of_anthropic(
    ask: Callable[..., ProviderStatus], server: ProbeServer, models: list[str], chosen: str | None
) -> None:
    server.replies[MODELS["anthropic"]] = reply({"data": [{"id": model} for model in models]})
    assert ask("anthropic", paid_probes_per_day=1).sample_model == chosen


@pytest.mark.parametrize("path", [MODELS["openai"], SAMPLES["openai"]])
def test_a_429_has_windows_and_when_to_come_again(
    ask: Callable[..., ProviderStatus], server: ProbeServer, path: str
) -> None:
    server.replies[MODELS["openai"]] = reply(OPENAI_MODELS)
    body = answers.refused(type="insufficient_quota", code="insufficient_quota")
    server.replies[path] = reply(body, answers.OPENAI_LIMITED, status=429)
    status = ask(paid_probes_per_day=1)
    assert isinstance(status.error, ProviderLimited)
    assert (status.reachable, status.rate_limited, status.waiting_helps) == (True, True, False)
    assert (status.retry_after_s, status.windows["tokens"].remaining) == (113.425, 0)
    assert (status.sample_model is None) == (path == MODELS["openai"])


@pytest.mark.parametrize(
    ("status", "kind"),
    [(401, KeyRefused), (403, KeyRefused), (404, UnexpectedAnswer), (500, UnexpectedAnswer), (529, UnexpectedAnswer)],
)
def test_other_statuses_are_errors_that_show_no_body(
    ask: Callable[..., ProviderStatus], server: ProbeServer, status: int, kind: type[ProbeFailed]
) -> None:
    body = {"error": {"message": f"Incorrect API key provided: {KEY}"}}
    server.replies[MODELS["openai"]] = reply(body, answers.OPENAI, status=status)
    found = ask(paid_probes_per_day=1)
    assert type(found.error) is kind
    assert found.error.status == status  # type: ignore[attr-defined]
    assert (found.reachable, set(found.windows), server.bodies) == (True, {"requests", "tokens"}, [])


def test_redirects_are_not_followed(ask: Callable[..., ProviderStatus], server: ProbeServer) -> None:
    with ProbeServer() as other:
        server.replies[MODELS["openai"]] = reply(b"", {"location": f"{other.url}/v1/models"}, status=307)
        status = ask()
        assert isinstance(status.error, UnexpectedAnswer)
        assert "redirect" in str(status.error)
        assert other.asked == []


BROKEN = {
    "truncated JSON": reply(b'{"data": [{"id": "gpt', answers.OPENAI),
    "cut": reply(b'{"data": [', answers.OPENAI, length=1_000),
    "a list": reply([1], answers.OPENAI),
    "null": reply(None, answers.OPENAI),
    "no list": reply({"data": {"id": "gpt-4o"}}, answers.OPENAI),
    "numbers": reply({"data": [{"id": 7}]}, answers.OPENAI),
    "texts": reply({"data": ["gpt-4o"]}, answers.OPENAI),
    "a name like a book": reply({"data": [{"id": "x" * 1_000}]}, answers.OPENAI),
    "nothing": reply(b"", answers.OPENAI),
    "1 MB of junk": reply(b"\xff" * (1024 * 1024), answers.OPENAI),
    "more than is read": reply(b"[" * (3 * 1024 * 1024), answers.OPENAI),
    "packed": reply(b"\x1f\x8b", {**answers.OPENAI, "content-encoding": "gzip"}),
}


NO_JSON = ("truncated JSON", "cut", "nothing", "1 MB of junk", "more than is read", "packed")


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("path", [MODELS["openai"], SAMPLES["openai"]])
def test_a_body_that_cannot_be_read_leaves_the_windows(
    ask: Callable[..., ProviderStatus], server: ProbeServer, how: str, path: str
) -> None:
    server.replies[MODELS["openai"]] = reply(OPENAI_MODELS)
    server.replies[path] = BROKEN[how]
    status = ask(paid_probes_per_day=1)
    assert (status.reachable, set(status.windows)) == (True, {"requests", "tokens"})
    if path == MODELS["openai"] or how in (
        "truncated JSON",
        "cut",
        "nothing",
        "1 MB of junk",
        "more than is read",
        "packed",
    ):
        assert isinstance(status.error, UnexpectedAnswer)
        assert len(str(status.error)) < 200
    else:
        assert (status.error, status.sample_input_tokens) == (None, None)
        assert "usage cannot be read" in status.warnings[-1]


def test_headers_that_came_twice_and_garbage_are_warned_of(
    ask: Callable[..., ProviderStatus], server: ProbeServer
) -> None:
    twice = [*answers.OPENAI.items(), ("X-RateLimit-Limit-Tokens", "7"), ("x-ratelimit-reset-requests", "8.64s")]
    server.replies[MODELS["openai"]] = reply(OPENAI_MODELS, twice)
    status = ask()
    assert (status.windows["tokens"].limit, status.windows["requests"].reset_in_ms) == (None, 8_640)
    assert [warning.partition(":")[0] for warning in status.warnings] == ["x-ratelimit-limit-tokens"]


@pytest.mark.parametrize("path", [MODELS["openai"], SAMPLES["openai"]])
@pytest.mark.parametrize("code", [200, 429])
def test_a_body_that_does_not_end_leaves_what_the_headers_say(
    ask: Callable[..., ProviderStatus], server: ProbeServer, path: str, code: int
) -> None:
    server.replies[MODELS["openai"]] = reply(OPENAI_MODELS)
    server.replies[path] = server.slow(code, answers.OPENAI_LIMITED)
    status = ask(timeout_s=3, paid_probes_per_day=1)
    assert type(status.error) is (ProbeTimeout if code == 200 else ProviderLimited)
    assert code == 429 or str(status.error).endswith("did not end in time")
    assert (status.reachable, status.sample_model is None) == (True, path == MODELS["openai"])
    assert (status.windows["tokens"].remaining, status.retry_after_s) == (0, 113.425)
    assert status.rate_limited == (code == 429)


@pytest.mark.parametrize("path", [MODELS["openai"], SAMPLES["openai"]])
def test_who_says_nothing_is_given_up(ask: Callable[..., ProviderStatus], server: ProbeServer, path: str) -> None:
    server.replies[MODELS["openai"]] = reply(OPENAI_MODELS)
    server.replies[path] = server.silent
    status = ask(timeout_s=3, paid_probes_per_day=1)
    assert isinstance(status.error, ProbeTimeout)
    assert (status.reachable, status.windows) == (path != MODELS["openai"], {})


def test_no_connection(ask: Callable[..., ProviderStatus]) -> None:
    with socket.socket() as unheard:
        unheard.bind((HOST, 0))
        status = ask(base_url=f"http://{HOST}:{unheard.getsockname()[1]}")
    assert type(status.error) is ConnectionFailed
    assert status.reachable is False


def test_no_tls(ask: Callable[..., ProviderStatus], server: ProbeServer) -> None:
    status = ask(base_url=server.url.replace("http:", "https:"))
    assert isinstance(status.error, TlsFailed)
    assert (status.reachable, server.asked) == (False, [])


def test_without_a_key_or_for_a_provider_that_is_not_known_nothing_is_asked(
    ask: Callable[..., ProviderStatus], server: ProbeServer
) -> None:
    for key in (None, ""):
        assert isinstance(ask(key=key).error, NoProviderKey)
    assert isinstance(ask("nobody").error, UnknownProvider)
    assert (ask("nobody").reachable, ask(key=None).reachable, server.asked) == (None, None, [])


ADDRESSES = {
    "http://api.openai.com": [],
    "ftp://127.0.0.1": [],
    "ftp://127.0.0.1:21": [],
    "https://": [],
    "nothing": [],
    "https://api.openai.com:99999": [],
    "https://good.example\\.evil.example": [],
    "https://ünï.example": [],
    "https://10.0.0.1": ["10.0.0.1"],
    "https://169.254.169.254": ["169.254.169.254"],
    "https://[fe80::1]": ["fe80::1%eth0"],
    "https://[::ffff:127.0.0.1]x": [],
    "https://[::ffff:10.0.0.1]": ["::ffff:10.0.0.1"],
    "https://inside.example": ["8.8.8.8", "192.168.0.1"],
    "https://mapped.example": ["::ffff:10.0.0.1"],
    "https://unique.example": ["fd00::1"],
    "https://shared.example": ["100.64.0.1"],
    "https://[fec0::1]": ["fec0::1"],
    "https://nat64.example": ["64:ff9b::a00:1"],
    "https://nat64.internal.example": ["64:ff9b:1::808:808"],
    "https://6to4.example": ["2002:a00:1::1"],
    "https://compatible.example": ["::10.0.0.1"],
    "http://compatible.example": ["::7f00:1"],
    "https://2130706433": ["127.0.0.1"],
    "https://rebound.example": ["127.0.0.1"],
    "https://multicast.example": ["224.0.0.1"],
    "http://localhost": ["8.8.8.8"],
}


def looked_up(*addresses: str) -> Callable[..., Any]:
    return lambda _host, port, *_, **__: [(0, 0, 0, "", (address, port)) for address in addresses]


@pytest.mark.parametrize("url", ADDRESSES)
def test_keys_are_not_sent_just_anywhere(
    ask: Callable[..., ProviderStatus], monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", looked_up(*ADDRESSES[url]))
    status = ask(base_url=url)
    assert isinstance(status.error, AddressRefused), status.error
    assert status.reachable is None


def test_hosts_may_be_allowed_by_name(
    ask: Callable[..., ProviderStatus], server: ProbeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda _host, *more, **named: real(HOST, *more, **named))
    url = f"http://ollama.internal:{server.server_port}"
    assert isinstance(ask("ollama", base_url=url).error, AddressRefused)
    assert ask("ollama", base_url=url, allowed_hosts=("Ollama.Internal",), force_refresh=True).error is None
    assert server.headers[0]["host"] == f"ollama.internal:{server.server_port}"


@pytest.mark.parametrize("exc", [socket.gaierror(-2, "Name or service not known"), UnicodeError("label too long")])
def test_a_host_without_an_address(
    ask: Callable[..., ProviderStatus], monkeypatch: pytest.MonkeyPatch, exc: Exception
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise exc

    for look_up in (fails, looked_up()):
        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        assert isinstance(ask(base_url="https://nobody.example", force_refresh=True).error, HostNotFound)


@pytest.mark.parametrize("key", ["two words", "ünïcödé", "line\nbreak", 7])
def test_a_key_that_no_header_can_hold_is_not_shown(key: Any) -> None:
    with pytest.raises(InvalidSetting) as caught:
        Credential(id="acme", provider="openai", key=key)
    assert str(key) not in str(caught.value)
    assert KEY not in repr(Credential(id="acme", provider="openai", key=KEY))


@pytest.mark.parametrize(
    "wrong",
    [
        {"id": ""},
        {"id": 7},
        {"id": "two\nlines"},
        {"provider": None},
        {"paid_probes_per_day": -1},
        {"base_url": ""},
        {"base_url": 123},
        {"base_url": b"https://a.example"},
        {"base_url": "https://a.example/\udc80"},
        {"base_url": "https://a.example/" + "x" * 1_000},
        {"base_url": f"https://user:{KEY}@api.openai.com"},
        {"base_url": f"https://api.openai.com?key={KEY}"},
        {"base_url": f"https://api.openai.com#{KEY}"},
        {"allowed_hosts": None},
        {"allowed_hosts": (1,)},
        {"allowed_hosts": "llama.internal"},
        {"project": f"{KEY} x"},
    ],
)
def test_a_credential_is_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(
        InvalidSetting, match="credential" if {"id", "provider"} & set(wrong) else next(iter(wrong))
    ) as caught:
        Credential(**{"id": "acme", "provider": "openai", **wrong})
    assert KEY not in str(caught.value)
    assert Credential(id="acme", provider="openai", allowed_hosts=["A"]).allowed_hosts == ("a",)  # type: ignore[arg-type]


def test_a_base_url_may_say_the_version(ask: Callable[..., ProviderStatus], server: ProbeServer) -> None:
    assert ask(base_url=f"{server.url}/v1/").error is None
    assert server.asked == [MODELS["openai"]]


def test_at_most_twenty_models_are_shown(ask: Callable[..., ProviderStatus], server: ProbeServer) -> None:
    server.replies[MODELS["openai"]] = reply(
        {"data": [{"id": f"m{number}"} for number in range(2_000)]}, answers.OPENAI
    )
    status = ask()
    shown = json.loads(json.dumps(status.to_dict()))
    assert (len(shown["models"]), shown["model_count"], len(status.models)) == (20, 1_000, 1_000)
    assert shown["windows"]["tokens"]["reset_at"] == "2026-03-12T12:00:00.012000+00:00"
    server.replies[MODELS["openai"]] = reply(b"", status=500)
    assert ask(force_refresh=True).to_dict()["error"] == {
        "type": "UnexpectedAnswer",
        "message": "openai: answered 500",
        "status": 500,
    }


def test_one_line_is_logged_a_probe(
    ask: Callable[..., ProviderStatus], server: ProbeServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "metering")
    ask()
    ask()
    server.replies[MODELS["openai"]] = reply({"error": KEY}, status=401)
    ask(force_refresh=True)
    ours = [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "metering"]
    assert ours == [
        ("INFO", "probe of 'acme' (openai): 2 windows, 4 models"),
        ("WARNING", "probe of 'acme' (openai): openai: invalid key: answered 401"),
    ]
    assert KEY not in caplog.text
