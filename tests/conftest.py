"""Every test runs in a folder of its own, without settings, in a time zone that is far from UTC."""

from __future__ import annotations

import os
import shutil
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

from metering.ledger import Ledger
from metering.meter import Meter
from metering.providers import PROVIDERS
from metering.providers.registry import PROBE_RULES
from tests.servers import PostgresServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

os.environ["TZ"] = "Pacific/Auckland"
time.tzset()

settings.register_profile("tests", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("tests")


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self, now: datetime) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now

    def advance(self, **by: float) -> datetime:
        """Move on by a timedelta of these arguments."""
        self.now += timedelta(**by)
        return self.now


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("METERING_")]:
        monkeypatch.delenv(name)
    rules = PROBE_RULES.values()
    for variable in (
        *(provider.key_variable for provider in PROVIDERS.values()),
        *(rule.key_variable for rule in rules),
        *(rule.url_variable for rule in rules),
    ):
        if variable is not None:
            monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def clock() -> Clock:
    """Thursday, 2026-03-12 at noon UTC."""
    return Clock(datetime(2026, 3, 12, 12, tzinfo=UTC))


@pytest.fixture(scope="session")
def empty_ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated ledger without a row: copying it is a hundred times faster than migrating."""
    path = tmp_path_factory.mktemp("empty") / "ledger.db"
    Ledger(f"sqlite:///{path}", create=True).close()
    return path


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A server for ledgers that nothing is pulled from under."""
    with PostgresServer(fsync=False) as server:
        yield server


@pytest.fixture(scope="session")
def empty_postgres(postgres: PostgresServer) -> str:
    """The URL of a migrated ledger without a row, to be copied: nobody may be connected to it."""
    url = postgres.database()
    Ledger(url, create=True).close()
    return url


@pytest.fixture
def sqlite_url(tmp_path: Path, empty_ledger: Path) -> str:
    """The URL of a new, migrated ledger in a file."""
    shutil.copy(empty_ledger, tmp_path / "ledger.db")
    return f"sqlite:///{tmp_path / 'ledger.db'}"


@pytest.fixture
def postgres_url(postgres: PostgresServer, empty_postgres: str) -> Iterator[str]:
    """The URL of a new, migrated ledger on Postgres."""
    url = postgres.database(like=empty_postgres)
    yield url
    postgres.drop(url)


@pytest.fixture
def ledger_url(sqlite_url: str) -> str:
    """The URL of a new, migrated ledger. Modules that are about both databases have a `ledger_url` of their own."""
    return sqlite_url


@pytest.fixture(params=["sqlite", "postgres"])
def either_url(request: pytest.FixtureRequest) -> str:
    """The URL of a new, migrated ledger: once in a file, once on Postgres."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture
def open_meter(ledger_url: str, clock: Clock) -> Iterator[Callable[..., Meter]]:
    """Opens meters on the test's ledger; all are closed at its end."""
    opened: list[Meter] = []

    def open_one(**options: Any) -> Meter:
        opened.append(Meter(ledger_url, **{"clock": clock, "strict_signals": True, **options}))
        return opened[-1]

    yield open_one
    for meter in opened:
        meter.close()


@pytest.fixture
def meter(open_meter: Callable[..., Meter]) -> Meter:
    """A meter on the test's ledger and clock."""
    return open_meter()
