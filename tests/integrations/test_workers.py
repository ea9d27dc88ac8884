"""Servers of several processes, and servers that are killed."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.integrations.conftest import Books, in_processes
from tests.servers import DEADLINE_S, RedisServer, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

APP = "tests.integrations.worker_app:app"


class Site:
    def __init__(self, url: str, books: Books, ran: Path) -> None:
        self.url, self.books = url, books
        self._ran = ran
        self._before = 0

    def begin(self) -> None:
        self._before = self._lines()

    @property
    def runs(self) -> int:
        """How often the endpoint's body ran since `begin`, in whatever process."""
        return self._lines() - self._before

    def _lines(self) -> int:
        return self._ran.read_text().count("\n") if self._ran.exists() else 0


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, empty_ledger: Path) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    path, ran = folder / "ledger.db", folder / "ran"
    path.write_bytes(empty_ledger.read_bytes())
    books = Books(f"sqlite:///{path}")
    environ = {
        "METERING_LEDGER_URL": f"sqlite:///{path}",
        "METERING_HOME": str(folder),
        "METERING_TIMEOUT_MS": "20000",
        "RAN": str(ran),
    }
    with in_processes(APP, workers=2, folder=folder, **environ) as (url, _):
        seen: set[int] = set()
        wait_until(lambda: seen.add(httpx.get(f"{url}/who").json()) or len(seen) == 2, "both workers")  # type: ignore[func-returns-value]
        yield Site(url, books, ran)
    books.meter.close()


async def posts(url: str, count: int, headers: dict[str, str]) -> list[httpx.Response]:
    limits = httpx.Limits(max_connections=count, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=60, limits=limits) as client:
        return await asyncio.gather(*(client.post(f"{url}/run", headers=headers) for _ in range(count)))


def test_two_workers_admit_exactly_the_limit(site: Site) -> None:
    secret = site.books.key("hundred")
    site.begin()
    answers = asyncio.run(posts(site.url, 500, {"authorization": f"Bearer {secret}"}))
    assert Counter(answer.status_code for answer in answers) == {200: 100, 429: 400}
    assert site.runs == 100
    assert site.books.used(secret) == len(site.books.billed(secret)) == 100


def test_one_idempotency_key_runs_once_and_answers_alike(site: Site) -> None:
    secret = site.books.key("hundred")
    site.begin()
    headers = {"authorization": f"Bearer {secret}", "idempotency-key": "one"}

    async def crowd() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=50)) as client:

            async def until_answered() -> httpx.Response:
                while True:
                    answer = await client.post(f"{site.url}/run", headers=headers)
                    if answer.status_code != 409:
                        return answer
                    assert answer.headers["retry-after"] == "1"
                    assert answer.json()["type"] == "urn:tallystick:idempotency-in-progress"
                    await asyncio.sleep(0.02)

            return await asyncio.gather(*(until_answered() for _ in range(50)))

    answers = asyncio.run(asyncio.wait_for(crowd(), 60))
    assert site.runs == 1
    assert len({(answer.status_code, answer.content, answer.headers["content-type"]) for answer in answers}) == 1
    assert Counter(answer.headers.get("idempotent-replayed") for answer in answers) == {None: 1, "true": 49}
    assert site.books.used(secret) == len(site.books.billed(secret)) == 1


@pytest.mark.parametrize("quotas", ["sqlite", "redis"])
def test_a_worker_killed_in_the_middle_of_a_stream_gives_its_quota_back(
    ledger_url: str, tmp_path: Path, quotas: str
) -> None:
    with RedisServer() if quotas == "redis" else nullcontext() as server:
        options: dict[str, Any] = {} if server is None else {"quota_url": server.url, "spool": tmp_path / "spool"}
        environ = {} if server is None else {"METERING_QUOTA_URL": server.url, "METERING_TIMEOUT_MS": "20000"}
        environ |= {"METERING_LEDGER_URL": ledger_url, "METERING_HOME": str(tmp_path), "RAN": str(tmp_path / "ran")}
        books = Books(ledger_url, **options)
        secret = books.key("tokens")
        headers = {"x-api-key": secret, "idempotency-key": "killed"}
        with in_processes(APP, folder=tmp_path, **environ) as (url, pid):
            with httpx.stream("POST", f"{url}/endless", headers=headers, timeout=DEADLINE_S) as response:
                parts = response.iter_text()
                assert next(parts) == "word"
                assert books.used(secret) == 60
                os.kill(pid, signal.SIGKILL)
                with pytest.raises(httpx.TransportError):
                    list(parts)
            later = datetime.now(UTC) + timedelta(minutes=20)
            assert books.meter._store.expire(later) == 1
            assert (books.used(secret), books.billed(secret)) == (0, [])
        books.meter.close()
