"""What an admission costs, as ratios to a floor.

Every contender gets its turn in every round, so the ratios hold while the machine's speed drifts; the calls a second
are this machine's, now. A benchmark: nothing fails because it is slow. After each turn, what was sent must be in the
contender's counters and events, or it stops.
"""

from __future__ import annotations

import json
import os
import platform
import sqlite3
import time
from argparse import ArgumentParser, RawTextHelpFormatter
from importlib.metadata import version
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import TYPE_CHECKING

from benchmarks.payloads import payload_tables
from benchmarks.peer import PACKAGES, make_environment
from benchmarks.reconciliation import reconciliation_table
from benchmarks.redis_store import async_table, threads_table
from benchmarks.sql_store import sql_table
from benchmarks.tokens import token_tables
from tests.servers import RedisServer, flavours

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable, Iterator

    from benchmarks.measure import Table

LONGEST_TABLE_S = 60


def main() -> None:
    """Print the tables as they come, or all of it as JSON."""
    servers = flavours()
    parser = ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("--server", choices=servers, default=next(iter(servers), None), help="default: %(default)s")
    parser.add_argument("--keyed", action="store_true", help="an idempotency key with every call on Redis")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--turn", type=float, default=0.8, metavar="SECONDS", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="nothing but JSON, at the end")
    given = parser.parse_args()

    say: Callable[[str], None] = (lambda _: None) if given.json else print
    with TemporaryDirectory(prefix="tallystick-bench-") as name:
        folder = Path(name)
        facts = _machine(folder, given.server)
        try:
            peer, facts["peer"] = make_environment(folder / "peer"), f"{', '.join(PACKAGES)}, from the package registry"
        except RuntimeError as exc:
            peer, facts["peer"] = None, f"not measured: {exc}"
        facts["plan"] = "requests a month, tokens a day, requests an hour; no call is refused"
        facts["turns"] = f"{given.rounds} of {given.turn:g} s for each contender; shown: the median, and least to most"
        say("\n".join(f"{fact}: {value}" for fact, value in facts.items()) + "\n")
        tables = []
        for table in _tables(folder, given, peer, say):
            say(f"{table}\n")
            tables.append(table.to_dict())
    if given.json:
        print(json.dumps({"facts": facts, "tables": tables}, indent=2))


def _tables(folder: Path, given: Namespace, peer: Path | None, say: Callable[[str], None]) -> Iterator[Table]:
    for number, table in enumerate((threads_table, async_table)):
        place = folder / str(number)
        place.mkdir()
        _let_the_hour_pass(say)
        with RedisServer(given.server) as server:
            yield table(place, server, peer, keyed=given.keyed, rounds=given.rounds, turn_s=given.turn)
    _let_the_hour_pass(say)
    yield sql_table(folder, rounds=given.rounds, turn_s=given.turn)
    yield from token_tables(rounds=given.rounds, turn_s=given.turn)
    yield from payload_tables(rounds=given.rounds, turn_s=given.turn)
    yield reconciliation_table(folder, rounds=given.rounds)


def _let_the_hour_pass(say: Callable[[str], None]) -> None:
    """What the floors recorded is good for one hour."""
    left_s = 3600 - time.time() % 3600
    if left_s < LONGEST_TABLE_S:
        say(f"waiting {left_s:.0f} s for a full hour\n")
        time.sleep(left_s + 0.1)


def _machine(folder: Path, flavour: str) -> dict[str, str]:
    with RedisServer(flavour) as server, server.client() as client:
        info = client.info("server")
    return {
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, client and server on it; "
        f"load {os.getloadavg()[0]:.1f} before",
        "python": f"{platform.python_version()}, redis-py {version('redis')}, hiredis {version('hiredis')}",
        "redis": f"{info.get('server_name', 'redis')} {info.get('valkey_version', info['redis_version'])} ({flavour}), "
        "append-only file off",
        "sqlite": f"{sqlite3.sqlite_version}; 4 KB written and synced to this disk in {_sync_us(folder):.0f} us",
    }


def _sync_us(folder: Path) -> float:
    with NamedTemporaryFile(dir=folder) as file:
        times = []
        for _ in range(50):
            os.pwrite(file.fileno(), b"\0" * 4096, 0)
            start = time.perf_counter()
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2] * 1e6


if __name__ == "__main__":
    main()
