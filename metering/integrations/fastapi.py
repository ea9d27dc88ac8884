"""Metering a FastAPI app: `install(app, meter)`, and `Depends(quota("application"))` on its endpoints.

What both build on is in `asgi` (how a request is metered) and `starlette` (what is read from it).
"""

# Annotations are values here: FastAPI reads them, and those of `quota` name its own arguments.

import inspect
from collections.abc import Awaitable, Callable
from decimal import Decimal
from functools import cache, partial
from typing import Annotated, Any, Unpack

from fastapi import Depends, Header, Request, Security
from fastapi.security import APIKeyHeader, HTTPBearer

from metering.events import CallDescription, CallerType, TokenUsage
from metering.integrations.asgi import RequestHold
from metering.integrations.starlette import admit, asked_by, caller_type_of, exchange_of, install, pass_gate

__all__ = ["RequestHold", "billing_gate", "caller_type", "install", "quota", "recorder"]

_bearer = HTTPBearer(auto_error=False, scheme_name="API key", description="An API key.")
_header = APIKeyHeader(name="x-api-key", auto_error=False, scheme_name="API key (header)", description="An API key.")


async def caller_type(request: Request) -> CallerType:
    """Who calls an endpoint that takes no key: `internal`, unless `install` or `app.dependency_overrides` differ."""
    return await caller_type_of(request)


@cache
def billing_gate(line: str) -> Callable[[Request], Awaitable[None]]:
    """The dependency that lets calls of a line through, or raises; the same one every time, so it can be overridden.

    It does nothing, unless `install` or `app.dependency_overrides` differ. `quota(line)` asks it before it reserves.
    """

    async def gate(request: Request) -> None:
        await pass_gate(request, line)

    return gate


async def recorder(
    request: Request, caller: Annotated[CallerType, Depends(caller_type)]
) -> Callable[..., Awaitable[bool]]:
    """`AsyncMeter.record` for an endpoint that takes no key, with the request's caller type."""
    return partial(exchange_of(request).meter.record, caller_type=caller)


def quota(
    line: str,
    *,
    estimate: TokenUsage | Callable[..., Any] | None = None,
    quantity: Decimal | int | Callable[..., Any] | None = None,
    log_bodies: bool = False,
    query_key: str | None = None,
    **described: Unpack[CallDescription],
) -> Callable[..., Awaitable[RequestHold]]:
    """A dependency that reserves quota for a request on a line, and gives its endpoint the hold.

    `estimate` and `quantity` are what to reserve: values, or functions. A function is a dependency itself, so it may
    take the endpoint's own body model, and a body that is not valid is a 422 before anything is reserved; one whose
    only argument has no annotation gets the request. `InvalidEvent` from it is a 422 too.

    The API key is read from `Authorization: Bearer` or `x-api-key`, and from the query parameter `query_key` if that is
    given. With an `Idempotency-Key` a 2xx response that is no stream is stored, and answered again without running the
    endpoint; it is the same call if method, path, query and body are the same.

    `log_bodies` keeps the bodies of request and response in the request log. `described` is told of each call, as
    `Meter.reserve` takes it; the operation is method and path (its parameters by name) unless it is said.

    Sets `request.state.account`, `.plan` and `.remaining`.
    """

    async def reserve(
        request: Request,
        _gate: Annotated[None, Depends(billing_gate(line))],
        _by_bearer: Annotated[object, Security(_bearer)],
        _by_header: Annotated[object, Security(_header)],
        estimated: Annotated[Any, Depends(_dependency(estimate))],
        counted: Annotated[Any, Depends(_dependency(quantity))],
        idempotency_key: Annotated[str | None, Header(description="Makes a retry safe: one key, one call.")] = None,  # noqa: ARG001
    ) -> RequestHold:
        return await admit(
            request,
            line,
            estimate=estimated,
            quantity=counted,
            log_bodies=log_bodies,
            query_key=query_key,
            **described,
        )

    return reserve


def _dependency(said: Any) -> Callable[..., Any]:
    if not callable(said):

        async def constant() -> Any:
            return said

        return constant

    signature = inspect.signature(said, eval_str=True)
    arguments = list(signature.parameters.values())
    if len(arguments) == 1 and arguments[0].annotation is inspect.Parameter.empty:

        async def of_the_request(request: Request) -> Any:
            return await asked_by(said, request)

        return of_the_request

    async def asked(*args: Any, **kwargs: Any) -> Any:
        return await asked_by(said, *args, **kwargs)

    asked.__signature__ = signature  # type: ignore[attr-defined]
    return asked
