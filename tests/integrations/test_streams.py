"""Streams are billed for what was produced, whoever leaves when, and whatever becomes of the store."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import httpx
import pytest
from fastapi import Depends, FastAPI, Request
from fastapi.responses import StreamingResponse
from fastapi.sse import EventSourceResponse

from metering import TokenUsage
from metering.admission.redis.link import Link
from metering.drain import Drain
from metering.integrations import asgi
from metering.integrations.fastapi import RequestHold, install, quota
from tests.integrations.conftest import Books, in_thread, with_meter
from tests.servers import DEADLINE_S, RedisServer, wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

ESTIMATE = TokenUsage(input_tokens=10, output_tokens=500)
REAL = TokenUsage(input_tokens=9, output_tokens=4)

Guessed = Annotated[RequestHold, Depends(quota("application", estimate=ESTIMATE))]
Known = Annotated[RequestHold, Depends(quota("application"))]


def words(text: str) -> int:
    return len(text.split())


class Pause:
    """Where the stream under test waits until the test lets it go on."""

    def __init__(self) -> None:
        self.reached, self.go = threading.Event(), threading.Event()

    def reset(self) -> None:
        self.reached.clear()
        self.go.clear()

    def wait(self) -> None:
        self.reached.set()
        assert self.go.wait(DEADLINE_S)

    async def wait_async(self) -> None:
        self.reached.set()
        while not self.go.is_set():
            await asyncio.sleep(0.002)


def made(pause: Pause, ledger_url: str, **options: Any) -> FastAPI:  # noqa: C901  many endpoints
    app = FastAPI(lifespan=with_meter(ledger_url, **options))
    install(app, None)

    def streamed(content: Any, **options: Any) -> StreamingResponse:
        return StreamingResponse(content, media_type="text/plain", **options)

    @app.post("/settled")
    async def settled(hold: Guessed) -> StreamingResponse:
        async def tokens() -> AsyncIterator[str]:
            yield "one "
            await pause.wait_async()
            yield "two"
            hold.settle(REAL, model="m-1", provider="p")

        return streamed(tokens())

    @app.post("/counted")
    async def counted(hold: Guessed) -> StreamingResponse:
        async def tokens() -> AsyncIterator[str]:
            yield "one two three "
            await pause.wait_async()
            yield "four"

        return streamed(tokens())

    @app.post("/told")
    def told(hold: Guessed) -> StreamingResponse:
        def tokens() -> Iterator[str]:
            for text in ("one ", "two "):
                hold.produced(text)
                yield f'{{"much": "more", "text": "{text}"}}\n'
            pause.wait()
            yield "never counted"

        return streamed(tokens())

    @app.post("/settled-when-left")
    async def settled_when_left(hold: Guessed) -> StreamingResponse:
        async def tokens() -> AsyncIterator[str]:
            try:
                yield "one "
                await pause.wait_async()
            finally:
                hold.settle(REAL)

        return streamed(tokens())

    @app.post("/events", response_class=EventSourceResponse)
    async def events(hold: Guessed) -> AsyncIterator[str]:
        yield "a"
        yield "b"

    @app.post("/breaks/{after}")
    async def breaks(after: int, hold: Guessed) -> StreamingResponse:
        async def tokens() -> AsyncIterator[str]:
            for _ in range(after):
                yield "word "
            raise ZeroDivisionError

        return streamed(tokens())

    @app.post("/refused")
    async def refused(hold: Guessed) -> StreamingResponse:
        return streamed(iter(["no"]), status_code=502)

    @app.post("/known")
    async def known(hold: Known) -> StreamingResponse:
        return streamed(iter(["a", "b"]))

    @app.post("/long")
    async def long(hold: Guessed) -> StreamingResponse:
        return streamed("word " * 10_000 for _ in range(20))

    @app.post("/unpriced")
    async def unpriced(hold: Guessed) -> StreamingResponse:
        hold.settle(REAL)
        return streamed(iter(["a"]))

    return app


class Place:
    def __init__(self, url: str, books: Books, pause: Pause) -> None:
        self.url, self.books, self.pause = url, books, pause

    @contextmanager
    def stream(self, path: str, secret: str, **headers: str) -> Iterator[Iterator[str]]:
        headers["x-api-key"] = secret
        with httpx.stream("POST", f"{self.url}{path}", headers=headers, timeout=DEADLINE_S) as response:
            assert response.status_code == 200
            yield response.iter_text()

    def wait_for_bill(self, secret: str) -> list[Any]:
        wait_until(lambda: bool(self.books.billed(secret)), "the bill")
        return self.books.billed(secret)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, empty_ledger: Path) -> Iterator[Place]:
    path = tmp_path_factory.mktemp("streams") / "ledger.db"
    path.write_bytes(empty_ledger.read_bytes())
    books, pause = Books(f"sqlite:///{path}"), Pause()
    with in_thread(made(pause, f"sqlite:///{path}", timeout_s=0.2)) as url:
        yield Place(url, books, pause)
    books.meter.close()


@pytest.fixture(autouse=True)
def _counted_in_words(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi, "_tokens_of", words)
    place.pause.reset()


def test_a_stream_is_not_held_back_and_is_booked_before_its_end(place: Place) -> None:
    secret = place.books.key("tokens")
    with place.stream("/settled", secret) as parts:
        assert next(parts) == "one "
        assert (place.books.used(secret), place.books.billed(secret)) == (510, [])
        place.pause.go.set()
        assert "".join(parts) == "two"
        assert place.books.billed(secret) == [(9, 4, 0, False)]
    assert place.books.used(secret) == 13


def test_without_usage_what_was_sent_is_counted(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    secret = place.books.key("tokens")
    place.pause.go.set()
    with place.stream("/counted", secret) as parts:
        assert "".join(parts) == "one two three four"
    assert place.books.billed(secret) == [(10, 4, 0, True)]
    assert place.books.used(secret) == 14
    assert "was not settled: 4 tokens of output were counted" in caplog.text


def test_a_client_that_leaves_pays_for_what_was_produced(place: Place) -> None:
    secret = place.books.key("tokens")
    with place.stream("/counted", secret) as parts:
        assert next(parts) == "one two three "
    assert place.wait_for_bill(secret) == [(10, 3, 0, True)]
    assert (place.books.used(secret), place.books.open_holds(secret)) == (13, 0)


def test_a_client_that_leaves_an_app_with_a_middleware_around_it(ledger_url: str) -> None:
    books, pause = Books(ledger_url), Pause()
    app = made(pause, ledger_url)

    @app.middleware("http")
    async def around(request: Request, call_next: Any) -> Any:
        return await call_next(request)

    with in_thread(app) as url:
        place = Place(url, books, pause)
        secret = books.key("tokens")
        with place.stream("/counted", secret) as parts:
            assert next(parts) == "one two three "
        assert place.wait_for_bill(secret) == [(10, 3, 0, True)]
    books.meter.close()


def test_what_the_app_says_was_produced_is_counted_instead(place: Place) -> None:
    secret = place.books.key("tokens")
    with place.stream("/told", secret) as parts:
        next(parts)
        assert place.pause.reached.wait(DEADLINE_S)
    place.pause.go.set()
    assert place.wait_for_bill(secret) == [(10, 2, 0, True)]


def test_a_generator_that_settles_when_its_client_leaves_is_believed(place: Place) -> None:
    secret = place.books.key("tokens")
    with place.stream("/settled-when-left", secret) as parts:
        next(parts)
        assert place.pause.reached.wait(DEADLINE_S)
    assert place.wait_for_bill(secret) == [(9, 4, 0, False)]


def test_of_server_sent_events_the_data_is_counted(place: Place) -> None:
    secret = place.books.key("tokens")
    with place.stream("/events", secret) as parts:
        assert "".join(parts).count("data:") == 2
    assert place.books.billed(secret) == [(10, 2, 0, True)]


def test_a_stream_that_breaks_is_billed_as_far_as_it_came(place: Place) -> None:
    for after, billed in ((2, [(10, 2, 0, True)]), (0, [])):
        secret = place.books.key("tokens")
        with pytest.raises(httpx.RemoteProtocolError), place.stream(f"/breaks/{after}", secret) as parts:
            list(parts)
        wait_until(lambda secret=secret: not place.books.open_holds(secret), "the end of the hold")  # type: ignore[misc]
        assert place.books.billed(secret) == billed


def test_streams_that_owe_nothing_and_streams_of_a_known_cost(place: Place) -> None:
    secret = place.books.key("open")
    assert httpx.post(f"{place.url}/refused", headers={"x-api-key": secret}).status_code == 502
    assert place.books.billed(secret) == []
    with place.stream("/known", secret) as parts:
        assert "".join(parts) == "ab"
    assert place.books.billed(secret) == [(0, 0, 0, False)]


def test_a_long_stream_is_counted_in_proportion(place: Place) -> None:
    secret = place.books.key("open")
    with place.stream("/long", secret) as parts:
        assert sum(map(len, parts)) == 1_000_000
    [(_, output, _, estimated)] = place.books.billed(secret)
    assert estimated
    assert abs(output - 200_000) <= 5


def test_a_stream_that_cannot_be_priced_is_booked_as_estimated(place: Place) -> None:
    secret = place.books.key("priced")
    with place.stream("/unpriced", secret) as parts:
        assert "".join(parts) == "a"
    assert place.books.billed(secret) == [(9, 4, 0, True)]


def test_a_stream_is_not_replayed(place: Place) -> None:
    secret = place.books.key("open")
    place.pause.go.set()
    with place.stream("/settled", secret, **{"idempotency-key": "s"}) as parts:
        assert "".join(parts) == "one two"
    again = httpx.post(f"{place.url}/settled", headers={"x-api-key": secret, "idempotency-key": "s"})
    assert (again.status_code, again.json()["type"]) == (409, "urn:tallystick:response-not-kept")
    assert len(place.books.billed(secret)) == 1


def test_a_call_in_progress_says_when_to_ask_again(place: Place) -> None:
    secret = place.books.key("open")
    with place.stream("/settled", secret, **{"idempotency-key": "p"}) as parts:
        next(parts)
        busy = httpx.post(f"{place.url}/settled", headers={"x-api-key": secret, "idempotency-key": "p"})
        place.pause.go.set()
        list(parts)
    assert (busy.status_code, busy.headers["retry-after"]) == (409, "1")
    said = busy.json()
    assert (said["type"], said["retry_after_s"]) == ("urn:tallystick:idempotency-in-progress", 1)
    assert 0 < said["ends_within_s"] <= 900


def test_a_ledger_that_is_locked_at_the_end_of_a_stream(place: Place) -> None:
    secret = place.books.key("tokens")
    other = sqlite3.connect(place.books.meter.ledger.path, isolation_level=None)
    with place.stream("/settled", secret) as parts:
        next(parts)
        other.execute("BEGIN IMMEDIATE")
        refused = httpx.post(f"{place.url}/known", headers={"x-api-key": secret})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.headers["content-type"] == "application/problem+json"
        place.pause.go.set()
        assert "".join(parts) == "two", "the client is not told"
    other.rollback()
    other.close()
    assert place.wait_for_bill(secret) == [(9, 4, 0, False)]
    assert place.books.used(secret) == 13


def test_a_hold_is_renewed_while_its_stream_flows(ledger_url: str) -> None:
    books, pause = Books(ledger_url), Pause()
    with in_thread(made(pause, ledger_url, hold_ttl_s=0.3)) as url:
        place = Place(url, books, pause)
        secret = books.key("tokens")
        expiry = "SELECT max(expires_at) FROM holds"
        with place.stream("/settled", secret) as parts:
            next(parts)
            [(first,)] = books.query(expiry)
            wait_until(lambda: books.query(expiry) > [(first,)], "a renewal")
            pause.go.set()
            list(parts)
        assert books.query("SELECT late FROM events") == [(0,)]
    books.meter.close()


def test_a_redis_that_freezes_in_the_middle_of_a_stream(ledger_url: str, tmp_path: Path) -> None:
    with RedisServer() as server:
        options: dict[str, Any] = {"quota_url": server.url, "spool": tmp_path / "spool"}
        books, pause = Books(ledger_url, **options), Pause()
        with in_thread(made(pause, ledger_url, **options)) as url:
            place = Place(url, books, pause)
            secret = books.key("tokens")
            with place.stream("/settled", secret, **{"idempotency-key": "f"}) as parts:
                next(parts)
                server.freeze()
                refused = httpx.post(f"{url}/known", headers={"x-api-key": secret})
                assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
                pause.go.set()
                assert "".join(parts) == "two", "the client is not told"
            server.thaw()
            wait_until(lambda: books.used(secret) == 13, "the settle to be carried")
            again = httpx.post(f"{url}/settled", headers={"x-api-key": secret, "idempotency-key": "f"})
            assert again.json()["type"] == "urn:tallystick:response-not-kept"
        with closing(Link(server.url, timeout_s=DEADLINE_S)) as link:
            Drain(books.meter.ledger, link).run()
        assert books.billed(secret) == [(9, 4, 0, False)]
        books.meter.close()
