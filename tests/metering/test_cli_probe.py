"""`tallystick probe`: what providers say, in the terminal and for scripts."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from metering.clock import utc_now
from metering.ledger import Ledger
from metering.ledger.observations import record_statuses
from metering.providers import LimitWindow
from metering.providers.probes import ProviderStatus
from tests.metering.providers.probe_server import KEY, ProbeServer, reply
from tests.servers import DEADLINE_S

if TYPE_CHECKING:
    from collections.abc import Iterator

TOKENS = {"x-ratelimit-limit-tokens": "1000", "x-ratelimit-remaining-tokens": "400"}


@pytest.fixture
def server() -> Iterator[ProbeServer]:
    with ProbeServer() as running:
        running.replies["GET /v1/models"] = reply({"data": [{"id": "gpt-4o-mini"}]}, TOKENS)
        yield running


@pytest.fixture
def configured(server: ProbeServer) -> None:
    Path("credentials.toml").write_text(
        f"""
[credentials.prod]
provider = "openai"
key = "{KEY}"
base_url = "{server.url}"
paid_probes_per_day = 5

[credentials.llama]
provider = "ollama"
base_url = "{server.url}"
"""
    )


@pytest.mark.usefixtures("configured")
def test_a_table_for_people(tallystick: Any) -> None:
    shown = tallystick("probe")
    assert (shown.status, shown.err) == (0, "")
    lines = [line for line in shown.out.splitlines() if "prod" in line or "llama" in line]
    assert [line.replace("│", " ").split() for line in lines] == [
        ["prod", "openai", "tokens", "1,000", "400", "60.0%", "-"],
        ["llama", "ollama", "-", "-", "-", "-", "says", "no", "limits"],
    ]


@pytest.mark.usefixtures("configured")
def test_json_for_scripts(tallystick: Any) -> None:
    [status] = tallystick("probe", "prod", "--json").json
    assert (status["account_key"], status["models"], status["error"]) == ("prod", ["gpt-4o-mini"], None)
    assert status["windows"]["tokens"]["remaining"] == 400
    assert status["windows"]["tokens"]["exhausted_at"] is None


@pytest.mark.usefixtures("configured")
def test_the_trend_that_the_job_kept(tallystick: Any, ledger_url: str) -> None:
    before = ProviderStatus(
        provider="openai",
        account_key="prod",
        checked_at=utc_now() - timedelta(hours=1),
        windows={"tokens": LimitWindow(limit=1_000, remaining=900)},
    )
    with closing(Ledger(ledger_url)) as ledger, ledger.write() as connection:
        record_statuses(connection, [before])
    [status] = tallystick("probe", "prod", "--json").json
    assert status["windows"]["tokens"]["exhausted_at"] is not None
    with closing(Ledger(ledger_url)) as ledger, ledger.read() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM provider_probes").scalar() == 1  # and none of its own


def test_calls_that_cost_are_counted_in_the_ledger(tallystick: Any, server: ProbeServer, configured: None) -> None:
    server.replies["GET /v1/models"] = reply({"data": [{"id": "gpt-4o-mini"}]})
    [status] = tallystick("probe", "prod", "--json").json
    assert (status["sample_model"], status["sample_input_tokens"]) == ("gpt-4o-mini", 9)


def test_without_a_ledger_nothing_is_paid_for(
    command: Any, server: ProbeServer, configured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METERING_LEDGER_URL", "sqlite:///nowhere.db")
    server.replies["GET /v1/models"] = reply({"data": [{"id": "gpt-4o-mini"}]})
    shown = command("probe", "prod", "--json")
    assert shown.status == 0
    assert shown.json[0]["sample_model"] is None
    assert shown.err.startswith("without the ledger there is no trend, and no call that costs: ledger nowhere.db: ")


@pytest.mark.usefixtures("configured")
def test_what_cannot_be_asked_is_in_the_table_and_in_the_status(tallystick: Any, server: ProbeServer) -> None:
    server.replies["GET /v1/models"] = reply(b"", status=401)
    shown = tallystick("probe")
    assert shown.status == 1
    assert "openai: invalid key: answered 401" in shown.out
    assert KEY not in shown.out + shown.err
    server.replies["GET /v1/models"] = reply(b"", TOKENS, status=429)
    shown = tallystick("probe")
    assert shown.status == 0
    assert "openai: answered 429: a rate limit is reached" in shown.out


def test_a_key_that_is_not_to_be_had_keeps_no_other_from_being_asked(
    tallystick: Any, server: ProbeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY} and more")
    monkeypatch.setenv("OLLAMA_HOST", server.url)
    shown = tallystick("probe", "--json")
    assert (shown.status, KEY in shown.out + shown.err) == (1, False)
    assert [each["error"] and each["error"]["message"] for each in shown.json] == [
        "openai: no key is configured for 'openai' (OPENAI_API_KEY holds no key: expected ASCII without blanks)",
        None,
    ]
    Path("credentials.toml").write_text('[credentials.prod]\nprovider = "openai"\nkey_block = "prod-key"\n')
    [status] = tallystick("probe", "--json").json
    assert (
        "(key_block: Secret blocks of Prefect are read by the job probe-providers alone)" in status["error"]["message"]
    )


def test_a_file_that_is_not_there_stops_only_those_who_probe(tallystick: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METERING_CREDENTIALS", "nowhere.toml")
    shown = tallystick("probe")
    assert (shown.status, shown.err) == (1, "error: nowhere.toml: cannot be read (No such file or directory)\n")
    assert tallystick("accounts", "list").status == 0


def test_what_is_wrong_is_said(tallystick: Any) -> None:
    nothing = tallystick("probe")
    assert (nothing.status, nothing.out) == (1, "")
    assert nothing.err.startswith("nothing to probe: there is no credentials.toml, and none of ANTHROPIC_API_KEY, ")
    other = tallystick("probe", "prod")
    assert other.err == "error: CREDENTIAL: got 'prod', expected one of none: no credential is configured\n"
    Path("credentials.toml").write_text("")
    assert tallystick("probe").err == "nothing to probe: there is no [credentials.NAME] in credentials.toml\n"
    Path("credentials.toml").write_text("[credentials.prod]\nprovider = 3\n")
    assert tallystick("probe").err == (
        "error: credentials.toml: line 2, credentials.prod.provider: Expected `str`, got `int`\n"
    )


@pytest.mark.usefixtures("configured")
def test_watching_goes_on_until_it_is_interrupted(ledger_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METERING_LEDGER_URL", ledger_url)
    command = [sys.executable, "-m", "metering.cli", "probe", "prod", "--watch", "--every", "5", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as ran:
        try:
            assert ran.stdout is not None
            assert json.loads(ran.stdout.readline())["account_key"] == "prod"
            assert ran.poll() is None
            ran.send_signal(signal.SIGINT)
            assert ran.communicate(timeout=60) == ("", "")
            assert ran.returncode == 0
        finally:
            ran.kill()


def test_watching_leaves_no_row_out_that_the_screen_has_no_room_for(
    server: ProbeServer, ledger_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METERING_LEDGER_URL", ledger_url)
    monkeypatch.setenv("TERM", "xterm")
    for name in ("COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    credential = '[credentials.c{}]\nprovider = "ollama"\nbase_url = "{}"\n'
    Path("credentials.toml").write_text("".join(credential.format(number, server.url) for number in range(100, 140)))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command = [sys.executable, "-m", "metering.cli", "probe", "--watch", "--every", "3600"]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as ran:
        os.close(theirs)
        shown = b""
        try:
            while b"c123" not in shown or "\u2514".encode() not in shown:  # the lower left corner
                assert select.select([ours], [], [], DEADLINE_S)[0], shown.decode()
                shown += os.read(ours, 65_536)
        finally:
            ran.kill()
            os.close(ours)
    assert [number for number in range(100, 140) if f"c{number}".encode() not in shown] == []
