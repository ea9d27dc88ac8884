"""Apps on real servers: in a thread of the test, or in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import uvicorn

from metering import AsyncMeter, Limit, Meter, Plan
from metering.billing.pricing import Rate
from tests.servers import DEADLINE_S, HOST, free_port, wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

ROOT = Path(__file__).parents[2]

PLANS = (
    Plan(name="open", retention_days=30),
    Plan(name="three", retention_days=30, limits=(Limit(metric="requests", per="day", max=3),)),
    Plan(name="hundred", retention_days=30, limits=(Limit(metric="requests", per="month", max=100),)),
    Plan(name="tokens", retention_days=30, limits=(Limit(metric="tokens", per="day", max=1_000),)),
    Plan(name="quick", retention_days=30, limits=(Limit(metric="requests", rate="60/minute", burst=2),)),
    Plan(
        name="priced",
        retention_days=30,
        rates=(
            Rate.from_dict(
                {
                    "line": "application",
                    "metric": "output_tokens",
                    "type": "per_unit",
                    "unit_amount": "1",
                    "match": {"model": "m*"},
                }
            ),
        ),
    ),
)


class Books:
    """The ledger of a served app, from outside of the app."""

    def __init__(self, ledger_url: str, **options: Any) -> None:
        self.meter = Meter(ledger_url, strict_signals=True, **options)
        self.meter.apply_plans(PLANS)
        self._accounts = 0

    def key(self, plan: str) -> str:
        """The key of a new account."""
        self._accounts += 1
        return self.meter.keys.create(f"account-{plan}-{self._accounts}", plan=plan).secret

    def account(self, secret: str) -> str:
        return self.meter.keys.authenticate(secret).account

    def used(self, secret: str) -> Any:
        """What the only limit of the key's account counts."""
        return self.meter.quota(self.account(secret))[0].used

    def billed(self, secret: str) -> list[tuple[int, int, int, bool]]:
        """(input, output, quantity, estimated) of each of the account's events, the oldest first."""
        rows = self.query(
            "SELECT input_tokens, output_tokens, quantity, estimated FROM events WHERE account = ? AND billable"
            " ORDER BY seq",
            self.account(secret),
        )
        return [(row[0], row[1], int(row[2]), bool(row[3])) for row in rows]

    def query(self, query: str, *values: object) -> list[Any]:
        with self.meter.ledger.read() as connection:
            return [tuple(row) for row in connection.exec_driver_sql(query, values).all()]

    def open_holds(self, secret: str) -> int:
        return len(self.query("SELECT 1 FROM holds WHERE state = 'open' AND account = ?", self.account(secret)))


def with_meter(ledger_url: str, **options: Any) -> Any:
    """The lifespan of an app that opens its meter when it starts, on its own event loop, and closes it in the end."""

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        async with AsyncMeter(ledger_url, **options) as meter:
            app.state.meter = meter
            yield

    return lifespan


@contextmanager
def in_thread(app: Any) -> Iterator[str]:
    """The URL of an app on a real server, which runs in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, host=HOST, port=0, log_config=None, lifespan="on"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive(), "the server")
        assert server.started
        yield f"http://{HOST}:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(DEADLINE_S)
        assert not thread.is_alive()


@contextmanager
def in_processes(app: str, *, workers: int = 1, folder: Path, **environ: str) -> Iterator[tuple[str, int]]:
    """The URL of an app on a real server in a process group of its own, and the group's id."""
    port = free_port()
    log = folder / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", app, "--host", HOST, "--port", str(port), "--workers", str(workers)],
            cwd=ROOT,
            env=os.environ | environ,
            stdout=out,
            stderr=out,
            process_group=0,
        )
    url = f"http://{HOST}:{port}"
    try:
        wait_until(lambda: process.poll() is not None or answers(url), f"uvicorn: {log.read_text()}")
        assert process.poll() is None, log.read_text()
        yield url, process.pid
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(DEADLINE_S)
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=DEADLINE_S).status_code < 500
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=DEADLINE_S) as client:
        yield client
