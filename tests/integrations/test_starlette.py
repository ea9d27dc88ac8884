"""A plain Starlette app on a real server, and the ASGI underneath."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, Router, WebSocketRoute

from metering import TokenUsage
from metering.integrations import asgi
from metering.integrations.starlette import _body, install, quota
from tests.integrations.conftest import Books, in_thread, with_meter

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

application = quota("application", quantity=2)


async def of_the_request(request: Request) -> TokenUsage:
    asked = await request.json()
    return TokenUsage(input_tokens=len(asked["prompt"]), output_tokens=asked["max_tokens"])


guessed = quota("application", estimate=of_the_request, log_bodies=True, operation="answer")


async def plain(request: Request) -> Response:
    hold = await application(request)
    return JSONResponse([hold.account, request.state.plan, request.state.remaining])


async def answer(request: Request) -> Response:
    hold = await guessed(request)
    asked = await request.json()
    hold.settle(TokenUsage(input_tokens=1, output_tokens=1))
    return PlainTextResponse(asked["prompt"])


async def stream(request: Request) -> Response:
    await application(request)

    async def parts() -> AsyncIterator[bytes]:
        yield b"a"
        yield b"b"

    return StreamingResponse(parts())


async def file(request: Request) -> Response:
    await application(request)
    return FileResponse(__file__)


async def websocket(websocket: Any) -> None:
    await websocket.accept()
    await websocket.close()


def gate(line: str) -> Any:
    async def closed(request: Request) -> None:
        if "x-closed" in request.headers:
            raise HTTPException(402, line)

    return closed


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, empty_ledger: Path) -> Iterator[tuple[str, Books]]:
    path = tmp_path_factory.mktemp("starlette") / "ledger.db"
    path.write_bytes(empty_ledger.read_bytes())
    routes = [
        Route("/plain", plain, methods=["GET", "POST"]),
        Route("/answer", answer, methods=["POST"]),
        Route("/stream", stream),
        Route("/file", file),
        WebSocketRoute("/ws", websocket),
    ]
    app = Starlette(
        routes=[*routes, Mount("/under/{name}", Router([Route("/{item:path}", plain)]))],
        lifespan=with_meter(f"sqlite:///{path}"),
    )
    install(app, None, billing_gate=gate)
    books = Books(f"sqlite:///{path}")
    with in_thread(app) as url:
        yield url, books
    books.meter.close()


def test_a_starlette_app_is_metered_alike(site: tuple[str, Books]) -> None:
    url, books = site
    secret = books.key("three")
    headers = {"authorization": f"Bearer {secret}", "idempotency-key": "k"}
    answers = [httpx.post(f"{url}/plain", headers=headers) for _ in range(2)]
    assert answers[0].json() == [books.account(secret), "three", 2]
    assert (answers[1].content, answers[1].headers["idempotent-replayed"]) == (answers[0].content, "true")
    assert answers[0].headers["ratelimit"].startswith('"requests/day/account/*";r=2;t=')
    del headers["idempotency-key"]
    assert [httpx.post(f"{url}/plain", headers=headers).status_code for _ in range(3)] == [200, 200, 429]
    assert books.billed(secret) == [(0, 0, 2, False)] * 3
    for refused, status in ((httpx.post(f"{url}/plain"), 401), (httpx.get(f"{url}/plain?api_key={secret}"), 401)):
        assert (refused.status_code, refused.headers["content-type"]) == (status, "application/problem+json")
    assert httpx.post(f"{url}/plain", headers={**headers, "x-closed": "1"}).status_code == 402


def test_the_body_is_left_to_the_endpoint(site: tuple[str, Books]) -> None:
    url, books = site
    secret = books.key("tokens")
    headers = {"x-api-key": secret, "idempotency-key": "k"}
    asked = {"prompt": "hello", "max_tokens": 5}
    assert [httpx.post(f"{url}/answer", headers=headers, json=asked).text for _ in range(2)] == ["hello"] * 2
    refused = httpx.post(f"{url}/answer", headers={"x-api-key": secret}, json={**asked, "max_tokens": -1})
    assert (refused.status_code, refused.json()["field"]) == (422, "output_tokens")
    assert books.billed(secret) == [(1, 1, 0, False)]
    [entry] = books.meter.log(books.account(secret))
    assert (entry.request, entry.response) == (asked, "hello")
    assert books.query("SELECT operation FROM events WHERE account = ?", books.account(secret)) == [("answer",)]


def test_heads_streams_files_and_mounts(site: tuple[str, Books]) -> None:
    url, books = site
    secret = books.key("open")
    headers = {"x-api-key": secret}
    head = httpx.head(f"{url}/plain", headers=headers)
    assert (head.status_code, head.content) == (200, b"")
    assert httpx.get(f"{url}/stream", headers=headers).text == "ab"
    assert "FileResponse" in httpx.get(f"{url}/file", headers=headers).text
    assert httpx.get(f"{url}/under/a/b/c", headers=headers).status_code == 200
    assert httpx.get(f"{url}/under/a/%00{'x' * 300}", headers=headers).status_code == 200
    assert len(books.billed(secret)) == 5
    account = books.account(secret)
    operations = books.query("SELECT operation FROM events WHERE account = ? ORDER BY seq", account)
    assert operations[3:] == [("GET /under/{name}/{item}",)] * 2


def test_an_app_without_its_middleware_answers_503(ledger_url: str) -> None:
    with in_thread(Starlette(routes=[Route("/plain", plain)])) as url:
        assert httpx.get(f"{url}/plain").status_code == 503


def test_a_form_that_was_read_already_is_known_by_its_fields() -> None:
    import asyncio

    def read(content: bytes) -> Request:
        request = Request({"type": "http", "headers": []})
        request._stream_consumed = True
        request._form = FormData([("a", "1"), ("file", UploadFile(io.BytesIO(content), filename="x"))])
        return request

    one, same, other = (asyncio.run(_body(read(content))) for content in (b"x" * 100_000, b"x" * 100_000, b"y"))
    assert one == same != other
    assert one[0] == ["a", "1"]


def test_tokens_are_counted_and_without_the_extra_guessed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import sys

    assert asgi._tokens_of("hello world") == 2
    assert not caplog.records
    monkeypatch.setitem(sys.modules, "metering.tokens", None)
    assert asgi._tokens_of("hello world") == 3
    assert "install 'tallystick[tokens]'" in caplog.text
