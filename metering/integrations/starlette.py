"""Metering a Starlette app: `install` it once, and `await quota("application")(request)` in an endpoint."""

from __future__ import annotations

import hashlib
import inspect
import logging
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Unpack, cast

from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from metering import checks
from metering.clock import utc_now
from metering.errors import InvalidEvent, MeteringError
from metering.events import CallDescription, CallerType, TokenUsage, fingerprint_of
from metering.integrations import problems
from metering.integrations.asgi import Exchange, Metering, RequestHold, readable, require_async

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.applications import Starlette
    from starlette.requests import Request

    from metering.aio import AsyncMeter
    from metering.integrations.problems import Answer

    Of = Callable[[Request], Any]

__all__ = ["RequestHold", "install", "quota"]

logger = logging.getLogger("metering")

MAX_OPERATION = 255


def install(
    app: Starlette,
    meter: AsyncMeter | None,
    caller_type: Callable[[Request], CallerType | Awaitable[CallerType]] | None = None,
    billing_gate: Callable[[str], Callable[[Request], object]] | None = None,
) -> None:
    """Meter an app, FastAPI's or Starlette's, with an `AsyncMeter`, which stays the caller's to close.

    Sets `app.state.meter`, adds the middleware innermost, and problem+json answers for the package's errors. With None
    every metered endpoint answers 503 until `app.state.meter` is set, as in a lifespan. A mounted application that
    handles its own errors needs an `install` of its own; with None there it uses the meter of the outer one.

    `caller_type(request)` says who calls endpoints that take no key. `billing_gate(line)` gives a function of the
    request, which raises to refuse a call before anything is reserved. Both, and that function, may be `async`.

    Raises TypeError for a meter that would block the event loop, and RuntimeError for an app that has begun to run.
    """
    if meter is not None:
        require_async(meter)
    app.state.meter = meter
    app.state.caller_type = caller_type
    app.state.billing_gate = billing_gate
    if any(cast("Any", middleware.cls) is Metering for middleware in app.user_middleware):
        return
    if app.middleware_stack is not None:
        raise RuntimeError("install before the app runs; in its lifespan only app.state.meter can be set")
    # Not by add_middleware, which adds outermost: a compressing middleware would be inside.
    app.user_middleware.append(Middleware(cast("Any", Metering), app.state))
    app.add_exception_handler(MeteringError, cast("Any", _answer_to))
    app.add_exception_handler(problems.Refused, cast("Any", _answer_to))


def quota(
    line: str,
    *,
    estimate: TokenUsage | Of | None = None,
    quantity: Decimal | int | Of | None = None,
    log_bodies: bool = False,
    query_key: str | None = None,
    **described: Unpack[CallDescription],
) -> Callable[[Request], Awaitable[RequestHold]]:
    """A function that reserves quota for a request and returns its hold: `hold = await quota("application")(request)`.

    It raises where the endpoint may not go on, and what it raises is answered: 401, 403, 409, 429, 503, or a replay.
    See `metering.integrations.fastapi.quota` for the arguments.
    """

    async def reserve(request: Request) -> RequestHold:
        await pass_gate(request, line)
        return await admit(
            request,
            line,
            estimate=await asked_by(estimate, request) if callable(estimate) else estimate,
            quantity=await asked_by(quantity, request) if callable(quantity) else quantity,
            log_bodies=log_bodies,
            query_key=query_key,
            **described,
        )

    return reserve


async def admit(
    request: Request,
    line: str,
    *,
    log_bodies: bool,
    query_key: str | None,
    **said: Any,
) -> RequestHold:
    """Reserve for a request what is `said`, as `Meter.reserve` takes it."""
    exchange = exchange_of(request)
    meter = exchange.meter
    api_key = _key(request, query_key)
    idempotency_key = _idempotency_key(request)
    said["operation"] = said.get("operation") or _operation(request)
    body = None if idempotency_key is None and not log_bodies else await _body(request)
    try:
        return await exchange.reserve(
            meter,
            api_key,
            line=line,
            idempotency_key=idempotency_key,
            fingerprint=None
            if idempotency_key is None
            else _fingerprint(request, line, said["operation"], query_key, body),
            request=readable(body, request.headers.get("content-type")) if log_bodies else None,
            log_bodies=log_bodies,
            **said,
        )
    except InvalidEvent as exc:
        if exc.field == "idempotency_key":
            raise problems.Refused(problems.invalid_idempotency_key(exc.expected)) from exc
        if exc.field in ("estimate", "quantity") and exc.value is not None:
            raise problems.Refused(problems.invalid_request(exc.field, exc.expected)) from exc
        raise


async def pass_gate(request: Request, line: str) -> None:
    """Ask the app's billing gate, if it has one."""
    gate = exchange_of(request).of_the_app("billing_gate")
    if gate is not None:
        await _answer_of(gate(line), request)


async def caller_type_of(request: Request) -> CallerType:
    """What the app says of who calls an endpoint that takes no key."""
    say = exchange_of(request).of_the_app("caller_type")
    return "internal" if say is None else cast("CallerType", await _answer_of(say, request))


def exchange_of(request: Request) -> Exchange:
    """What the middleware knows of a request. Raises HTTPException, 503, where it is not installed."""
    exchange = request.scope.get("metering")
    if exchange is None:
        retry = {"retry-after": str(problems.ASK_AGAIN_S)}
        raise HTTPException(503, "No meter is set up: install(app, meter) comes first.", retry)
    return cast("Exchange", exchange)


async def asked_by(ask: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """What to reserve, from a function of the request: what cannot be is the caller's mistake. Raises `Refused`."""
    try:
        asked = await _answer_of(ask, *args, **kwargs)
        if isinstance(asked, int | Decimal):
            checks.quantity("quantity", asked)
    except InvalidEvent as exc:
        raise problems.Refused(problems.invalid_request(exc.field, exc.expected)) from exc
    return asked


async def _answer_of(ask: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    answer = ask(*args, **kwargs)
    return await answer if inspect.isawaitable(answer) else answer


async def _answer_to(request: Request, error: Exception) -> Answer:
    answer = problems.answer_to(error, utc_now())
    if answer is None:
        logger.error("%s %s could not be metered", request.method, request.url.path, exc_info=error)
        return problems.own_fault()
    return answer


def _key(request: Request, query_key: str | None) -> str:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    key = token.strip() if scheme.lower() == "bearer" else ""
    key = key or request.headers.get("x-api-key", "")
    if query_key is not None:
        key = key or request.query_params.get(query_key, "")
    if not key:
        raise problems.Refused(problems.no_key())
    return key


def _idempotency_key(request: Request) -> str | None:
    keys = request.headers.getlist("idempotency-key")
    if len(keys) > 1:
        raise problems.Refused(problems.invalid_idempotency_key("sent once"))
    return keys[0] if keys else None


def _operation(request: Request) -> str:
    """Method and path, with the names of its parameters for their values."""
    path = request.scope["path"]
    for name, value in reversed(request.path_params.items()):
        head, found, tail = path.rpartition(f"/{value}")
        if found and (not tail or tail.startswith("/")):
            path = f"{head}/{{{name}}}{tail}"
    said = f"{request.method} {path}"[:MAX_OPERATION]
    return said if said.isprintable() else ascii(said)[1:-1][:MAX_OPERATION]


async def _body(request: Request) -> Any:
    """The request's body, left for the endpoint to read; the fields of a form that FastAPI has read already."""
    try:
        return await request.body()
    except RuntimeError:  # the body is gone, into the form
        return [
            [name, value if isinstance(value, str) else [value.filename, await _digest(value)]]
            for name, value in (await request.form()).multi_items()
        ]


async def _digest(file: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    while chunk := await file.read(64 * 1024):
        digest.update(chunk)
    await file.seek(0)
    return digest.hexdigest()


def _fingerprint(request: Request, line: str, operation: str, query_key: str | None, body: Any) -> str:
    query = [pair for pair in request.query_params.multi_items() if pair[0] != query_key]
    return fingerprint_of(line, operation, [request.scope["path"], query, body])
