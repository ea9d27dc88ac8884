"""The drain as a job: what a run does on Redis, what it says, and when it fails."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from prefect.client.orchestration import get_client

from flows.command import call
from flows.drain_events import NOT_ON_REDIS, drain_events
from metering import Meter
from metering.admission.redis.keys import shard_key, shard_of
from metering.errors import InvalidSetting, StoreUnavailable
from metering.spool import Shipped
from tasks.drain import drain_all, drain_shards
from tests.servers import RedisServer, free_port, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    import redis

    from tests.tasks.place import Place

ACME, ZETA = shard_of("acme"), shard_of("zeta")
PATIENT_MS = "20000"
"""The default is a promise to apps; here a machine may be too busy to keep it."""


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as running:
        yield running


@pytest.fixture
def client(server: RedisServer) -> Iterator[redis.Redis]:
    with server.client() as opened:
        opened.flushall()
        yield opened


@pytest.fixture
def on_redis(place: Place, client: redis.Redis, server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quotas are on an empty Redis."""
    monkeypatch.setenv("METERING_QUOTA_URL", server.url)
    monkeypatch.setenv("METERING_TIMEOUT_MS", PATIENT_MS)


@pytest.fixture
def app(on_redis: None) -> Iterator[Meter]:
    with Meter.from_env(create=False) as meter:
        yield meter


@pytest.fixture
def secret(app: Meter) -> str:
    return app.keys.create("acme", plan="pro").secret


def did(done: dict[str, int]) -> dict[str, int]:
    """What is not 0."""
    return {name: count for name, count in done.items() if count}


def test_a_run_carries_drains_and_gives_back(
    app: Meter, secret: str, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert app._redis is not None
    monkeypatch.setattr(app._courier, "ship", Shipped)  # only the job is to carry it
    app.consume(secret, line="chat", request={"number": 1})
    app._courier._spool.seal()
    hold = Meter.from_env(create=False)
    hold._calls._hold_ttl_s = 0.001
    hold.reserve(secret, line="chat")
    report = drain_shards.fn()
    assert (report.done["inserted"], report.problems) == (1, ())
    assert [entry.request for entry in app.log("acme")] == [{"number": 1}]
    expired = report.done["expired_holds"]
    wait_until(lambda: expired == 1 or drain_all().done["expired_holds"] == 1, "the hold to expire")
    assert app.quota("acme")[0].used == 1
    hold.close()
    assert "this run: nothing to do" in drain_all().markdown()


def test_a_shard_that_another_drain_is_at_is_left_to_it(app: Meter, secret: str, client: redis.Redis) -> None:
    app.consume(secret, line="chat")
    client.set(shard_key(ACME, "drainer"), "somebody")
    report = drain_all()
    assert did(report.done) == {}
    assert f"| {ACME} | open | 1 | 0 | 0 |" in report.markdown()
    assert "still to drain: 1 events, the oldest " in report.markdown()
    client.delete(shard_key(ACME, "drainer"))
    assert did(drain_all().done) == {"inserted": 1}


def test_gaps_and_dead_letters_are_in_the_report(app: Meter, secret: str, client: redis.Redis) -> None:
    app.consume(secret, line="chat")
    client.hincrby(shard_key(ACME, "shard"), "seq", 3)
    app.consume(secret, line="chat")
    client.xadd(shard_key(ACME, "events"), {b"h": b"?", b"e": b"?"})
    report = drain_all()
    assert did(report.done) == {"inserted": 2, "dead": 1, "lost": 3}
    assert report.problems == ()
    assert report.markdown() == "\n".join(
        [
            "- this run: 2 inserted, 1 dead, 3 lost",
            "- still to drain: 0 events",
            "- lost by Redis so far: 3 events",
            "- open dead letters: 1",
            "",
            "| shard | state | to drain | lost | dead letters |",
            "|--:|---|--:|--:|--:|",
            f"| {ACME} | open | 0 | 3 | 1 |",
        ]
    )


def test_a_lost_shard_is_a_problem_and_keeps_no_other_from_being_drained(
    app: Meter, secret: str, client: redis.Redis
) -> None:
    other = app.keys.create("zeta", plan="pro").secret
    for each in (secret, other):
        app.consume(each, line="chat")
    assert did(drain_all().done) == {"inserted": 2}
    app.consume(other, line="chat")
    client.delete(*client.keys(f"{shard_key(ACME, '')}*"))
    report = drain_all()
    assert report.problems[0] == "shards: 1 lost: nothing is admitted there until `tallystick quota rebuild`"
    assert app.usage("zeta")[0].requests == 2
    assert f"| {ACME} | lost | 0 | 0 | 0 |" in report.markdown()


def test_without_redis_there_is_nothing_to_run(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidSetting, match="METERING_QUOTA_URL: got None, expected a Redis URL"):
        drain_all()
    monkeypatch.setenv("METERING_QUOTA_URL", f"redis://127.0.0.1:{free_port()}")
    monkeypatch.setenv("METERING_TIMEOUT_MS", "100")
    with pytest.raises(StoreUnavailable, match="did not answer"):
        drain_all()


@pytest.mark.usefixtures("_engine")
def test_the_flow(
    place: Place, client: redis.Redis, server: RedisServer, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert call(drain_events) == 0
    assert json.loads(capsys.readouterr().out) == {"skipped": NOT_ON_REDIS}
    monkeypatch.setenv("METERING_QUOTA_URL", server.url)
    monkeypatch.setenv("METERING_TIMEOUT_MS", PATIENT_MS)
    with Meter.from_env(create=False) as meter:
        meter.consume(meter.keys.create("acme", plan="pro").secret, line="chat")
    assert call(drain_events) == 0
    assert did(json.loads(capsys.readouterr().out)) == {"inserted": 1}
    client.flushall()
    assert call(drain_events) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: shards: ")
    assert " lost: nothing is admitted there until `tallystick quota rebuild`" in err
    assert err.count("\n") == 1
    with get_client(sync_client=True) as prefect:
        runs = sorted(prefect.read_flow_runs(), key=lambda run: run.created or run.expected_start_time)
        artifacts = prefect.read_artifacts()
    assert [run.state_name for run in runs[-3:]] == ["Completed", "Completed", "Failed"]
    shown = [str(artifact.data) for artifact in artifacts if artifact.key == "drain-events"]
    assert sorted(f"| {ACME} | lost |" in text for text in shown) == [False, True]
