"""The command line where quotas are on Redis: draining, rebuilding, verifying, and what is said of what is away."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from metering import Meter, TokenUsage
from metering.admission.redis.keys import shard_key, shard_of
from metering.admission.redis.wire import NotDone
from metering.cli.quotas import _Told
from metering.drain import Drain
from metering.spool import Shipped
from tests.servers import RedisCluster, RedisServer, free_port, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import redis

ACME = shard_of("acme")
USAGE = TokenUsage(input_tokens=5)
TEAM = """
[plans.team]
retention_days = 30
limits = [{ metric = "requests", per = "month", max = 5 }]
"""


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
def on_redis(
    client: redis.Redis, server: RedisServer, tallystick: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Runs `tallystick ARGUMENTS` with quotas on an empty Redis, and time enough for a busy machine."""
    monkeypatch.setenv("METERING_QUOTA_URL", server.url)
    monkeypatch.setenv("METERING_TIMEOUT_MS", "20000")
    return tallystick


@pytest.fixture
def app(on_redis: Any, ledger_url: str, server: RedisServer) -> Iterator[Meter]:
    """A meter beside the command line, on the same ledger and Redis."""
    with Meter(ledger_url, quota_url=server.url, quota_timeout_s=20, spool=Path(".tallystick/spool")) as meter:
        yield meter


@pytest.fixture
def secret(app: Meter) -> str:
    return app.keys.create("acme", plan="pro").secret


@contextmanager
def frozen(server: RedisServer) -> Iterator[None]:
    """Redis answers nothing, which commands wait for no longer than a moment."""
    server.freeze()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("METERING_TIMEOUT_MS", "100")
            yield
    finally:
        server.thaw()


def requests(meter: Meter) -> int:
    [total] = meter.usage("acme")
    return total.requests


def test_a_drain_says_what_became_of_what_was_admitted(on_redis: Any, app: Meter, secret: str) -> None:
    for _ in range(3):
        app.consume(secret, line="chat", usage=USAGE)
    drained = on_redis("drain")
    assert (drained.status, drained.err, drained.out[20:]) == (0, "", " 3 inserted\n")
    assert requests(app) == 3
    assert on_redis("drain").out.endswith("Z nothing to drain\n")
    app.consume(secret, line="chat")
    drained = on_redis("drain", "--json")
    assert drained.out.count("\n") == 1
    assert (drained.json["inserted"], drained.json["lost"], drained.json["dead"]) == (1, 0, 0)
    assert drained.json["at"].endswith("Z")


def test_a_drain_says_what_is_dead_and_what_is_lost(
    on_redis: Any, app: Meter, secret: str, client: redis.Redis
) -> None:
    app.consume(secret, line="chat")
    client.hincrby(shard_key(ACME, "shard"), "seq", 2)
    app.consume(secret, line="chat")
    client.xadd(shard_key(ACME, "events"), {b"h": b"?", b"e": b"?"})
    drained = on_redis("drain")
    assert (drained.status, drained.out[20:]) == (0, " 2 inserted, 1 dead, 2 lost\n")


KILLED = """
import os, signal, sys
from pathlib import Path
from metering import Meter
meter = Meter(sys.argv[1], quota_url=sys.argv[2], quota_timeout_s=20, spool=Path(sys.argv[3]))
meter.consume(sys.argv[4], line="chat", request={"asked": "by one who is gone"})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_drain_carries_what_a_killed_process_left_in_its_spool(
    on_redis: Any, app: Meter, secret: str, ledger_url: str, server: RedisServer
) -> None:
    arguments = [sys.executable, "-c", KILLED, ledger_url, server.url, ".tallystick/spool", secret]
    assert subprocess.run(arguments, timeout=60, check=False).returncode == -signal.SIGKILL
    assert len(list(Path(".tallystick/spool").iterdir())) == 1
    assert on_redis("drain").out.endswith(" 1 inserted\n")
    [entry] = on_redis("log", "acme", "--json").json
    assert entry["request"] == {"asked": "by one who is gone"}
    assert list(Path(".tallystick/spool").iterdir()) == []


def test_a_drain_bills_a_settle_that_redis_could_not_be_told(
    on_redis: Any, app: Meter, secret: str, server: RedisServer, ledger_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Meter(ledger_url, quota_url=server.url, quota_timeout_s=2, spool=Path(".tallystick/spool")) as impatient:
        hold = impatient.reserve(secret, line="chat", estimate=USAGE)
        monkeypatch.setattr(impatient._courier, "ship", Shipped)  # only the drain is to carry it
        with frozen(server):
            hold.settle(TokenUsage(input_tokens=3))
    assert on_redis("drain").out.endswith(" 1 inserted\n")
    [total] = app.usage("acme")
    assert (total.requests, total.input_tokens) == (1, 3)


def test_what_changed_while_redis_was_away_is_told_by_the_drain(
    on_redis: Any, app: Meter, secret: str, server: RedisServer
) -> None:
    app.consume(secret, line="chat")
    with frozen(server):
        changed = on_redis("accounts", "change-plan", "acme", "--plan", "free")
    assert (changed.status, changed.err.count("\n")) == (1, 1)
    assert changed.err.startswith("error: the ledger has this change, but Redis could not be told yet: the drain will")
    assert app.consume(secret, line="chat").limits[0].max == 10_000
    assert on_redis("drain").status == 0
    assert app.consume(secret, line="chat").limits[0].max == 1_000


def test_a_key_made_while_redis_is_away_is_shown(on_redis: Any, app: Meter, server: RedisServer) -> None:
    with frozen(server):
        made = on_redis("keys", "create", "acme", "--plan", "pro", "--json")
    assert made.status == 0
    assert app.consume(made.json[0]["secret"], line="chat").allowed


def test_applied_plans_are_told_to_redis(on_redis: Any, app: Meter, server: RedisServer) -> None:
    Path("plans.toml").write_text(TEAM)
    on_redis("plans", "apply")
    secret = app.keys.create("acme", plan="team").secret
    assert app.consume(secret, line="chat").limits[0].max == 5
    Path("plans.toml").write_text(TEAM.replace("max = 5", "max = 6"))
    assert on_redis("plans", "apply").out.startswith("plan team: version 2 from ")
    assert app.consume(secret, line="chat").limits[0].max == 6
    Path("plans.toml").write_text(TEAM.replace("max = 5", "max = 7"))
    with frozen(server):
        assert on_redis("plans", "apply").err.startswith("error: the ledger has this change, but Redis could not")
    assert on_redis("plans", "apply").out.startswith("nothing to do")
    on_redis("drain")
    assert app.consume(secret, line="chat").limits[0].max == 7


def test_quota_shows_where_limits_stand(on_redis: Any, app: Meter, secret: str) -> None:
    app.consume(secret, line="chat")
    key_id = app.keys.list("acme")[0].key_id
    for arguments in (("acme",), ("show", "acme"), ("--key-id", key_id, "acme"), ("show", "--key-id", key_id, "acme")):
        [limit] = on_redis("quota", *arguments, "--json").json
        assert (limit["used"], limit["remaining"]) == (1, 9_999)
    assert on_redis("quota", "--json", "acme").json == [limit]
    assert on_redis("quota", "nobody").err.startswith("error: account 'nobody' is not known")
    assert on_redis("quota", "show", "rebuild").err.startswith("error: account 'rebuild' is not known")


def test_a_rebuild_of_lost_shards(on_redis: Any, app: Meter, secret: str, client: redis.Redis) -> None:
    assert on_redis("quota", "rebuild").out == "nothing to do: no shard has lost data\n"
    for _ in range(3):
        app.consume(secret, line="chat")
    on_redis("drain")
    client.flushall()
    rebuilt = on_redis("quota", "rebuild")
    assert (rebuilt.status, rebuilt.out) == (0, f"shard {ACME}: was lost, rebuilt\n")
    assert on_redis("quota", "rebuild").out == "nothing to do: no shard has lost data\n"
    assert on_redis("quota", "rebuild", "--json").json == []
    assert app.consume(secret, line="chat").limits[0].used == 4


def test_a_rebuild_of_a_fenced_shard_drains_it(on_redis: Any, app: Meter, secret: str, client: redis.Redis) -> None:
    app.consume(secret, line="chat")
    client.hset(shard_key(ACME, "shard"), "fenced", "behind")
    [row] = on_redis("quota", "rebuild", "--json").json
    assert row == {"shard": ACME, "was": "fenced", "reason": "behind", "rebuilt": True}
    assert requests(app) == 1
    assert app.consume(secret, line="chat").limits[0].used == 2


def test_a_rebuild_of_named_shards(on_redis: Any, app: Meter, secret: str) -> None:
    app.consume(secret, line="chat")
    unused = (ACME + 1) % 64
    rebuilt = on_redis("quota", "rebuild", "--shard", unused, "--shard", ACME)
    assert sorted(rebuilt.out.splitlines()) == sorted(
        [f"shard {ACME}: was open, rebuilt", f"shard {unused}: was unused, left as it is"]
    )
    left = on_redis("quota", "rebuild", "--shard", unused)
    assert left.out.endswith("nothing to do: no shard of these was ever used\n")
    assert app.consume(secret, line="chat").limits[0].used == 2
    for wrong in (-1, 64):
        assert on_redis("quota", "rebuild", "--shard", wrong).err == f"error: --shard: got {wrong}, expected 0 to 63\n"


def test_verify_counts_what_redis_keeps(on_redis: Any, app: Meter, secret: str, client: redis.Redis) -> None:
    app.consume(secret, line="chat", usage=USAGE)
    on_redis("drain")
    app.consume(secret, line="chat", usage=USAGE)
    hold = app.reserve(secret, line="chat")
    assert on_redis("verify").out == "1 counters, 0 differ from the ledger\n"
    hold.release()
    assert on_redis("verify", "--json").json == []
    [counter] = client.keys("tally:*:counter:*")
    client.set(counter, 7, keepttl=True)
    answer = on_redis("verify", "--json")
    [wrong] = answer.json
    assert (answer.status, wrong["account"], wrong["kept"], wrong["counted"]) == (1, "acme", "7", "2")
    shown = on_redis("verify")
    assert shown.status == 1
    assert shown.out.endswith(
        "1 counters, 1 differ from the ledger\n"
        "calls made meanwhile may show as differences: only those that stay are wrong\n"
    )


COMMANDS = [("drain",), ("quota", "rebuild"), ("verify",), ("quota", "acme")]


@pytest.mark.parametrize("arguments", COMMANDS)
def test_a_redis_that_is_away_is_said_in_one_line(
    tallystick: Any, arguments: tuple[str, ...], ledger_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Meter(ledger_url) as meter:
        meter.accounts.create("acme", plan="pro")
    monkeypatch.setenv("METERING_QUOTA_URL", f"redis://127.0.0.1:{free_port()}")
    answer = tallystick(*arguments)
    assert (answer.status, answer.out, answer.err.count("\n")) == (1, "", 1)
    assert answer.err.startswith("error: Redis ")


@pytest.mark.parametrize("arguments", [("drain",), ("drain", "--follow"), ("quota", "rebuild")])
def test_what_needs_redis_says_so(tallystick: Any, arguments: tuple[str, ...]) -> None:
    answer = tallystick(*arguments)
    assert (answer.status, answer.out, answer.err.count("\n")) == (1, "", 1)
    assert answer.err.startswith("error: METERING_QUOTA_URL: got None, expected a Redis URL")


def test_a_ledger_that_is_away_is_said(on_redis: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METERING_LEDGER_URL", "sqlite:///nowhere.db")
    assert on_redis("drain").err == "error: ledger nowhere.db: cannot be opened; `tallystick init` creates it\n"


@contextmanager
def following(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "metering.cli", "drain", "--follow", *arguments]
    ran = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        with ran:
            yield ran
            ran.kill()
    finally:
        ran.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_following_goes_on_until_a_signal(on_redis: Any, app: Meter, secret: str, number: signal.Signals) -> None:
    app.consume(secret, line="chat")
    with following("--json") as ran:
        assert ran.stdout is not None
        assert json.loads(ran.stdout.readline())["inserted"] == 1
        for _ in range(2):
            app.consume(secret, line="chat")
        while requests(app) < 3:
            assert json.loads(ran.stdout.readline())["inserted"]
        ran.send_signal(number)
        assert ran.communicate(timeout=30) == ("", "")
        assert ran.returncode == 0
    assert requests(app) == 3


def test_following_waits_out_a_server_that_is_away(
    tallystick: Any, ledger_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RedisServer(appendonly=True) as server, Meter(ledger_url, quota_url=server.url, quota_timeout_s=20) as meter:
        monkeypatch.setenv("METERING_QUOTA_URL", server.url)
        secret = meter.keys.create("acme", plan="pro").secret
        meter.consume(secret, line="chat")
        server.kill()
        with following() as ran:
            assert ran.stdout is not None
            assert ran.stderr is not None
            assert ran.stderr.readline() == "draining until interrupted (Ctrl-C)\n"
            assert ran.stderr.readline().startswith("the drain goes on in 1 s: Redis at 127.0.0.1")
            server.start()
            assert ran.stdout.readline()[20:] == " 1 inserted\n"
            ran.send_signal(signal.SIGTERM)
            assert ran.communicate(timeout=30) == ("", "")
            assert ran.returncode == 0


class Stop:
    """Ends a drain after so many waits, or when it is told."""

    def __init__(self, waits: int) -> None:
        self.waits = waits

    def is_set(self) -> bool:
        return self.waits <= 0

    def wait(self, timeout: float, /) -> None:
        self.waits -= 1


def test_an_outage_is_warned_of_once(app: Meter, secret: str, caplog: pytest.LogCaptureFixture) -> None:
    class Away:
        """Away in each run but the third."""

        def call(self, shard: int, *command: Any, timeout_s: float) -> Any:
            if stop.waits == 3:
                return []
            raise NotDone("nobody there")

        def script(self, *_: Any) -> Any:
            raise AssertionError

    stop = Stop(5)
    Drain(app.ledger, Away()).follow(stop)
    assert caplog.messages == ["the drain goes on in 1 s: nobody there"] * 2


def test_a_drain_ends_after_the_batch_at_hand(app: Meter, secret: str) -> None:
    assert app._redis is not None
    link, stop = app._redis.link, Stop(9)

    class Told:
        """The signal comes with the first batch."""

        def call(self, shard: int, *command: Any, timeout_s: float) -> Any:
            return link.call(shard, *command, timeout_s=timeout_s)

        def script(self, *given: Any) -> Any:
            stop.waits = 0
            return link.script(*given)

    for _ in range(7):
        app.consume(secret, line="chat")
    inserted: list[int] = []
    Drain(app.ledger, Told(), batch=3).follow(stop, report=lambda done: inserted.append(done.inserted))
    assert (inserted, requests(app)) == ([3], 3)


def test_a_second_signal_is_for_those_who_had_it_before() -> None:
    before = signal.getsignal(signal.SIGTERM)
    told = _Told()
    assert not told.is_set()
    os.kill(os.getpid(), signal.SIGTERM)
    wait_until(told.is_set, "the signal")
    told.wait(60)
    assert signal.getsignal(signal.SIGTERM) == before


def test_on_a_cluster(tallystick: Any, ledger_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with RedisCluster() as cluster, Meter(ledger_url, quota_url=cluster.url, quota_timeout_s=5) as meter:
        monkeypatch.setenv("METERING_QUOTA_URL", cluster.url)
        monkeypatch.setenv("METERING_TIMEOUT_MS", "5000")
        names = [f"a{number}" for number in range(20)]
        secrets = [meter.keys.create(name, plan="pro").secret for name in names]
        for secret in secrets:
            meter.consume(secret, line="chat")
        assert tallystick("verify").out == "20 counters, 0 differ from the ledger\n"
        assert tallystick("drain").out.endswith(" 20 inserted\n")
        found = {finding["what"]: finding for finding in tallystick("doctor", "--json").json}
        assert all(finding["ok"] for finding in found.values())
        assert ", 3 servers, " in found["redis"]["says"]
        lost = cluster.nodes[1]
        with lost.client() as client:
            client.flushall()
        rebuilt = tallystick("quota", "rebuild").out
        assert 0 < rebuilt.count(": was lost, rebuilt\n") == rebuilt.count("\n") < 20
        assert all(meter.consume(secret, line="chat").limits[0].used == 2 for secret in secrets)
        lost.kill()
        drained = tallystick("drain")
        assert (drained.status, drained.out, drained.err.count("\n")) == (1, "", 1)


def test_help_and_import_need_no_redis() -> None:
    script = """
import sys
import metering, metering.doctor
from metering.cli import main
for command in (["drain"], ["quota"], ["quota", "rebuild"], ["doctor"]):
    sys.argv = ["tallystick", *command, "--help"]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code
assert not {"redis", "hiredis", "prefect"} & sys.modules.keys()
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.count("Usage: tallystick ") == 4
