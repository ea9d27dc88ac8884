"""Which credentials there are: a file, or the variables of the providers' own SDKs."""

from __future__ import annotations

from pathlib import Path

import pytest

from metering.errors import InvalidFile
from metering.providers.credentials import credentials_of_environment, read_credentials
from metering.providers.probes import Credential

SECRET = "sk-live-0123456789abcdef"

WHOLE = f"""
[credentials.prod-openai]
provider = "openai"
key_env = "PROD_KEY"
paid_probes_per_day = 24

[credentials.prod-claude]
provider = "anthropic"
key_block = "claude"
admin_key_env = "PROD_KEY"

[credentials."house llama"]
provider = "ollama"
base_url = "http://llama.internal:11434"
allowed_hosts = ["llama.internal"]

[credentials.inline]
provider = "openai"
key = " {SECRET} "
"""


def written(text: str | bytes) -> Path:
    path = Path("credentials.toml")
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_file_with_keys_from_everywhere() -> None:
    found = read_credentials(written(WHOLE), {"PROD_KEY": SECRET}, block={"claude": "sk-ant"}.get)
    assert found == [
        Credential(id="prod-openai", provider="openai", key=SECRET, paid_probes_per_day=24),
        Credential(id="prod-claude", provider="anthropic", key="sk-ant", admin_key=SECRET),
        Credential(
            id="house llama",
            provider="ollama",
            base_url="http://llama.internal:11434",
            allowed_hosts=("llama.internal",),
        ),
        Credential(id="inline", provider="openai", key=SECRET),
    ]


def test_a_secret_that_is_not_to_be_had_leaves_no_key() -> None:
    found = read_credentials(written(WHOLE), {"PROD_KEY": " "})
    assert [credential.key for credential in found] == [None, None, None, SECRET]
    found = read_credentials(written(WHOLE), {}, block=lambda _: None)
    assert [credential.key for credential in found] == [None, None, None, SECRET]


@pytest.mark.parametrize("text", ["", "[credentials]\n", "# nothing yet", b"\xef\xbb\xbf[credentials]"])
def test_an_empty_file_has_none(text: str | bytes) -> None:
    assert read_credentials(written(text), {}) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[credentials.a]", "line 1, credentials.a: Object missing required field `provider`"),
        ('[credentials.a]\nprovider = "openai"\nkey_evn = "A"', "line 1, credentials.a: Object contains unknown field"),
        ("[credentials.a]\nprovider = 1", "line 2, credentials.a.provider: Expected `str`, got `int`"),
        (
            f'[credentials.a]\nprovider = "openai"\nkey = ["{SECRET}"]',
            "line 3, credentials.a.key: Expected `str | null`",
        ),
        (
            f'[credentials.a]\nprovider = "openai"\nkey = "{SECRET}"\nkey_env = "A"',
            "line 4, credentials.a.key_env: there is key already, expected one of them",
        ),
        (
            f'[credentials.a]\nprovider = "openai"\nkey = "{SECRET} \u00e9"',
            "line 1, credentials.a: key: got '(not shown)'",
        ),
        (
            '[credentials.a]\nprovider = "openai"\npaid_probes_per_day = -1',
            "line 1, credentials.a: paid_probes_per_day: got -1, expected a whole number, 0 or more",
        ),
        (
            '[credentials.a]\nprovider = "openai"\nallowed_hosts = "b"',
            "line 3, credentials.a.allowed_hosts: Expected `array`, got `str`",
        ),
        ("credentials = 3", "line 1, credentials: Expected `object`, got `int`"),
        ("[credential.a]", "the file: Object contains unknown field `credential`"),
        (f"[credentials.a]\nkey = {SECRET}", "is not TOML at line 2"),
        (b"[credentials.\xff]", "is not UTF-8"),
    ],
)
def test_what_is_wrong_is_said_with_its_place_and_without_secrets(text: str | bytes, problem: str) -> None:
    with pytest.raises(InvalidFile) as refused:
        read_credentials(written(text), {})
    assert str(refused.value).startswith(f"credentials.toml: {problem}")
    assert SECRET not in str(refused.value)
    assert refused.value.__cause__ is None


def test_the_variables_of_the_sdks() -> None:
    environ = {"OPENAI_API_KEY": f" {SECRET}\n", "ANTHROPIC_API_KEY": "", "OLLAMA_HOST": "http://127.0.0.1:11434"}
    assert credentials_of_environment(environ) == [
        Credential(id="openai", provider="openai", key=SECRET),
        Credential(id="ollama", provider="ollama", base_url="http://127.0.0.1:11434"),
    ]
    assert credentials_of_environment({}) == []


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:11434"),
        ("127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("https://llama.example", "https://llama.example"),
    ],
)
def test_a_host_is_read_as_the_sdk_reads_it(host: str, url: str) -> None:
    [credential] = credentials_of_environment({"OLLAMA_HOST": host})
    assert credential.base_url == url


def test_an_endpoint_of_azure_without_a_scheme() -> None:
    [credential] = credentials_of_environment({"AZURE_OPENAI_ENDPOINT": "acme.openai.azure.com"})
    assert credential.base_url == "https://acme.openai.azure.com"
