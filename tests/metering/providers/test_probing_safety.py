"""What keeps a key where it belongs, and a probe from failing for what is wrong around it."""

from __future__ import annotations

import json
import re
import socket
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metering.errors import AddressRefused, ConnectionFailed, HostNotFound, NoProviderKey, TlsFailed
from metering.providers import addresses, conversation
from metering.providers.addresses import check_address, check_url
from metering.providers.hiding import pattern_of, without
from metering.providers.probing import Credential, ProviderStatus
from tests.metering.loops import on_a_loop
from tests.metering.providers import answers
from tests.metering.providers.probe_server import ADMIN_KEY, KEY, MODELS, OPENAI_MODELS, ProbeServer, reply

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SIGNS = "sk-proj/0123+Abc=dEf" + "9" * 100
"""A key with what URLs and JSON write in other ways, and longer than what a warning shows."""


@pytest.mark.parametrize("name", ["http_proxy", "HTTPS_PROXY", "ALL_PROXY"])
@pytest.mark.parametrize("scheme", ["http", "socks5", "ftp"])
def test_no_proxy_of_the_environment_sees_a_key(
    ask: Callable[..., ProviderStatus], server: ProbeServer, monkeypatch: pytest.MonkeyPatch, name: str, scheme: str
) -> None:
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    with ProbeServer() as proxy:
        monkeypatch.setenv(name, proxy.url.replace("http", scheme))
        assert ask().error is None
    assert (server.asked, proxy.asked, proxy.headers) == ([MODELS["openai"]], [], [])


@pytest.fixture
def _anew() -> Iterator[None]:
    """The authorities are read in the test, and again after it."""
    conversation._trusted.cache_clear()
    yield
    conversation._trusted.cache_clear()


@pytest.mark.usefixtures("_anew")
@pytest.mark.parametrize("content", [None, "no certificate"])
def test_authorities_that_cannot_be_read_are_named_and_only_where_they_matter(
    ask: Callable[..., ProviderStatus],
    server: ProbeServer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Any,
    content: str | None,
) -> None:
    file = tmp_path / "authorities.pem"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    status = ask(base_url=server.url.replace("http:", "https:"))
    assert isinstance(status.error, TlsFailed)
    assert f": SSL_CERT_FILE, {file}, cannot be read (" in str(status.error)
    assert ask().error is None


def looked_up(*found: str) -> Callable[..., Any]:
    return lambda _host, port, *_, **__: [(0, 0, 0, "", (address, port)) for address in found]


@pytest.mark.parametrize("url", ["https://xn--a.example", "https://xn--bcher-kva.example", "https://example.com."])
def test_a_host_in_ascii_is_looked_up_as_it_is(
    ask: Callable[..., ProviderStatus], monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", looked_up())
    assert isinstance(ask(base_url=url).error, HostNotFound)


@pytest.mark.parametrize("url", ["https://user:pass@a.example", "https://a.example?x", "https://a.example#x"])
def test_a_url_has_no_more_than_it_needs(url: str) -> None:
    with pytest.raises(AddressRefused, match="more than scheme, host, port and path"):
        check_url("openai", url, ())


@pytest.mark.parametrize("address", ["8.8.8.8", "2001:4860:4860::8888", "64:ff9b::808:808", "2002:808:808::1"])
@on_a_loop
async def test_public_addresses_are_asked(address: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", looked_up(address))
        await check_address("openai", "public.example", 443, ())


def test_a_machine_without_threads_fails_one_probe(
    ask: Callable[..., ProviderStatus], monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoThread:
        def __init__(self, **_: Any) -> None: ...

        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr(addresses.threading, "Thread", NoThread)
    status = ask(base_url="https://a.example")
    assert type(status.error) is ConnectionFailed
    assert status.reachable is False
    assert addresses._LOOK_UPS == {}


@pytest.mark.parametrize("provider", ["openai", "ollama"])
def test_why_there_is_no_key_is_said(ask: Callable[..., ProviderStatus], server: ProbeServer, provider: str) -> None:
    status = ask(provider, key=None, warnings=("key_env: PROD_KEY is not set",))
    assert status.warnings == ("key_env: PROD_KEY is not set",)
    if provider == "openai":
        assert isinstance(status.error, NoProviderKey)
        assert str(status.error).endswith("no key is configured for 'acme' (key_env: PROD_KEY is not set)")
    else:
        assert (status.error, server.asked) == (None, [MODELS["ollama"]])


def as_json_may_write(text: str) -> str:
    return "".join(f"\\u{ord(character):04x}" for character in text)


WAYS: list[Callable[[str], str]] = [
    str,
    str.upper,
    lambda key: quote(key, safe=""),
    lambda key: key.replace("/", r"\/"),
]


@pytest.mark.parametrize("path", [MODELS["openai"], "POST /v1/chat/completions"])
@pytest.mark.parametrize("code", [200, 429, 500])
def test_a_key_that_is_sent_back_is_nowhere(
    ask: Callable[..., ProviderStatus], server: ProbeServer, path: str, code: int
) -> None:
    keys = {"key": SIGNS, "admin_key": ADMIN_KEY}
    said = [way(key) for key in keys.values() for way in (*WAYS, as_json_may_write)]
    headers = {
        **answers.OPENAI,
        **{f"x-ratelimit-limit-a{number}": each for number, each in enumerate(said)},
        "x-ratelimit-reset-tokens": f"Bearer {SIGNS}",
        **{f"x-ratelimit-limit-{key}".replace("/", "").lower(): "7" for key in (KEY, ADMIN_KEY)},
        "date": SIGNS,
        "retry-after": SIGNS,
    }
    models = ", ".join(f'{{"id": "x{each}"}}' for each in ("gpt-4o", *said))
    body = f'{{"data": [{{"id": "gpt-4o"}}, {models}], "error": {{"type": "{SIGNS}"}}}}'.encode()
    server.replies[MODELS["openai"]] = reply(OPENAI_MODELS)
    server.replies[path] = reply(body, headers, status=code)
    status = ask(paid_probes_per_day=9, **keys)
    told = (repr(status) + json.dumps(status.to_dict(models=1_000)) + str(status.error)).lower()
    for key in keys.values():
        for way in WAYS:
            assert way(key)[:40].lower() not in told
    assert "[key]" in told
    assert status.windows["requests"].limit == 10_000
    if path == MODELS["openai"] and code == 200:
        assert [name for name in status.models if "[key]" in name] == ["x[key]"] * len(said)


def test_what_is_too_short_for_a_secret_is_let_be(ask: Callable[..., ProviderStatus], server: ProbeServer) -> None:
    """Servers of one's own are given keys such as these, which stand in numbers and names, too."""
    for key in ("1", "EMPTY", "gpt-4o"):
        status = ask(key=key)
        assert (status.windows["requests"].limit, "gpt-4o" in status.models) == (10_000, True)
        assert status.warnings == ()


characters = st.characters(min_codepoint=33, max_codepoint=126)


@given(
    st.text(characters, min_size=8, max_size=40),
    st.text(characters, min_size=8, max_size=40),
    st.binary(max_size=20),
    st.data(),
)
def test_a_key_is_found_however_it_is_written(key: str, other: str, around: bytes, data: st.DataObject) -> None:
    ways = [str, str.upper, str.lower, lambda each: f"%{ord(each):02X}", lambda each: f"\\u{ord(each):04x}"]
    written = "".join(data.draw(st.sampled_from(ways))(character) for character in key).encode()
    pattern = pattern_of((key, other))
    assert pattern is not None
    [(name, value)], body = without(pattern, [(around + written, written + around)], around + written + around)
    for each in (name, value, body):
        assert b"[key]" in each
        assert key.encode() not in re.sub(re.escape(b"[key]"), b"", each) or key.encode() in around + around


def test_without_keys_nothing_is_looked_for() -> None:
    assert pattern_of((None, "", "short")) is None
    assert without(None, [(b"a", b"b")], b"c") == ([(b"a", b"b")], b"c")


def test_nothing_secret_is_in_the_repr_of_a_credential() -> None:
    shown = repr(Credential(id="acme", provider="openai", key=KEY, admin_key=ADMIN_KEY, base_url="https://a.example"))
    assert "a.example" in shown
    assert KEY not in shown
    assert ADMIN_KEY not in shown
