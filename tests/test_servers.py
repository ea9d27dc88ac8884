"""The servers and the proxy of the tests do what they say."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import psycopg
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.proxy import Proxy, certificate
from tests.servers import DEADLINE_S, HOST, SLOTS, PostgresServer, RedisCluster, RedisServer, base, flavours, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
ON_ITS_OWN = """
import sys
from tests import servers
server = getattr(servers, sys.argv[1])()
server.start()
print(server.port, flush=True)
input()
"""


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
def proxy(server: RedisServer) -> Iterator[Proxy]:
    with Proxy(server.port) as proxy:
        yield proxy


def client_of(port: int, timeout_s: float = DEADLINE_S) -> redis.Redis:
    return redis.Redis(host=HOST, port=port, socket_timeout=timeout_s, retry=Retry(NoBackoff(), 0))


def hopeless(port: int) -> redis.Redis:
    """A client for calls that never get an answer."""
    return client_of(port, 0.1)


def refused(port: int) -> bool:
    try:
        with client_of(port) as client:
            client.ping()
    except redis.ConnectionError:
        return True
    return False


@pytest.mark.parametrize("flavour", flavours())
def test_a_killed_server_comes_back_with_what_it_appended(flavour: str) -> None:
    with RedisServer(flavour, appendonly=True, password="p@ss/word") as server, server.client() as client:
        port, folder = server.port, server.folder
        client.set("a", 1)
        server.kill()
        assert not server.running
        assert refused(port)
        server.start()
        assert server.port == port
        assert client.get("a") == b"1"
        server.stop()
        server.start()
        assert client.get("a") == b"1"
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        with redis.Redis.from_url(server.url) as by_url:
            assert by_url.get("a") == b"1"
    assert refused(port)
    assert not folder.exists()


def test_the_wheels_bring_the_servers_they_are_named_for() -> None:
    for flavour, (field, version) in {
        "redis-6.2": ("redis_version", "6.2."),
        "valkey-9": ("valkey_version", "9."),
    }.items():
        if flavour in flavours():
            with RedisServer(flavour) as server, server.client() as client:
                assert client.info("server")[field].startswith(version)


def test_a_replica_has_a_copy_and_can_be_promoted() -> None:
    with RedisServer(password="secret") as master, master.client() as client:
        client.set("a", 1)
        with RedisServer(replica_of=master) as replica, replica.client() as copy:
            assert copy.get("a") == b"1"
            replica.freeze()
            client.set("a", 2)
            master.kill()
            replica.thaw()
            copy.replicaof("NO", "ONE")
            copy.set("b", 1)


def test_a_frozen_server_does_not_answer_until_it_thaws(server: RedisServer) -> None:
    server.freeze()
    assert server.running
    with pytest.raises(redis.TimeoutError), hopeless(server.port) as client:
        client.ping()
    server.thaw()
    with server.client() as client:
        assert client.ping()


def test_a_server_that_does_not_start_says_why() -> None:
    with pytest.raises(RuntimeError, match="no-such-setting"), RedisServer(args=("--no-such-setting", "1")):
        pass
    with pytest.raises(RuntimeError, match="no_such_setting"), PostgresServer(args=("-c", "no_such_setting=1")):
        pass


def test_a_taken_port_is_left_to_its_owner(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    ports = iter([server.port, base.free_port()])
    monkeypatch.setattr(base, "free_port", lambda: next(ports))
    with RedisServer() as other:
        assert other.port != server.port
        assert "already in use" not in other.log
    with server.client() as client:
        assert client.ping()


@pytest.mark.parametrize("kind", [RedisServer, PostgresServer])
def test_a_server_dies_with_the_process_that_started_it(kind: type[object]) -> None:
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)  # for the account that Postgres may have to run as
        owner = subprocess.Popen(
            [sys.executable, "-c", ON_ITS_OWN, kind.__name__],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": folder},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        with owner:
            assert owner.stdout is not None
            port = int(owner.stdout.readline())
            assert listens(port)
            owner.kill()
        wait_until(lambda: not listens(port), "the server's end")


def listens(port: int) -> bool:
    try:
        socket.create_connection((HOST, port)).close()
    except (ConnectionRefusedError, ConnectionResetError):  # reset where it dies at this very moment
        return False
    return True


def test_a_killed_postgres_comes_back_with_what_was_committed() -> None:
    with PostgresServer(password="p@ss/word") as server:
        port, folder = server.port, server.folder
        with server.client() as client:
            assert client.execute("SHOW fsync").fetchone() == ("on",)
            client.execute("CREATE TABLE kept AS SELECT 1 AS a")
            client.execute("BEGIN")
            client.execute("CREATE TABLE lost AS SELECT 1 AS a")
            server.kill()
            with pytest.raises(psycopg.OperationalError):
                client.execute("COMMIT")
        assert not server.running
        for end in (server.kill, server.stop):
            server.start()
            assert server.port == port
            with server.client() as client:
                assert client.execute("SELECT to_regclass('kept') IS NULL, to_regclass('lost') IS NULL").fetchone() == (
                    False,
                    True,
                )
                end()
        server.start()
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(host=HOST, port=port, user="tally", password="wrong", dbname="postgres")
    assert not folder.exists()


def test_a_frozen_postgres_does_not_answer_until_it_thaws(postgres: PostgresServer) -> None:
    with postgres.client() as client:
        postgres.freeze()
        client.pgconn.send_query(b"SELECT 1")
        client.pgconn.flush()
        with pytest.raises(psycopg.OperationalError, match="timeout"):
            postgres.client()
        assert client.pgconn.is_busy()
        postgres.thaw()
        assert client.pgconn.get_result() is not None
        client.pgconn.finish()


def test_databases_are_new_or_copies_and_can_be_dropped_under_their_users(postgres: PostgresServer) -> None:
    first = postgres.database()
    with postgres.client(first) as client:
        client.execute("CREATE TABLE mine AS SELECT 7 AS a")
    copy, new = postgres.database(like=first), postgres.database()
    assert len({first, copy, new}) == 3
    with postgres.client(copy) as client:
        assert client.execute("SELECT a FROM mine").fetchone() == (7,)
        postgres.drop(copy)
        with pytest.raises(psycopg.OperationalError):
            client.execute("SELECT a FROM mine")
    with postgres.client(new) as client:
        assert client.execute("SELECT to_regclass('mine')").fetchone() == (None,)
    for url in (first, new):
        postgres.drop(url)


def test_clusters_serve_every_slot_from_three_nodes() -> None:
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        for cluster in pool.map(stack.enter_context, map(RedisCluster, flavours())):
            with cluster.client() as client:
                for key in range(100):
                    client.set(str(key), key)
            sizes = []
            for node in cluster.nodes:
                with node.client() as client:
                    assert client.execute_command("CLUSTER INFO")["cluster_slots_ok"] == str(SLOTS)
                    sizes.append(client.dbsize())
            assert all(sizes)
            assert sum(sizes) == 100


def test_a_proxy_loses_replies_and_not_requests(server: RedisServer, proxy: Proxy) -> None:
    with server.client() as direct, client_of(proxy.port) as client, hopeless(proxy.port) as impatient:
        for caller, silent, error in ((client, 0.0, redis.ConnectionError), (impatient, 1.0, redis.TimeoutError)):
            direct.delete("n")
            caller.ping()
            proxy.silent, proxy.drop_next = silent, 1
            with pytest.raises(error):
                caller.incr("n")
            assert caller.incr("n") == 2
    assert proxy.counts["dropped"] == 2


def test_a_proxy_drops_cuts_and_delays_its_share(server: RedisServer) -> None:
    failed = 0
    with Proxy(
        server.port, seed=7, silent=0.0, drop_replies=0.02, cut_replies=0.02, delay_replies=0.02, delay_s=(0.0, 0.001)
    ) as proxy:
        with client_of(proxy.port) as client:
            for _ in range(1_000):
                try:
                    client.ping()
                except redis.ConnectionError:
                    failed += 1
        counts = proxy.counts
        assert min(counts["dropped"], counts["cut"], counts["delayed"]) > 5
        assert counts["dropped"] + counts["cut"] >= failed > 0
        assert counts["dropped"] + counts["cut"] + counts["delayed"] + counts["passed"] == counts["replies"]


def test_a_proxy_cuts_within_a_reply(server: RedisServer, proxy: Proxy) -> None:
    with client_of(proxy.port) as client:
        client.set("large", b"x" * 1_000_000)
        proxy.cut_replies = 1.0
        with pytest.raises(redis.ConnectionError):
            client.get("large")
        assert proxy.counts["cut"] == 1


def test_a_paused_proxy_is_a_black_hole(proxy: Proxy) -> None:
    with client_of(proxy.port) as client, hopeless(proxy.port) as impatient:
        client.ping()
        proxy.pause()
        with pytest.raises(redis.TimeoutError):
            impatient.ping()
        proxy.resume()
        assert client.ping()


def test_a_refusing_proxy_cuts_and_refuses(proxy: Proxy) -> None:
    with client_of(proxy.port) as client:
        client.ping()
        port = proxy.port
        proxy.refuse()
        with pytest.raises(redis.ConnectionError):
            client.ping()
        assert refused(port)
        proxy.resume()
        assert proxy.port == port
        assert client.ping()


def test_a_proxy_speaks_tls_for_a_server_that_cannot(server: RedisServer, tmp_path: Path) -> None:
    pair = certificate(tmp_path)
    with Proxy(server.port, tls=pair) as proxy:
        with redis.Redis.from_url(proxy.url, ssl_ca_certs=str(pair[0])) as client:
            assert client.ping()
        with (
            pytest.raises(redis.ConnectionError, match="CERTIFICATE_VERIFY_FAILED"),
            redis.Redis.from_url(proxy.url, retry=Retry(NoBackoff(), 0)) as client,
        ):
            client.ping()
