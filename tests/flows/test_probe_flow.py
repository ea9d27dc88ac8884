"""The probes as a job: what it keeps, shows and tells, and what it takes its credentials from."""

from __future__ import annotations

import json
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.events.filters import EventFilter, EventNameFilter

from flows.command import call
from flows.probe_providers import probe_providers
from metering.clock import utc_now
from metering.ledger import Ledger
from metering.ledger.paid_probes import LedgerPaidProbes
from metering.providers.credentials import nothing_to_probe
from tasks.probes import configured_credentials, keep_statuses, probe_credentials
from tests.metering.providers.probe_server import KEY, ProbeServer, reply
from tests.servers import RedisServer, free_port, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Clock
    from tests.tasks.place import Place

NEARLY = {
    "x-ratelimit-limit-tokens": "1000",
    "x-ratelimit-remaining-tokens": "40",
    "x-ratelimit-reset-tokens": "6h0m0s",
}
PLENTY = {**NEARLY, "x-ratelimit-remaining-tokens": "900"}


@pytest.fixture
def server() -> Iterator[ProbeServer]:
    with ProbeServer() as running:
        yield running


def configure(server: ProbeServer, *more: str) -> None:
    text = f'[credentials.prod]\nprovider = "openai"\nkey = "{KEY}"\nbase_url = "{server.url}"\n'
    Path("credentials.toml").write_text("\n".join([text, *more]))


def limits(server: ProbeServer, headers: dict[str, str]) -> None:
    server.replies["GET /v1/models"] = reply({"data": [{"id": "gpt-4o-mini"}]}, headers)


def rows(place: Place, query: str) -> Any:
    return place.ledger_rows(query)


def test_what_is_found_is_kept_with_its_trend(place: Place, server: ProbeServer, clock: Clock) -> None:
    configure(server)
    limits(server, PLENTY)
    first = probe_credentials.fn(place.ledger_url, clock)
    assert keep_statuses.fn(place.ledger_url, first.statuses) == (1, 0)
    assert [state.exhausted_at for state in first.states] == [None]
    limits(server, {**NEARLY, "x-ratelimit-remaining-tokens": "600"})
    now = clock.advance(minutes=30)
    second = probe_credentials.fn(place.ledger_url, clock)
    assert keep_statuses.fn(place.ledger_url, second.statuses) == (1, 0)
    # 300 in half an hour, and 600 are left.
    assert [state.exhausted_at for state in second.states] == [now + timedelta(hours=1)]
    assert rows(place, "SELECT remaining FROM provider_windows ORDER BY seq") == [("900",), ("600",)]


def test_a_call_that_costs_is_counted_and_its_cost_known(place: Place, server: ProbeServer, clock: Clock) -> None:
    configure(server, "paid_probes_per_day = 1")
    limits(server, {})
    for _ in range(2):
        probed = probe_credentials.fn(place.ledger_url, clock)
        clock.advance(minutes=5)
    assert server.asked.count("POST /v1/chat/completions") == 1
    assert probed.counts()["paid_probes"] == 0
    [(number, tokens_in, tokens_out, cost)] = rows(
        place, "SELECT number, input_tokens, output_tokens, cost FROM paid_probes"
    )
    # gpt-4o-mini, as genai-prices has it: 9 x 0.15 + 1 x 0.60 USD a million.
    assert (number, tokens_in, tokens_out, cost) == (1, 9, 1, "0.00000195")


def test_what_the_command_paid_for_is_costed_by_the_job(place: Place, server: ProbeServer) -> None:
    with closing(Ledger(place.ledger_url)) as ledger:
        payer = LedgerPaidProbes(ledger)
        asked = {"credential": "prod", "provider": "openai", "base_url": server.url, "at": utc_now()}
        for model in ("gpt-4o-mini", "no-such-model"):
            paid = payer.take(**asked, model=model, most=9)
            assert paid is not None
            payer.spent(paid, input_tokens=9, output_tokens=1, latency_ms=420)
    configure(server)
    limits(server, PLENTY)
    probe_credentials.fn(place.ledger_url)
    assert rows(place, "SELECT cost FROM paid_probes ORDER BY number") == [("0.00000195",), (None,)]


def test_what_another_process_asked_for_is_not_asked_for_again(
    place: Place, server: ProbeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(server)
    with RedisServer() as redis:
        monkeypatch.setenv("METERING_QUOTA_URL", redis.url)
        probed = [probe_credentials.fn(place.ledger_url) for _ in range(2)]
    assert server.asked == ["GET /v1/models"]
    kept = [keep_statuses.fn(place.ledger_url, each.statuses) for each in probed]
    assert kept == [(1, 0), (0, 0)]


def test_credentials_of_the_environment(server: ProbeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert configured_credentials() == []
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    Path(".env").write_text("ANTHROPIC_API_KEY=of-a-file\n")
    assert [(each.id, each.key) for each in configured_credentials()] == [("anthropic", "of-a-file"), ("openai", KEY)]
    configure(server)
    assert [each.id for each in configured_credentials()] == ["prod"]


@pytest.mark.usefixtures("_engine")
def test_the_flow(
    place: Place, server: ProbeServer, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert call(probe_providers) == 0
    assert json.loads(capsys.readouterr().out) == {"skipped": nothing_to_probe(None)}
    Path("credentials.toml").write_text("")
    assert call(probe_providers) == 0
    assert json.loads(capsys.readouterr().out) == {"skipped": nothing_to_probe(Path("credentials.toml"))}
    Secret(value=KEY).save("prod-key")
    down = f'[credentials.down]\nprovider = "ollama"\nbase_url = "http://127.0.0.1:{free_port()}"'
    block = f'[credentials.block]\nprovider = "anthropic"\nkey_block = "prod-key"\nbase_url = "{server.url}"'
    missing = '[credentials.missing]\nprovider = "anthropic"\nkey_block = "no-such-block"'
    configure(server, down, block, missing)
    for headers in (PLENTY, NEARLY, NEARLY):
        limits(server, headers)
        assert call(probe_providers) == 0
        said = json.loads(capsys.readouterr().out)
    page = Path(said.pop("page"))
    assert said == {"credentials": 4, "failed": 2, "windows": 5, "paid_probes": 0, "not_kept": 0}
    assert page == place.home.absolute() / "out" / "providers.html"
    html = page.read_text()
    assert "96.0%" in html
    assert "<polyline" in html
    assert "no key is configured for &#39;missing&#39; (key_block: there is no Secret block" in html
    assert rows(place, "SELECT count(*), count(DISTINCT credential) FROM provider_probes") == [(12, 4)]

    with get_client(sync_client=True) as client:
        tables = [one for one in client.read_artifacts() if one.key == "provider-limits"]
        wait_until(lambda: len(events(client)) == 2, "both events to arrive")
        told = events(client)
    shown = {row["credential"]: row for row in json.loads(str(max(tables, key=lambda one: one.created).data))}
    assert shown["prod"]["used"] == "96.0%"
    assert shown["down"]["problem"].startswith("ollama: no connection with 127.0.0.1")
    assert shown["block"]["limit"] == 80_000
    # Once when it was reached, and not again while it stays.
    assert sorted((event["event"], event["payload"]["credential"]) for event in told) == [
        ("tallystick.provider-limit.80", "prod"),
        ("tallystick.provider-limit.95", "prod"),
    ]
    assert {event["payload"]["remaining"] for event in told} == {40}
    everything = html + str(tables) + str(told) + caplog.text
    assert KEY not in everything

    configure(server)
    server.replies["GET /v1/models"] = reply(b"", status=401)
    assert call(probe_providers) == 1
    assert capsys.readouterr().err == "error: openai: invalid key: answered 401\n"
    assert rows(place, "SELECT error FROM provider_probes ORDER BY seq DESC LIMIT 1") == [("KeyRefused",)]

    # A 429 is an answer. And where no page can be written, all else is done.
    server.replies["GET /v1/models"] = reply(b"", NEARLY, status=429)
    assert call(probe_providers) == 0
    assert json.loads(capsys.readouterr().out)["failed"] == 0
    page.unlink()
    page.parent.rmdir()
    page.parent.write_text("no folder")
    limits(server, {**NEARLY, "x-ratelimit-remaining-tokens": "1"})
    assert call(probe_providers) == 1
    assert "out/providers.html: cannot be written: " in capsys.readouterr().err
    with get_client(sync_client=True) as client:
        tables = [one for one in client.read_artifacts() if one.key == "provider-limits"]
    [row] = json.loads(str(max(tables, key=lambda one: one.created).data))
    assert (row["credential"], row["remaining"]) == ("prod", 1)
    assert rows(place, "SELECT error, count(*) FROM provider_probes WHERE credential = 'prod' GROUP BY error") == [
        (None, 4),
        ("KeyRefused", 1),
        ("ProviderLimited", 1),
    ]


def events(client: Any) -> list[Any]:
    names = EventFilter(event=EventNameFilter(prefix=["tallystick."]))
    answer = client._client.post("/events/filter", json={"filter": names.model_dump(mode="json")})
    return list(answer.json()["events"])


def test_a_file_that_cannot_be_read_is_said(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    Path("credentials.toml").write_text("[credentials.prod]\nprovder = 'openai'\n")
    assert call(configured_credentials) == 1
    assert capsys.readouterr().err.startswith("error: credentials.toml: line 1, credentials.prod: ")
