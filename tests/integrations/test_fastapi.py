"""A FastAPI app on a real server, asked by a real client."""

from __future__ import annotations

import threading
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any

import httpx
import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, HTTPException, Request, WebSocket
from fastapi.middleware.gzip import GZipMiddleware
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel

from metering import InvalidEvent, Meter, TokenUsage
from metering.errors import SettleConflict
from metering.integrations.fastapi import RequestHold, billing_gate, caller_type, install, quota, recorder
from tests.integrations.conftest import Books, in_thread, with_meter
from tests.servers import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ESTIMATE = TokenUsage(input_tokens=10, output_tokens=50)
REAL = TokenUsage(input_tokens=9, output_tokens=4)


class Ask(BaseModel):
    prompt: str
    max_tokens: int = 16


def of_the_ask(ask: Ask) -> TokenUsage:
    return TokenUsage(input_tokens=len(ask.prompt), output_tokens=ask.max_tokens)


Known = Annotated[RequestHold, Depends(quota("application"))]
Guessed = Annotated[RequestHold, Depends(quota("application", estimate=ESTIMATE))]


class Shop:
    """The app under test: what its endpoints were run with, and its ledger."""

    def __init__(self, url: str, books: Books, app: FastAPI, ran: list[Any]) -> None:
        self.url, self.books, self.app, self.ran = url, books, app, ran
        # A connection that saw an exception is closed by the server, perhaps while the next request is on its way.
        self.client = httpx.Client(base_url=url, timeout=20, limits=httpx.Limits(max_keepalive_connections=0))

    def post(self, path: str, secret: str | None = None, key: str | None = None, **options: Any) -> httpx.Response:
        headers = options.pop("headers", {})
        if secret is not None:
            headers["authorization"] = f"Bearer {secret}"
        if key is not None:
            headers["idempotency-key"] = key
        return self.client.post(path, headers=headers, **options)


def made(ran: list[Any], ledger_url: str) -> FastAPI:  # noqa: C901  many endpoints
    app = FastAPI(lifespan=with_meter(ledger_url, strict_signals=True))
    install(app, None)

    @app.middleware("http")
    async def outside(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        state = request.scope.get("state", {})
        if "account" in state:
            response.headers["x-state"] = f"{state['account']} {state['plan']} {state['remaining']}"
        return response

    @app.post("/plain")
    async def plain(hold: Known, request: Request) -> dict[str, Any]:
        ran.append(request.state.account)
        return {"account": request.state.account, "plan": request.state.plan, "remaining": request.state.remaining}

    @app.post("/settled")
    async def settled(hold: Guessed) -> dict[str, int]:
        ran.append("settled")
        hold.settle(REAL, provider="openai", model="m-1")
        return {"answer": len(ran)}

    @app.post("/blocking")
    def blocking(hold: Guessed) -> dict[str, int]:
        ran.append(threading.current_thread().name)
        hold.settle(REAL, provider="openai", model="m-1")
        return {"answer": 1}

    @app.post("/items/{item}", status_code=201)
    async def item(
        item: str,
        ask: Ask,
        hold: Annotated[RequestHold, Depends(quota("application", estimate=of_the_ask, log_bodies=True))],
    ) -> dict[str, str]:
        ran.append(item)
        hold.settle(TokenUsage(input_tokens=1, output_tokens=1), model="m-1", provider="p")
        return {"said": f"{ask.prompt} {hold.account}"}

    @app.post("/of-request")
    async def of_request(
        hold: Annotated[
            RequestHold,
            Depends(quota("application", quantity=lambda request: int(request.query_params["n"]), query_key="api_key")),
        ],
    ) -> int:
        return 1

    @app.post("/unsettled")
    async def unsettled(hold: Guessed) -> str:
        return "forgot"

    @app.post("/fails/{how}")
    async def fails(how: str, hold: Guessed) -> Response:
        if how == "raises":
            raise ZeroDivisionError
        if how == "http":
            raise HTTPException(418, "teapot")
        if how == "settled-502":
            hold.settle(REAL)
            return JSONResponse({"upstream": "down"}, 502)
        if how == "settled-raises":
            hold.settle(REAL)
            raise ZeroDivisionError
        if how == "bad-settle":
            hold.settle(None, quantity=1)
        if how == "two-settles":
            hold.settle(REAL)
            hold.settle(REAL)
            hold.settle(ESTIMATE)
        if how == "own":
            raise InvalidEvent("whatever", 1, "another")
        return JSONResponse({"upstream": "down"}, 502)

    @app.post("/binary")
    async def binary(hold: Known) -> Response:
        ran.append("binary")
        return Response(bytes(range(256)), 203, media_type="application/octet-stream")

    @app.post("/nothing", status_code=204)
    async def nothing(hold: Known) -> None:
        ran.append("nothing")

    @app.post("/large")
    async def large(hold: Known) -> str:
        ran.append("large")
        return "x" * 17_000

    @app.post("/late")
    async def late(hold: Guessed, tasks: BackgroundTasks) -> str:
        def settle() -> None:
            try:
                hold.settle(REAL)
            except SettleConflict as exc:
                ran.append(type(exc).__name__)

        tasks.add_task(settle)
        return "answered"

    @app.post("/twice")
    async def twice(hold: Known, other: Annotated[RequestHold, Depends(quota("other"))]) -> int:
        return 1

    @app.post("/signal", dependencies=[Depends(billing_gate("learnings_generated"))])
    async def signal(account: str, record: Annotated[Any, Depends(recorder)]) -> bool:
        return await record(account=account, line="learnings_generated", quantity=3)

    @app.get("/free")
    async def free() -> str:
        return "free"

    @app.websocket("/ws")
    async def ws(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    router = APIRouter(prefix="/v1")

    @router.get("/things/{thing}")
    async def thing(thing: int, hold: Known) -> int:
        return thing

    app.include_router(router)

    inner = FastAPI()
    install(inner, None)

    @inner.post("/plain")
    async def inner_plain(hold: Known) -> str:
        return hold.plan

    app.mount("/inner", inner)
    app.add_middleware(GZipMiddleware, minimum_size=10)
    return app


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, empty_ledger: Path) -> Iterator[Shop]:
    path = tmp_path_factory.mktemp("shop") / "ledger.db"
    path.write_bytes(empty_ledger.read_bytes())
    ran: list[Any] = []
    app = made(ran, f"sqlite:///{path}")
    books = Books(f"sqlite:///{path}")
    with in_thread(app) as url:
        shop = Shop(url, books, app, ran)
        yield shop
        shop.client.close()
    books.meter.close()


@pytest.fixture(autouse=True)
def _fresh(shop: Shop) -> None:
    shop.ran.clear()
    shop.app.dependency_overrides.clear()


def problem(response: httpx.Response, status: int, kind: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = response.json()
    assert document["status"] == status
    assert document["type"].endswith(kind)
    assert document["title"]
    assert document["detail"]
    return document


def test_a_call_is_admitted_and_billed(shop: Shop) -> None:
    secret = shop.books.key("three")
    response = shop.post("/plain", secret)
    account = shop.books.account(secret)
    assert response.json() == {"account": account, "plan": "three", "remaining": 2}
    assert response.headers["x-state"] == f"{account} three 2", "what stands outside sees it too"
    assert shop.books.billed(secret) == [(0, 0, 0, False)]
    [row] = shop.books.query("SELECT operation, latency_ms IS NOT NULL FROM events WHERE account = ?", account)
    assert row == ("POST /plain", 1)
    assert shop.books.open_holds(secret) == 0


def test_where_the_key_may_be(shop: Shop) -> None:
    secret = shop.books.key("open")
    for headers in ({"x-api-key": secret}, {"authorization": f"bearer {secret}"}):
        assert shop.post("/plain", headers=headers).status_code == 200
    both = {"authorization": "Basic Zm9vOmJhcg==", "x-api-key": secret}
    assert shop.post("/plain", headers=both).status_code == 200
    assert shop.post("/of-request", params={"n": 1, "api_key": secret}).status_code == 200
    problem(shop.post("/plain", params={"api_key": secret}), 401, "no-api-key")


def test_no_key_unknown_key_revoked_key(shop: Shop) -> None:
    missing = shop.post("/plain")
    problem(missing, 401, "no-api-key")
    assert missing.headers["www-authenticate"] == "Bearer"
    problem(shop.post("/plain", headers={"authorization": "Bearer"}), 401, "no-api-key")
    stranger = "k" * 40
    refused = shop.post("/plain", stranger)
    problem(refused, 403, "unknown-api-key")
    key = shop.books.meter.keys.create("revoked", plan="open")
    shop.books.meter.keys.revoke(key.key_id)
    revoked = shop.post("/plain", key.secret)
    assert problem(revoked, 403, "revoked-api-key")["key_id"] == key.key_id
    for response in (refused, revoked):
        assert stranger not in response.text
        assert key.secret not in response.text
    assert not shop.ran


def test_a_refusal_says_which_limit_and_when_to_come_back(shop: Shop) -> None:
    secret = shop.books.key("three")
    answers = [shop.post("/plain", secret) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert [answer.headers["ratelimit"].partition(";t=")[0] for answer in answers] == [
        f'"requests/day/account/*";r={left}' for left in (2, 1, 0, 0)
    ]
    assert {answer.headers["ratelimit-policy"] for answer in answers} == {'"requests/day/account/*";q=3;w=86400'}
    said = problem(answers[-1], 429, "#quota-exceeded")
    assert (said["limit"], said["used"], said["max"], said["asked"]) == ("requests/day/account/*", 3, 3, 1)
    assert said["violated-policies"] == ["requests/day/account/*"]
    assert said["retry_after_s"] == int(answers[-1].headers["retry-after"])
    assert 0 < said["retry_after_s"] <= 86_400
    assert len(shop.ran) == 3
    assert shop.books.used(secret) == 3
    quick = shop.books.key("quick")
    bursts = [shop.post("/plain", quick) for _ in range(3)]
    assert bursts[0].headers["ratelimit-policy"] == '"requests/60 per minute burst 2/account/*";q=2;w=2'
    assert int(bursts[-1].headers["retry-after"]) == 1


def test_what_never_fits_is_refused_without_a_time(shop: Shop) -> None:
    secret = shop.books.key("tokens")
    response = shop.post("/items/1", secret, json={"prompt": "x", "max_tokens": 2_000})
    assert problem(response, 429, "#quota-exceeded")["retry_after_s"] is None
    assert "retry-after" not in response.headers
    assert response.headers["ratelimit-policy"] == '"tokens/day/account/*";q=1000;qu="tokens";w=86400'


def test_a_settle_is_booked_with_the_response(shop: Shop) -> None:
    secret = shop.books.key("tokens")
    for path in ("/settled", "/blocking"):
        assert shop.post(path, secret).status_code == 200
    assert shop.books.billed(secret) == [(9, 4, 0, False)] * 2
    assert shop.books.used(secret) == 26
    assert shop.ran[1] != threading.current_thread().name


def test_a_replay_answers_what_was_sent_without_running(shop: Shop) -> None:
    secret = shop.books.key("open")
    for path, status in (("/settled", 200), ("/binary", 203), ("/nothing", 204)):
        shop.ran.clear()
        first, *others = [shop.post(path, secret, key=path) for _ in range(3)]
        assert len(shop.ran) == 1
        assert first.status_code == status
        for other in others:
            assert (other.status_code, other.content) == (first.status_code, first.content)
            assert other.headers.get("content-type") == first.headers.get("content-type")
            assert other.headers["idempotent-replayed"] == "true"
        assert "idempotent-replayed" not in first.headers
    assert len(shop.books.billed(secret)) == 3


def test_one_key_is_one_request(shop: Shop) -> None:
    secret, other = shop.books.key("open"), shop.books.key("open")
    assert shop.post("/items/1", secret, key="k", json={"prompt": "a"}).status_code == 201
    for path, body in (("/items/1", {"prompt": "b"}), ("/items/2", {"prompt": "a"}), ("/items/1?x=1", {"prompt": "a"})):
        said = problem(shop.post(path, secret, key="k", json=body), 409, "idempotency-conflict")
        assert said["idempotency_key"] == "k"
    assert shop.post("/items/1", other, key="k", json={"prompt": "b"}).status_code == 201, "keys are the account's own"
    assert shop.ran == ["1", "1"]


def test_a_rotated_key_retries_the_same_request(shop: Shop) -> None:
    key = shop.books.meter.keys.create("rotating", plan="open")
    first = shop.post("/of-request", params={"n": 1, "api_key": key.secret}, key="k")
    second = shop.books.meter.keys.create("rotating").secret
    again = shop.post("/of-request", params={"n": 1, "api_key": second}, key="k")
    assert (again.content, again.headers["idempotent-replayed"]) == (first.content, "true")


def test_a_response_that_was_not_kept_is_said_to_be_gone(shop: Shop) -> None:
    secret = shop.books.key("open")
    assert shop.post("/large", secret, key="l").status_code == 200
    said = problem(shop.post("/large", secret, key="l"), 409, "response-not-kept")
    assert (said["replayed"], len(said["event_id"])) == (True, 36)
    assert len(shop.ran) == len(shop.books.billed(secret)) == 1


@pytest.mark.parametrize("key", ["k" * 256, ""])
def test_an_idempotency_key_that_is_none_is_the_callers_mistake(shop: Shop, key: str) -> None:
    said = problem(shop.post("/plain", shop.books.key("open"), key=key), 400, "invalid-idempotency-key")
    assert "255" in said["expected"]
    assert not shop.ran


def test_the_api_key_as_idempotency_key_is_refused_and_not_shown(shop: Shop) -> None:
    secret = shop.books.key("open")
    response = shop.post("/plain", secret, key=secret)
    problem(response, 400, "invalid-idempotency-key")
    secret = shop.books.key("open")
    twice = [("authorization", f"Bearer {secret}"), ("idempotency-key", "a"), ("idempotency-key", "b")]
    problem(shop.client.post("/plain", headers=twice), 400, "invalid-idempotency-key")
    assert secret not in response.text


def test_what_the_caller_asks_wrongly_reserves_nothing(shop: Shop) -> None:
    secret = shop.books.key("tokens")
    assert shop.post("/items/1", secret, json={"prompt": 1}).status_code == 422
    assert shop.post("/items/1", secret, json=[]).status_code == 422
    said = problem(shop.post("/items/1", secret, json={"prompt": "a", "max_tokens": -1}), 422, "invalid-request")
    assert said["field"] == "output_tokens"
    problem(shop.post("/of-request", secret, params={"n": -1}), 422, "invalid-request")
    assert (shop.books.used(secret), shop.books.billed(secret), shop.books.open_holds(secret)) == (0, [], 0)


def test_what_the_app_does_wrongly_is_a_500(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    secret = shop.books.key("tokens")
    problem(shop.post("/plain", secret), 500, "metering-failed")  # the plan counts tokens and none are estimated
    problem(shop.post("/fails/own", secret), 500, "metering-failed")
    assert (shop.books.billed(secret), shop.books.used(secret)) == ([], 0)
    assert [record.message for record in caplog.records] == [
        "POST /plain could not be metered", "POST /fails/own could not be metered",
    ]  # fmt: skip
    assert shop.post("/twice", shop.books.key("open")).status_code == 500


def test_a_failing_endpoint_costs_nothing_unless_it_settled(shop: Shop) -> None:
    secret = shop.books.key("tokens")
    assert [shop.post(f"/fails/{how}", secret).status_code for how in ("raises", "http", "502")] == [500, 418, 502]
    assert (shop.books.billed(secret), shop.books.used(secret)) == ([], 0)
    errors = [entry.error for entry in shop.books.meter.log(shop.books.account(secret))]
    assert sorted(map(str, errors)) == ["HTTP 418", "HTTP 502", "ZeroDivisionError: "]
    assert shop.post("/fails/502", secret, key="k").status_code == 502
    assert shop.post("/fails/502", secret, key="k").status_code == 502, "it runs again"
    assert shop.post("/fails/settled-502", secret, key="s").status_code == 502
    problem(shop.post("/fails/settled-502", secret, key="s"), 409, "response-not-kept")
    assert shop.post("/fails/settled-raises", secret).status_code == 500
    assert shop.books.billed(secret) == [(9, 4, 0, False)] * 2


def test_a_settle_that_is_refused_says_that_work_was_done(shop: Shop) -> None:
    secret = shop.books.key("tokens")
    problem(shop.post("/fails/bad-settle", secret), 500, "metering-failed")
    problem(shop.post("/fails/two-settles", secret), 500, "metering-failed")
    assert shop.books.billed(secret) == [(10, 50, 0, True), (9, 4, 0, False)]


def test_a_settle_after_the_response_is_refused(shop: Shop) -> None:
    secret = shop.books.key("open")
    assert shop.post("/late", secret).status_code == 200
    wait_until(lambda: bool(shop.ran), "the task that comes after the response")
    assert shop.ran == ["SettleConflict"]
    assert shop.books.billed(secret) == [(10, 50, 0, True)]


def test_without_a_settle_a_known_cost_is_booked_and_a_guess_is_marked(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    secret = shop.books.key("open")
    assert shop.post("/of-request", secret, params={"n": 7}).status_code == 200
    assert not caplog.records
    assert shop.post("/unsettled", secret).status_code == 200
    assert shop.books.billed(secret) == [(0, 0, 7, False), (10, 50, 0, True)]
    assert "was not settled: its estimate is booked" in caplog.text


def test_a_model_that_a_rate_needs_and_nobody_said_is_a_500_and_still_billed(shop: Shop) -> None:
    secret = shop.books.key("priced")
    assert shop.post("/settled", secret, key="a").status_code == 200
    shop.app.dependency_overrides.clear()
    account = shop.books.account(secret)
    problem(shop.post("/fails/settled-502", secret), 500, "metering-failed")
    rows = shop.books.query("SELECT output_tokens, model, estimated FROM events WHERE account = ?", account)
    assert rows == [(4, "m-1", 0), (4, None, 1)]


def test_bodies_are_logged_only_when_asked(shop: Shop) -> None:
    secret = shop.books.key("open")
    account = shop.books.account(secret)
    assert shop.post("/settled", secret, key="k").status_code == 200
    assert shop.books.meter.log(account) == []
    assert shop.post("/items/9", secret, json={"prompt": f"key {secret}"}).status_code == 201
    [entry] = shop.books.meter.log(account)
    assert entry.request == {"prompt": "key [API key]"}
    assert entry.response == {"said": f"key [API key] {account}"}
    operations = shop.books.query("SELECT operation FROM events WHERE account = ? ORDER BY seq", account)
    assert operations == [("POST /settled",), ("POST /items/{item}",)]


def test_secrets_are_in_the_replay_and_not_in_the_log(shop: Shop) -> None:
    secret = shop.books.key("open")
    ask = {"prompt": "password=hunter2 and more", "client_secret": "hunter2"}
    answers = [shop.post("/items/9", secret, key="r", json=ask) for _ in range(2)]
    account = shop.books.account(secret)
    assert [answer.json() for answer in answers] == [{"said": f"password=hunter2 and more {account}"}] * 2
    [entry] = shop.books.meter.log(account)
    assert entry.request == {"prompt": "password=[redacted] and more", "client_secret": "[redacted]"}
    assert entry.response == {"said": f"password=[redacted] and more {account}"}
    again = shop.post("/items/9", secret, key="r", json={**ask, "client_secret": "hunter3"})
    problem(again, 409, "idempotency-conflict")


def test_routers_mounted_apps_and_other_scopes(shop: Shop) -> None:
    secret = shop.books.key("open")
    headers = {"x-api-key": secret}
    assert shop.client.get("/v1/things/7", headers=headers).text == "7"
    assert shop.post("/inner/plain", secret).json() == "open"
    problem(shop.post("/inner/plain"), 401, "no-api-key")
    operations = shop.books.query("SELECT operation FROM events WHERE account = ?", shop.books.account(secret))
    assert operations == [("GET /v1/things/{thing}",), ("POST /inner/plain",)]
    assert shop.client.head("/free").status_code == shop.client.options("/free").status_code == 405
    assert shop.client.get("/nowhere").status_code == 404
    upgrade = {"connection": "upgrade", "upgrade": "websocket"}
    assert shop.client.get("/ws", headers=upgrade).status_code in (400, 404)
    assert len(shop.books.billed(secret)) == 2


def test_compression_lies_outside(shop: Shop) -> None:
    secret = shop.books.key("open")
    answers = [shop.post("/plain", secret, key="z", headers={"accept-encoding": "gzip"}) for _ in range(2)]
    assert {answer.headers["content-encoding"] for answer in answers} == {"gzip"}
    assert answers[0].json() == answers[1].json()


def test_the_caller_type_and_the_gate_are_seams(shop: Shop) -> None:
    secret = shop.books.key("open")
    account = shop.books.account(secret)
    assert billing_gate("application") is billing_gate("application")
    assert billing_gate("application") is not billing_gate("other")

    def signal() -> httpx.Response:
        return shop.post("/signal", params={"account": account})

    assert signal().json() is True
    shop.app.dependency_overrides[caller_type] = lambda: "dashboard"
    assert signal().json() is True

    def closed() -> None:
        raise HTTPException(402, "no contract")

    shop.app.dependency_overrides[billing_gate("learnings_generated")] = closed
    assert signal().status_code == 402
    assert shop.post("/plain", secret).status_code == 200
    shop.app.dependency_overrides[billing_gate("application")] = closed
    assert shop.post("/plain", secret).status_code == 402
    rows = shop.books.query(
        "SELECT kind, caller_type, billable, quantity FROM events WHERE account = ? ORDER BY seq", account
    )
    assert [row[:3] for row in rows] == [
        ("signal", "internal", 0), ("signal", "dashboard", 0), ("usage", "production_agent", 1),
    ]  # fmt: skip
    assert [Decimal(row[3]) for row in rows] == [3, 3, 0]


def test_the_docs_say_how_to_send_a_key(shop: Shop) -> None:
    plain = shop.client.get("/openapi.json").json()["paths"]["/plain"]["post"]
    assert plain["security"] == [{"API key": []}, {"API key (header)": []}]
    assert [parameter["name"] for parameter in plain["parameters"]] == ["idempotency-key"]


def test_without_a_meter_calls_wait_for_one(ledger_url: str, shop: Shop) -> None:
    app = FastAPI()

    @app.post("/plain")
    async def plain(hold: Annotated[RequestHold, Depends(quota("application"))]) -> str:
        return hold.plan

    with in_thread(app) as url:
        bare = httpx.post(f"{url}/plain")
        assert (bare.status_code, bare.headers["retry-after"]) == (503, "1")
        with pytest.raises(RuntimeError, match=r"in its lifespan only app\.state\.meter can be set"):
            install(app, None)
    app = FastAPI(routes=app.routes)
    install(app, None)
    install(app, None)
    with in_thread(app) as url:
        missing = httpx.post(f"{url}/plain")
        problem(missing, 503, "metering-unavailable")
        assert missing.headers["retry-after"] == "1"
        app.state.meter = shop.app.state.meter
        assert httpx.post(f"{url}/plain", headers={"x-api-key": shop.books.key("open")}).json() == "open"
        with Meter(ledger_url) as blocking:
            app.state.meter = blocking
            assert httpx.post(f"{url}/plain").status_code == 500


def test_a_meter_that_blocks_is_refused(open_meter: Any) -> None:
    with pytest.raises(TypeError, match="an AsyncMeter, which takes the same arguments as Meter"):
        install(FastAPI(), open_meter())


def test_installed_seams(shop: Shop) -> None:
    app = FastAPI()

    @app.post("/plain")
    async def plain(hold: Annotated[RequestHold, Depends(quota("application"))]) -> str:
        return hold.plan

    @app.post("/signal")
    async def signal(account: str, record: Annotated[Any, Depends(recorder)]) -> bool:
        return await record(account=account, line="other")

    async def who(request: Request) -> Any:
        return request.headers["x-who"]

    def gate(line: str) -> Any:
        def let_through(request: Request) -> None:
            if "x-closed" in request.headers:
                raise HTTPException(402, line)

        return let_through

    install(app, shop.app.state.meter, caller_type=who, billing_gate=gate)
    secret = shop.books.key("open")
    account = shop.books.account(secret)
    with in_thread(app) as url:
        assert httpx.post(f"{url}/plain", headers={"x-api-key": secret}).status_code == 200
        closed = httpx.post(f"{url}/plain", headers={"x-api-key": secret, "x-closed": "1"})
        assert (closed.status_code, closed.json()) == (402, {"detail": "application"})
        said = httpx.post(f"{url}/signal", params={"account": account}, headers={"x-who": "dashboard"})
        assert said.json() is True
    rows = shop.books.query("SELECT caller_type FROM events WHERE account = ? ORDER BY seq", account)
    assert rows == [("production_agent",), ("dashboard",)]
