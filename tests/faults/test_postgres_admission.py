"""Hard quotas on Postgres: many processes and accounts, a server that is killed, and commits whose answer is lost."""

from __future__ import annotations

import multiprocessing
import os
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from metering.admission.verify import check_counters
from metering.errors import StoreUnavailable
from metering.events import TokenUsage
from metering.ledger.postgres_driver import PostgresDriver, _PostgresTransaction
from metering.meter import Meter
from metering.plans import Limit, Plan
from tests.proxy import Proxy
from tests.servers import PostgresServer

if TYPE_CHECKING:
    from collections.abc import Iterator

ROUNDS = int(os.environ.get("TALLYSTICK_FAULT_ROUNDS", "2"))
PROCESSES = 4
THREADS = 4
ACCOUNTS = [f"account-{number}" for number in range(5)]
DEADLINE_S = 60.0
USAGE = TokenUsage(input_tokens=3)
PLAN = Plan(
    name="p",
    retention_days=30,
    limits=(
        Limit(metric="requests", per="month", max=90),
        Limit(metric="tokens", per="day", max=3_000),
        Limit(metric="requests", per="month", scope="key", max=100),
    ),
)

spawn = multiprocessing.get_context("spawn")


def opened(url: str, **options: Any) -> Meter:
    return Meter(url, **{"timeout_s": DEADLINE_S, **options})


def prepared(meter: Meter) -> list[str]:
    meter.apply_plans([PLAN])
    return [meter.keys.create(account, plan="p").secret for account in ACCOUNTS]


def assert_sound(meter: Meter) -> None:
    assert [check for check in check_counters(meter.ledger) if not check.agrees] == []
    with meter.ledger.read() as connection:
        twice = "SELECT count(*) FROM (SELECT event_id FROM events GROUP BY event_id HAVING count(*) > 1) AS twice"
        assert connection.exec_driver_sql(twice).scalar() == 0


def events(meter: Meter) -> Counter[str]:
    with meter.ledger.read() as connection:
        found = connection.exec_driver_sql("SELECT account, count(*) FROM events GROUP BY account").all()
    return Counter(dict(map(tuple, found)))


def consume_at_random(answers: Any, go: Any, seed: int, url: str, secrets: list[str]) -> None:
    def consume(chance: random.Random) -> Counter[str]:
        admitted: Counter[str] = Counter()
        for secret in chance.choices(secrets, k=40):
            decision = meter.consume(secret, line=chance.choice("ab"), usage=USAGE)
            admitted[decision.account] += decision.allowed
        return admitted

    with opened(url) as meter, ThreadPoolExecutor(THREADS) as threads:
        go.wait(DEADLINE_S)
        done = threads.map(consume, [random.Random(seed * THREADS + thread) for thread in range(THREADS)])
        answers.put(sum(done, Counter()))


def test_processes_and_accounts_in_any_order_admit_exactly_the_limits(postgres_url: str) -> None:
    with opened(postgres_url) as meter:
        secrets = prepared(meter)
        answers, go = spawn.SimpleQueue(), spawn.Barrier(PROCESSES)
        running = [
            spawn.Process(target=consume_at_random, args=(answers, go, seed, postgres_url, secrets), daemon=True)
            for seed in range(PROCESSES)
        ]
        for process in running:
            process.start()
        for process in running:
            process.join(DEADLINE_S)
        assert [process.exitcode for process in running] == [0] * PROCESSES
        admitted: Counter[str] = sum((answers.get() for _ in running), Counter())
        assert events(meter) == admitted
        # 640 calls at random: each of the five accounts is asked more often than it may.
        assert admitted == dict.fromkeys(ACCOUNTS, 90)
        assert_sound(meter)


@pytest.fixture
def proxied(postgres: PostgresServer, postgres_url: str) -> Iterator[tuple[Proxy, str]]:
    """A proxy before the server, and the ledger's URL through it."""
    with Proxy(postgres.port) as proxy:
        yield proxy, postgres_url.replace(f":{postgres.port}/", f":{proxy.port}/")


@pytest.mark.parametrize("silent", [0.0, 1.0], ids=["cut", "silent"])
def test_a_commit_whose_answer_is_lost_is_asked_after(
    proxied: tuple[Proxy, str], postgres_url: str, monkeypatch: pytest.MonkeyPatch, silent: float
) -> None:
    proxy, url = proxied
    execute = _PostgresTransaction.execute

    def losing(self: _PostgresTransaction, query: Any, *more: Any, **options: Any) -> Any:
        if query == "COMMIT":
            proxy.silent, proxy.drop_next = silent, 1
        return execute(self, query, *more, **options)

    with opened(url, timeout_s=2) as meter, opened(postgres_url) as looking:
        secret = prepared(meter)[0]
        assert meter.consume(secret, line="a", usage=USAGE).allowed
        with monkeypatch.context() as patch:
            patch.setattr(_PostgresTransaction, "execute", losing)
            assert meter.consume(secret, line="a", usage=USAGE).allowed
        assert meter.consume(secret, line="a", usage=USAGE).allowed
        assert events(looking) == {ACCOUNTS[0]: 3}
        assert_sound(looking)


def test_a_transaction_that_was_cut_off_is_not_there(
    proxied: tuple[Proxy, str], postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, url = proxied
    lock = PostgresDriver.lock

    def losing(self: PostgresDriver, transaction: Any, works: Any) -> None:
        lock(self, transaction, works)
        proxy.silent, proxy.drop_next = 0.0, 1

    with opened(url, timeout_s=2) as meter, opened(postgres_url) as looking:
        secret = prepared(meter)[0]
        assert meter.consume(secret, line="a", usage=USAGE).allowed
        with monkeypatch.context() as patch:
            patch.setattr(PostgresDriver, "lock", losing)
            with pytest.raises(StoreUnavailable):
                meter.consume(secret, line="a", usage=USAGE)
        assert meter.consume(secret, line="a", usage=USAGE).allowed
        assert events(looking) == {ACCOUNTS[0]: 2}
        assert_sound(looking)


class App:
    """Threads that consume, each call under a key of its own until it is answered, while the server is killed."""

    def __init__(self, meter: Meter, secrets: list[str]) -> None:
        self._meter = meter
        self._secrets = secrets
        self._over = threading.Event()
        self.answered: Counter[str] = Counter()
        self.keys = 0
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(seed,), daemon=True) for seed in range(THREADS)]

    def __enter__(self) -> App:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(DEADLINE_S)
        assert not any(thread.is_alive() for thread in self._threads)

    def _run(self, seed: int) -> None:
        chance = random.Random(seed)
        while not self._over.is_set():
            key, secret = f"{seed}-{chance.random()}", chance.choice(self._secrets)
            decision = self._answered(secret, key)
            with self._lock:
                self.answered[decision.account] += decision.allowed

    def _answered(self, secret: str, key: str) -> Any:
        deadline = time.monotonic() + DEADLINE_S
        while True:
            try:
                return self._meter.consume(secret, line="a", idempotency_key=key, usage=TokenUsage())
            except StoreUnavailable:
                assert time.monotonic() < deadline


def test_a_server_that_is_killed_keeps_what_was_answered_and_nothing_twice() -> None:
    chance = random.Random(7)
    with PostgresServer() as server, opened(server.database(), create=True, timeout_s=5) as meter:
        meter.apply_plans(
            [Plan(name="p", retention_days=30, limits=(Limit(metric="requests", per="month", max=10**9),))]
        )
        secrets = [meter.keys.create(account, plan="p").secret for account in ACCOUNTS]
        with App(meter, secrets) as app:
            for _ in range(ROUNDS):
                before = sum(app.answered.values())
                more = chance.randrange(1, 60)
                wait_for(lambda before=before, more=more: sum(app.answered.values()) >= before + more)
                server.kill()
                server.start()
        assert events(meter) == app.answered
        assert_sound(meter)


def wait_for(there: Any) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not there():
        assert time.monotonic() < deadline
        threading.Event().wait(0.001)
