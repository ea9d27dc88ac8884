"""How an HTTP request is metered, under any ASGI framework.

Its quota is reserved before its endpoint runs (`Exchange.reserve`), and booked once its response is known, before the
last byte of that leaves (`Exchange.send`); what is left open when the app has returned is ended there (`Exchange.end`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec

from metering.admission.holding import settlement_digest
from metering.aio import AsyncMeter, to_the_end
from metering.clock import utc_now
from metering.errors import InvalidEvent, LedgerError, MeteringError, SettleConflict
from metering.integrations import problems

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping
    from decimal import Decimal

    from metering.admission.protocol import Decision, Settlement
    from metering.aio import AsyncHold
    from metering.integrations.problems import Answer

    Message = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]
    App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

__all__ = ["Exchange", "Metering", "RequestHold"]

logger = logging.getLogger("metering")

MAX_KEPT_BYTES = 256 * 1024
"""What is kept of a response, to log it, replay it and count its tokens; those of longer ones in proportion."""


class Metering:
    """ASGI middleware: ends the hold of each request as its response deserves.

    `state` has the meter, an `AsyncMeter`, as its attribute `meter`; None until there is one. It belongs innermost, so
    that it sees responses as endpoints made them. Anything but HTTP passes through.
    """

    def __init__(self, app: App, state: Any) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = scope["metering"] = Exchange(self._state, scope, receive, send, outer=scope.get("metering"))
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except BaseException as exc:
            await exchange.end(exc)
            raise
        await exchange.end()


class RequestHold:
    """Units reserved for a request, as its endpoint has them: say what the call cost, and it is booked.

    Nothing here waits, so `def` and `async def` endpoints use it alike. What `settle` said is booked when the response
    is known, and stored with it for replays. Where nothing was said, a call that reserved no tokens costs what was
    reserved; one that did is booked as its estimate, marked `estimated`, and a stream with the output it produced. An
    endpoint that raises, or answers other than 2xx, costs nothing.
    """

    def __init__(self, held: AsyncHold) -> None:
        self.decision: Decision = held.decision
        self._held = held
        self._said: Settlement | None = None
        self._is_over = False
        self._produced: _Kept | None = None

    @property
    def account(self) -> str:
        """Who is billed."""
        return self.decision.account

    @property
    def plan(self) -> str:
        """The account's plan."""
        return self.decision.plan

    @property
    def remaining(self) -> int | Decimal | None:
        """Units left of the tightest limit, this call's reservation taken off; None if unlimited."""
        return self.decision.remaining

    def settle(
        self,
        usage: object = None,
        *,
        quantity: Decimal | int | None = None,
        provider: str | None = None,
        model: str | None = None,
        service_tier: str | None = None,
        latency_ms: int | None = None,
    ) -> None:
        """Say the real cost; see `Hold.settle`. `latency_ms` is that of the request unless it is given.

        Raises `InvalidEvent` at once for what cannot be booked, and `SettleConflict` for another cost than was said
        before, or than was booked with the response. A provider or model left out that a rate of the plan needs shows
        only when it is booked: the usage is then booked marked `estimated`, and the caller is answered 500.
        """
        said = self._held.real_cost(
            usage,
            quantity=quantity,
            provider=provider,
            model=model,
            service_tier=service_tier,
            latency_ms=latency_ms,
        )
        if self._said is None and not self._is_over:
            self._said = said
        elif self._said is None or settlement_digest(said) != settlement_digest(self._said):
            raise SettleConflict(f"{self._held} was settled or released before, and not like this; that stands")

    def produced(self, text: str) -> None:
        """Say which text a stream produced; its tokens are counted if no usage comes.

        Without this the text of the response's body is counted instead, of server-sent events only their data.
        """
        if self._produced is None:
            self._produced = _Kept()
        self._produced.add(text.encode("utf-8", "replace"))


class Exchange:
    """One HTTP request and its response."""

    def __init__(
        self, state: Any, scope: MutableMapping[str, Any], receive: Receive, send: Send, *, outer: Exchange | None
    ) -> None:
        self._state = state
        self._outer = outer
        self._scope = scope
        self._receive = receive
        self._send = send
        self._began_at_s = time.monotonic()
        self._hold: RequestHold | None = None
        self._logs_bodies = False
        self._start: Message | None = None
        """The response's head, until it is passed on."""
        self._status: int | None = None
        self._headers: dict[bytes, bytes] = {}
        self._content_type: str | None = None
        self._body = _Kept()
        self._streams = False
        self._is_complete = False
        self._client_left = False
        self._is_ended = False

    @property
    def meter(self) -> AsyncMeter:
        """The app's meter, or else that of the app it is mounted in. Raises `Refused`, TypeError."""
        meter = self.of_the_app("meter")
        if meter is None:
            raise problems.Refused(problems.no_meter())
        return require_async(meter)

    def of_the_app(self, name: str) -> Any:
        """What the app's state has by that name, or else that of the app it is mounted in; None where neither has."""
        found = getattr(self._state, name, None)
        return self._outer.of_the_app(name) if found is None and self._outer is not None else found

    async def reserve(self, meter: AsyncMeter, api_key: str, *, log_bodies: bool = False, **said: Any) -> RequestHold:
        """Reserve as `meter.reserve` does, for this request, and tell `scope["state"]`. Raises what that raises.

        The hold is renewed until the response is complete. With `log_bodies` the request log keeps `request`, one of
        `said`, and the response.
        """
        if self._hold is not None:
            raise RuntimeError("a request is metered on one line; record further lines with the meter itself")
        held = await meter.reserve(api_key, **said)
        await held.__aenter__()
        hold = self._hold = RequestHold(held)
        self._logs_bodies = log_bodies
        self._scope.setdefault("state", {}).update(account=hold.account, plan=hold.plan, remaining=hold.remaining)
        return hold

    async def receive(self) -> Message:
        """The request's next message."""
        message = await self._receive()
        self._client_left |= message["type"] == "http.disconnect"
        return message

    async def send(self, message: Message) -> None:
        """Pass on a message of the response; before its last one, book the call.

        A response that says its length is whole: nothing of it leaves until it is booked. Any other is a stream.
        """
        if self._hold is None or self._is_ended:
            await self._send(message)
        elif message["type"] == "http.response.start":
            self._begin(message)
            if self._streams:
                await self._pass_start()
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self._body.add(message.get("body", b""))
            self._is_complete = True
            fault = await self.end()
            if fault is not None and self._start is not None:
                await fault(self._scope, self._receive, self._send)
                return
            await self._pass_start()
            await self._pass(message)
        else:
            if self._status is not None:
                self._streams = True
                self._body.add(message.get("body", b""))
                await self._pass_start()
            await self._pass(message)

    async def end(self, error: BaseException | None = None) -> Answer | None:
        """Book or release the hold, once, and to the end even where this task is cancelled.

        What to answer instead, where the app settled in a way that cannot be booked.
        """
        if self._hold is None or self._is_ended:
            return None
        self._is_ended = True
        return await to_the_end(self._settle_or_release, self._hold, error)

    def _begin(self, start: Message) -> None:
        assert self._hold is not None
        headers = list(start.get("headers", ()))
        names = self._headers = {name.lower(): value for name, value in headers}
        self._status = start["status"]
        self._content_type = names[b"content-type"].decode("latin-1") if b"content-type" in names else None
        self._streams = b"content-length" not in names and self._status != problems.NO_CONTENT
        limits = problems.rate_limit_headers(self._hold.decision.limits, utc_now())
        self._start = {**start, "headers": headers + limits}

    async def _pass_start(self) -> None:
        start, self._start = self._start, None
        if start is not None:
            await self._pass(start)

    async def _pass(self, message: Message) -> None:
        try:
            await self._send(message)
        except OSError:  # as ASGI has it from 2.4 on
            self._client_left = True
            raise

    async def _settle_or_release(self, hold: RequestHold, error: BaseException | None) -> Answer | None:
        held, said = hold._held, hold._said
        hold._is_over = True
        failure = self._failure(hold, error)
        if said is None:
            if failure is not None and not held.cost_is_known:
                await _release(held, failure)
                return None
            said = hold._said = await self._unsaid(hold)
        is_reply = self._is_complete and not self._streams and failure is None and self._body.is_whole
        assert self._status is not None or not is_reply
        settlement = held.keeping(
            said,
            response=readable(self._body.data, self._content_type) if self._logs_bodies else None,
            reply=problems.stored_reply(self._status or 0, self._headers, self._body.data) if is_reply else None,
        )
        if settlement.call.latency_ms is None:
            latency_ms = int((time.monotonic() - self._began_at_s) * 1_000)
            settlement = replace(settlement, call=replace(settlement.call, latency_ms=latency_ms))
        try:
            is_priced = await _book(held, settlement)
        except LedgerError:
            logger.exception("%s could not be settled, nor be kept in the spool: it is not billed", held)
            held.let_go()
            return problems.own_fault()
        return None if is_priced else problems.own_fault()

    def _failure(self, hold: RequestHold, error: BaseException | None) -> object:
        """Why nothing is owed for this response; None where something is."""
        if self._status is None or not (self._is_complete or self._streams):
            return error or "no response"
        if not 200 <= self._status < 300:
            return f"HTTP {self._status}"
        is_apps = isinstance(error, Exception) and not self._client_left
        produced = hold._produced or self._body
        return error if is_apps and not produced.seen_bytes else None

    async def _unsaid(self, hold: RequestHold) -> Settlement:
        """The cost where the app did not say it."""
        held, usage = hold._held, hold._held.estimate
        if usage is None:
            return held.presumed_cost(None, estimated=held.cost_is_known)
        if self._streams:
            output_tokens = await asyncio.to_thread(self._count, hold._produced)
            usage = replace(usage, output_tokens=output_tokens, reasoning_tokens=0, output_audio_tokens=0)
            logger.warning("%s was not settled: %d tokens of output were counted", held, output_tokens)
        else:
            logger.warning("%s was not settled: its estimate is booked", held)
        return held.presumed_cost(usage, estimated=True)

    def _count(self, produced: _Kept | None) -> int:
        kept = produced or self._body
        text = kept.data.decode("utf-8", "replace")
        if produced is None and (self._content_type or "").startswith("text/event-stream"):
            lines = text.splitlines()
            text = "\n".join(line.removeprefix("data:").strip() for line in lines if line.startswith("data:"))
        return kept.in_proportion(_tokens_of(text))


class _Kept:
    """The first MAX_KEPT_BYTES of what goes by."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._kept_bytes = 0
        self.seen_bytes = 0

    def add(self, data: bytes) -> None:
        self.seen_bytes += len(data)
        part = bytes(data[: MAX_KEPT_BYTES - self._kept_bytes])
        if part:
            self._parts.append(part)
            self._kept_bytes += len(part)

    @property
    def is_whole(self) -> bool:
        return self._kept_bytes == self.seen_bytes

    @property
    def data(self) -> bytes:
        return b"".join(self._parts)

    def in_proportion(self, count: int) -> int:
        """What a count of what was kept comes to for all that was seen."""
        return count if self.is_whole else count * self.seen_bytes // self._kept_bytes


def require_async(meter: object) -> AsyncMeter:
    """The meter, if it is one for event loops. Raises TypeError."""
    if not isinstance(meter, AsyncMeter):
        raise TypeError(
            f"an app is metered by an AsyncMeter, which takes the same arguments as Meter and never blocks the event "
            f"loop; got {type(meter).__name__}"
        )
    return meter


def readable(body: object, content_type: str | None) -> object:
    """A body for the request log: what JSON says, or the body itself."""
    if isinstance(body, bytes) and "json" in (content_type or ""):
        with suppress(ValueError):
            return msgspec.json.decode(body)
    return body


def _tokens_of(text: str) -> int:
    try:
        from metering.tokens import count_tokens  # noqa: PLC0415  its tokenizer is an extra

        return count_tokens(text)
    except (ImportError, MeteringError) as exc:
        logger.warning("install 'tallystick[tokens]' to count tokens, four bytes are taken for one: %s", exc)
        return -(-len(text.encode()) // 4)


async def _book(held: AsyncHold, settlement: Settlement) -> bool:
    """Book a settlement; False where it leaves out what a rate of its plan needs, and is booked as estimated."""
    try:
        await held.book(settlement)
    except InvalidEvent:
        logger.exception("%s was settled without what its plan's rates need; it is booked as estimated", held)
        await held.book(replace(settlement, estimated=True, bodies=replace(settlement.bodies, replay=None)))
        return False
    return True


async def _release(held: AsyncHold, failure: object) -> None:
    try:
        await held.release(failure)
    except LedgerError:
        logger.warning("%s could not be released; it expires by itself", held, exc_info=True)
