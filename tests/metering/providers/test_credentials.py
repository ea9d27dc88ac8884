"""Which credentials there are: a file, or the variables of the providers' own SDKs."""

from __future__ import annotations

from pathlib import Path

import pytest

from metering.errors import InvalidFile, InvalidSetting
from metering.providers.credentials import credentials_of_environment, nothing_to_probe, read_credentials
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
    unset = ("key_env: PROD_KEY is not set", "admin_key_env: PROD_KEY is not set")
    job = "key_block: Secret blocks of Prefect are read by the job probe-providers alone"
    found = read_credentials(written(WHOLE), {"PROD_KEY": " "})
    assert [credential.key for credential in found] == [None, None, None, SECRET]
    assert [credential.warnings for credential in found] == [unset[:1], (job, unset[1]), (), ()]
    for nothing in (None, " "):
        found = read_credentials(written(WHOLE), {}, block=lambda _, nothing=nothing: nothing)  # type: ignore[misc]
        assert [credential.key for credential in found] == [None, None, None, SECRET]
        assert found[1].warnings[0] == "key_block: there is no Secret block 'claude', or nothing in it"


def test_a_secret_that_no_header_can_hold_leaves_no_key_and_is_named() -> None:
    split = f"{SECRET} \u00e9"
    found = read_credentials(written(WHOLE), {"PROD_KEY": split}, block=lambda _: split)
    assert [credential.key for credential in found] == [None, None, None, SECRET]
    assert [credential.warnings for credential in found[:2]] == [
        ("PROD_KEY holds no key: expected ASCII without blanks",),
        (
            "key_block: 'claude' holds no key: expected ASCII without blanks",
            "PROD_KEY holds no key: expected ASCII without blanks",
        ),
    ]
    assert SECRET not in repr(found[:2])
    first, second = credentials_of_environment({"OPENAI_API_KEY": split, "ANTHROPIC_API_KEY": SECRET})
    assert (first.id, first.key, second.key) == ("anthropic", SECRET, None)
    assert second.warnings == ("OPENAI_API_KEY holds no key: expected ASCII without blanks",)


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
        (
            f'[credentials]\nprovider = "openai"\nkey = "{SECRET}"',
            "line 2, credentials.provider: expected a table such as [credentials.NAME]",
        ),
        ('[credentials]\n"a...b" = 1', "line 2, credentials.a...b: expected a table such as [credentials.NAME]"),
        (
            '[credentials."a\\nb"]\nprovider = "openai"',
            "line 1, 'credentials.a\\nb': credential: got 'a\\nb', expected",
        ),
        (
            f'[credentials.a]\nprovider = "openai"\nproject = "{SECRET} x"',
            "line 1, credentials.a: project: got '(not shown)', expected the id of a project",
        ),
        (
            f'[credentials.a]\nprovider = "openai"\nbase_url = "https://u:{SECRET}@b.example"',
            "line 1, credentials.a: base_url: got '(not shown)', expected scheme, host, port and path",
        ),
        (
            '[credentials.a]\nprovider = "openai"\nbase_url = ""',
            "line 1, credentials.a: base_url: got '(not shown)', expected scheme, host, port and path",
        ),
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
        ("llama.example/", "http://llama.example:11434/"),
        ("llama.example:80/api/", "http://llama.example:80/api/"),
        (":8080", "http://127.0.0.1:8080"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("http://0.0.0.0:8080", "http://127.0.0.1:8080"),
        ("[::]:8080", "http://[::1]:8080"),
        ("[::1]", "http://[::1]:11434"),
        ("::1", "http://[::1]:11434"),
        ("https://[::1]:8080/x", "https://[::1]:8080/x"),
    ],
)
def test_a_host_is_read_as_the_sdk_reads_it(host: str, url: str) -> None:
    [credential] = credentials_of_environment({"OLLAMA_HOST": host})
    assert credential.base_url == url


def test_an_endpoint_of_azure_without_a_scheme() -> None:
    [credential] = credentials_of_environment({"AZURE_OPENAI_ENDPOINT": "acme.openai.azure.com"})
    assert credential.base_url == "https://acme.openai.azure.com"


def test_a_variable_with_a_base_url_that_cannot_be_is_named_and_not_left_out() -> None:
    environ = {"OPENAI_API_KEY": SECRET, "OPENAI_BASE_URL": f"https://u:{SECRET}@b.example"}
    with pytest.raises(InvalidSetting, match=r"^OPENAI_BASE_URL: got .\(not shown\)., expected scheme"):
        credentials_of_environment(environ)


def test_a_file_that_cannot_be_read_is_named() -> None:
    with pytest.raises(InvalidFile, match=r"^nowhere\.toml: cannot be read \(No such file or directory\)$"):
        read_credentials(Path("nowhere.toml"), {})
    with pytest.raises(InvalidFile, match=r"cannot be read \(Is a directory\)$"):
        read_credentials(Path(), {})


def test_why_there_is_nothing_to_probe() -> None:
    assert "there is no credentials.toml, and none of ANTHROPIC_API_KEY, " in nothing_to_probe(None)
    assert nothing_to_probe(Path("c.toml")) == "nothing to probe: there is no [credentials.NAME] in c.toml"
