"""The app that learns: each endpoint for each who calls, with results and without, and with a store that is down."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from fastapi import HTTPException, Request

from examples.learning_app import PLAN, SHELVES, Library, create_app
from metering import AsyncMeter, Meter
from metering.integrations.fastapi import billing_gate, caller_type
from tests.integrations.conftest import in_thread
from tests.servers import DEADLINE_S

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from fastapi import FastAPI

SOON_S = 0.5
"""Before a call gives up on a ledger that somebody holds."""
SEARCHES = [f"/search/{shelf}" for shelf in (*SHELVES, "conversations")]
ENDPOINTS = [*SEARCHES, "/publish"]
TEXT = "I am Ada. I prefer tea. Always be brief. That was wrong"
LEARNT = 4
ACCOUNT = "acme"


class Shop:
    """An app under test, a client of it, and its ledger from outside."""

    def __init__(self, app: FastAPI, client: httpx.AsyncClient, meter: Meter, secret: str) -> None:
        self.app, self.client, self.meter, self.secret = app, client, meter, secret

    async def ask(self, path: str, *, found: bool = True, key: bool = False, **headers: str) -> httpx.Response:
        """Call an endpoint in a way that brings something, or not."""
        who = {"x-api-key": self.secret} if key else {"x-account": ACCOUNT}
        headers = who | {name.replace("_", "-"): value for name, value in headers.items()}
        if path == "/publish":
            return await self.client.post(path, json={"text": TEXT if found else "Hello"}, headers=headers)
        return await self.client.get(path, params={"q": "" if found else "nowhere"}, headers=headers)

    def events(self, *columns: str, line: str | None = None) -> list[tuple[Any, ...]]:
        """What was recorded, but for the calls that were admitted; or what is on a line."""
        which = "line <> 'calls'" if line is None else f"line = '{line}'"
        with self.meter.ledger.read() as connection:
            rows = connection.exec_driver_sql(f"SELECT {', '.join(columns)} FROM events WHERE {which} ORDER BY seq")
            return [tuple(row) for row in rows]

    def signals(self) -> list[tuple[str, int, str, bool]]:
        rows = self.events("line", "quantity", "caller_type", "billable")
        return [(line, int(quantity), caller, bool(billable)) for line, quantity, caller, billable in rows]


@pytest.fixture
def opened(open_meter: Callable[..., Meter], ledger_url: str, clock: Any) -> Callable[..., Any]:
    """Opens an app whose account has something on each shelf."""
    meter = open_meter()
    meter.apply_plans([PLAN])
    secret = meter.keys.create(ACCOUNT, plan=PLAN.name).secret

    @asynccontextmanager
    async def open_app(timeout_s: float = DEADLINE_S, **seams: Any) -> AsyncIterator[Shop]:
        app = create_app(**seams)
        for shelf in (*SHELVES, "conversations"):
            for number in range(2):
                await app.state.library.add(ACCOUNT, shelf, f"{shelf} {number}")
        transport = httpx.ASGITransport(app)
        async with (
            AsyncMeter(ledger_url, clock=clock, strict_signals=True, timeout_s=timeout_s) as app.state.meter,
            httpx.AsyncClient(transport=transport, base_url="http://app", timeout=DEADLINE_S) as client,
        ):
            yield Shop(app, client, meter, secret)

    return open_app


def in_time(test: Coroutine[Any, Any, None]) -> None:
    async def run() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await test

    asyncio.run(run())


def sold(path: str) -> tuple[str, int]:
    """What a call that brings something is sold as."""
    return ("learnings_generated", LEARNT) if path == "/publish" else ("application", 2)


async def dashboard(request: Request) -> str:
    return "dashboard"


# Who calls


@pytest.mark.parametrize("who", ["key", "key with seam", "default", "seam", "seam, blocking", "override"])
@pytest.mark.parametrize("path", ENDPOINTS)
def test_who_calls_decides_what_is_billed(opened: Callable[..., Any], path: str, who: str) -> None:
    seam = {"key with seam": dashboard, "seam": dashboard, "seam, blocking": lambda request: "dashboard"}.get(who)
    key = who.startswith("key")
    caller = "production_agent" if key else "internal" if who == "default" else "dashboard"

    async def test() -> None:
        async with opened(get_caller_type=seam) as shop:
            if who == "override":
                shop.app.dependency_overrides[caller_type] = lambda: "dashboard"
            nothing = await shop.ask(path, found=False, key=key)
            assert nothing.status_code == 200
            assert nothing.json().get("results", []) == []
            assert shop.signals() == []
            something = await shop.ask(path, key=key)
            assert something.status_code == 200
            assert shop.signals() == [(*sold(path), caller, key)]
            assert [event[0] for event in shop.events("caller_type", line="calls")] == ["production_agent"] * 2 * key
            assert ("ratelimit" in something.headers) is key

    in_time(test())


def test_the_answer_is_the_same_for_everyone(opened: Callable[..., Any]) -> None:
    async def test() -> None:
        bodies: list[list[Any]] = []
        for key in (True, False):
            async with opened() as shop:
                bodies.append([(await shop.ask(path, key=key)).json() for path in ENDPOINTS])
        assert bodies[0] == bodies[1]
        assert bodies[0][:2] == [{"results": ["rules 0", "rules 1"]}, {"results": ["preferences 0", "preferences 1"]}]
        assert bodies[0][-1]["learnings"] == LEARNT
        assert bodies[0][-1]["tokens"] > LEARNT

    in_time(test())


def test_what_was_published_is_found(opened: Callable[..., Any]) -> None:
    async def test() -> None:
        async with opened() as shop:
            await shop.ask("/publish", key=True)
            found = [
                (await shop.client.get(path, params={"q": "tea"}, headers={"x-api-key": shop.secret})).json()["results"]
                for path in SEARCHES
            ]
            assert found == [[], ["I prefer tea"], [], [], [TEXT]]
            elsewhere = await shop.client.get(SEARCHES[0], headers={"x-account": "another"})
            assert elsewhere.json() == {"results": []}
            assert [signal[:2] for signal in shop.signals()] == [
                ("learnings_generated", LEARNT),
                *[("application", 1)] * 2,
            ]

    in_time(test())


def test_who_may_not_call(opened: Callable[..., Any]) -> None:
    def closed(request: Request) -> str:
        raise HTTPException(403, "only from inside")

    async def test() -> None:
        async with opened(get_caller_type=closed) as shop:
            assert [(await shop.ask(path)).status_code for path in ENDPOINTS] == [403] * 6
        async with opened() as shop:
            shop.secret = "k" * 40
            assert [(await shop.ask(path, key=True)).status_code for path in ENDPOINTS] == [403] * 6
            both = [(await shop.ask(path, key=True, x_account=ACCOUNT)).status_code for path in ENDPOINTS]
            assert both == [403] * 6, "a key is never passed over"
            nobody = [await shop.client.get(path) for path in SEARCHES] + [
                await shop.client.post("/publish", json={"text": TEXT})
            ]
            assert [answer.status_code for answer in nobody] == [401] * 6
        assert shop.signals() == shop.events("line", line="calls") == []

    in_time(test())


@pytest.mark.parametrize("overridden", [False, True])
@pytest.mark.parametrize("line", ["application", "learnings_generated"])
def test_a_gate_refuses_before_anything_is_done(opened: Callable[..., Any], line: str, overridden: bool) -> None:
    def refuse() -> None:
        raise HTTPException(402, "prepay")

    def gate(asked: str) -> Callable[[Request], None]:
        return lambda request: refuse() if asked == line else None

    async def test() -> None:
        async with opened(get_billing_gate=None if overridden else gate) as shop:
            if overridden:
                shop.app.dependency_overrides[billing_gate(line)] = refuse
            for key in (True, False):
                answers = {path: (await shop.ask(path, key=key)).status_code for path in ENDPOINTS}
                assert answers == {path: 402 if sold(path)[0] == line else 200 for path in ENDPOINTS}
            assert {signal[0] for signal in shop.signals()} == {sold(path)[0] for path in ENDPOINTS} - {line}
            assert len(shop.events("line", line="calls")) == sum(sold(path)[0] != line for path in ENDPOINTS)

    in_time(test())


# What a signal says


@pytest.mark.parametrize("key", [True, False])
def test_a_signal_says_what_it_belongs_to(opened: Callable[..., Any], key: bool) -> None:
    async def test() -> None:
        async with opened() as shop:
            expected = []
            for path in ENDPOINTS:
                shop.app.state.llm.clear()
                await shop.ask(path, key=key, x_request_id="req-1", x_session_id="s-1")
                shop.app.state.llm[ACCOUNT] = {"llm": {"api_key": "sk-1"}}
                await shop.ask(path, key=key, x_request_id="x" * 300, x_session_id="s-1")
                operation = path.removeprefix("/").replace("/", " ")
                expected += [(operation, ACCOUNT, "req-1", "s-1", 1), (operation, ACCOUNT, None, "s-1", 0)]
            assert shop.events("operation", "account", "request_id", "session_id", "platform_paid") == expected

    in_time(test())


@pytest.mark.parametrize("key", [True, False])
def test_a_retried_call_bills_once(opened: Callable[..., Any], key: bool) -> None:
    async def test() -> None:
        async with opened() as shop:
            for path in ENDPOINTS:
                before = len(shop.signals())
                answers = [await shop.ask(path, key=key, idempotency_key=f"1 {path}") for _ in range(3)]
                assert {(answer.status_code, answer.text) for answer in answers} == {(200, answers[0].text)}
                assert [signal[:2] for signal in shop.signals()[before:]] == [sold(path)]
                await shop.ask(path, key=key, idempotency_key=f"2 {path}")
                assert len(shop.signals()) == before + 2

    in_time(test())


def test_a_call_that_failed_after_its_signal_bills_once(opened: Callable[..., Any]) -> None:
    """The response is lost after the signal was recorded: the caller's retry runs it all again."""

    async def test() -> None:
        async with opened() as shop:

            async def lossy(scope: Any, receive: Any, send: Any) -> None:
                async def lost(message: Any) -> None:
                    raise ConnectionError

                await whole(scope, receive, lost)

            whole = shop.app.router.middleware_stack
            shop.app.router.middleware_stack = lossy
            with pytest.raises(ConnectionError):
                await shop.ask("/publish", key=True, idempotency_key="job-1")
            assert [signal[:2] for signal in shop.signals()] == [("learnings_generated", LEARNT)]
            shop.app.router.middleware_stack = whole
            assert (await shop.ask("/publish", key=True, idempotency_key="job-1")).status_code == 200
            assert [signal[:2] for signal in shop.signals()] == [("learnings_generated", LEARNT)]

    in_time(test())


def test_an_operation_that_fails_records_nothing(opened: Callable[..., Any]) -> None:
    class Broken(Library):
        async def add(self, account: str, shelf: str, text: str) -> None:
            raise HTTPException(502, "no library")

        async def search(self, account: str, shelf: str, words: str, limit: int) -> list[str]:
            raise HTTPException(502, "no library")

    async def test() -> None:
        async with opened() as shop:
            shop.app.state.library = Broken()
            for key in (True, False):
                assert [(await shop.ask(path, key=key)).status_code for path in ENDPOINTS] == [502] * 6
            assert shop.signals() == shop.events("line", line="calls") == []

    in_time(test())


# Limits


def test_the_121st_call_of_a_minute_is_refused(opened: Callable[..., Any], clock: Any) -> None:
    async def test() -> None:
        async with opened() as shop:
            for number in range(120):
                path = ENDPOINTS[number % len(ENDPOINTS)]
                assert (await shop.ask(path, found=number % 2 == 0, key=True)).status_code == 200
            recorded = shop.signals()
            for path in ENDPOINTS:
                refused = await shop.ask(path, key=True)
                assert refused.status_code == 429
                assert refused.headers["content-type"] == "application/problem+json"
                assert refused.headers["retry-after"] == "1"
            assert shop.signals() == recorded, "what is refused brings nothing"
            assert len(shop.events("line", line="calls")) == 120
            for path in ENDPOINTS:
                assert (await shop.ask(path)).status_code == 200, "one of our own is not limited"
            clock.advance(seconds=1)
            after = [(await shop.ask(SEARCHES[0], key=True)).status_code for _ in range(3)]
            assert after == [200, 200, 429], "120 a minute are two a second"

    in_time(test())


# The store is down


class Locking(Library):
    """A library that is searched or added to just when the ledger goes down."""

    def __init__(self, library: Library, lock: Callable[[], None]) -> None:
        self._texts = library._texts
        self._lock = lock

    async def add(self, account: str, shelf: str, text: str) -> None:
        self._lock()
        await super().add(account, shelf, text)

    async def search(self, account: str, shelf: str, words: str, limit: int) -> list[str]:
        self._lock()
        return await super().search(account, shelf, words, limit)


@pytest.mark.parametrize("key", [True, False])
@pytest.mark.parametrize("path", ENDPOINTS)
def test_a_store_that_goes_down_leaves_the_answer_as_it_is(opened: Callable[..., Any], path: str, key: bool) -> None:
    async def test() -> None:
        async with opened(timeout_s=SOON_S) as shop:
            up, nothing = await shop.ask(path, key=key), await shop.ask(path, found=False)
            with Lock(shop.meter) as lock:
                shop.app.state.library = Locking(shop.app.state.library, lock.take)
                down = await shop.ask(path, key=key)
                assert (down.status_code, down.content) == (200, up.content)
                assert (await shop.ask(path, found=False)).content == nothing.content
                refused = await shop.ask(path, key=True)
                assert refused.status_code == 503, "where limits decide, nothing passes unseen"
            await shop.app.state.meter.flush()
            caller = "production_agent" if key else "internal"
            assert shop.signals() == [(*sold(path), caller, key)] * 2, "and nothing is lost"
            assert len(shop.events("line", line="calls")) == 2 * key

    in_time(test())


class Lock:
    """Holds the ledger's only write lock from `take` until the block ends."""

    def __init__(self, meter: Meter) -> None:
        self._ledger = meter.ledger
        self._held: Any = None

    def take(self) -> None:
        if self._held is None:
            held = self._ledger.write()
            held.__enter__()
            self._held = held

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        if self._held is not None:
            self._held.__exit__(None, None, None)


def test_without_a_meter_only_keys_are_refused(opened: Callable[..., Any]) -> None:
    async def test() -> None:
        async with opened() as up, opened() as down:
            down.app.state.meter = None
            for path in ENDPOINTS:
                assert (await down.ask(path, key=True)).status_code == 503
                assert (await down.ask(path)).content == (await up.ask(path)).content
            assert len(up.signals()) == len(ENDPOINTS)

    in_time(test())


def test_a_caller_type_that_is_none_costs_the_signal_alone(
    opened: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with opened(get_caller_type=lambda request: "robot") as shop:
            assert [(await shop.ask(path)).status_code for path in ENDPOINTS] == [200] * 6
            assert shop.signals() == []

    in_time(test())
    assert caplog.text.count("could not record its signal") == 6


# As its first lines say to run it


def test_on_a_server(monkeypatch: pytest.MonkeyPatch, ledger_url: str) -> None:
    monkeypatch.setenv("METERING_LEDGER_URL", ledger_url)
    with (
        in_thread(create_app()) as url,
        Meter.from_env() as meter,
        httpx.Client(base_url=url, timeout=DEADLINE_S) as client,
    ):
        client.headers["x-api-key"] = meter.keys.create(ACCOUNT, plan="learning").secret
        assert client.post("/publish", json={"text": TEXT}).json()["learnings"] == LEARNT
        assert client.get("/search/preferences", params={"q": "tea"}).json() == {"results": ["I prefer tea"]}
        assert client.get("/search/preferences", params={"q": "gin"}).json() == {"results": []}
        assert client.get("/search/rules", params={"limit": 0}).status_code == 422
        paths = client.get("/openapi.json").json()["paths"]
        assert sorted(paths) == sorted(ENDPOINTS)
        totals = {total.group: (total.requests, total.quantity) for total in meter.usage(ACCOUNT, by="line")}
        assert totals == {"application": (1, 1), "learnings_generated": (1, LEARNT), "calls": (3, 0)}
