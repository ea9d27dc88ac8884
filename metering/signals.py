"""Signals: what an operation of an app tells the meter once its work is done, and the text and tokens of that work.

    search = Operation("search", emits_billing=True)

    async with search.run(meter.record, account="acme", caller_type=caller, idempotency_key=job_id) as run:
        found = await look_up(question)                        # add_tokens(reply), anywhere below, counts for this run
        run.emit(applied_learnings, found)
        return run.result(found)

What a run does never breaks the work it is about: what cannot be counted, recorded or understood is logged and left
out. Signals ask no limits; calls that have to are reserved, see `Meter.reserve`.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections import Counter
from contextlib import contextmanager, suppress
from contextvars import ContextVar, Token
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

from metering import checks
from metering.aio import to_the_end
from metering.billing.money import EXACT
from metering.errors import InvalidEvent, InvalidUsage
from metering.events import MAX_LINE, MAX_NAME, CallerType, TokenUsage, derive_event_id, new_event_id
from metering.payloads import reply_of
from metering.tokens import count_input_tokens
from metering.traces import UNKNOWN_MODEL, RunTokenTotals, TokenTotals

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sized
    from types import TracebackType
    from typing import Self

__all__ = [
    "AsyncFetched",
    "Fetched",
    "Operation",
    "Result",
    "Run",
    "Signal",
    "add_tokens",
    "applied_learnings",
    "extraction_tokens",
    "learnings_generated",
    "platform_pays",
]

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger("metering")


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """How much there was of what is sold on a line. `Meter.record` says what the fields may be."""

    line: str
    quantity: Decimal | int | None = None
    usage: TokenUsage | None = None


def extraction_tokens(text: str) -> Signal:
    """The input tokens of a text that was extracted from: of what the extractor was given, not of what it came from.

    Needs the extra `tokens`; raises what `count_input_tokens` does.
    """
    return Signal(line="extraction_tokens", usage=TokenUsage(input_tokens=count_input_tokens(text)))


def learnings_generated(count: int) -> Signal | None:
    """How many learnings came of an operation; None where there are none. Raises `InvalidEvent` for no count."""
    quantity = checks.quantity("count", count)
    return Signal(line="learnings_generated", quantity=quantity) if quantity else None


def applied_learnings(results: Sized) -> Signal | None:
    """How many results were surfaced, on the line `application`; None where there are none.

    Raises TypeError for what has no length, and for a text, which has one and is no list of results.
    """
    if isinstance(results, str | bytes):
        raise TypeError(f"applied_learnings takes the results, not a {type(results).__name__}")
    return Signal(line="application", quantity=len(results)) if len(results) else None


def platform_pays(config: object) -> bool:
    """Whether the platform pays for an LLM that is configured like this, and not the customer with a key of their own.

    The sign of an own key is an `api_key` with something in it, a string or pydantic's `SecretStr`, in the customer's
    configuration or in its part `llm`: a mapping, anything that reads like one, or an object with such attributes.
    Without a sign the platform pays, whatever else this is. Never raises.
    """
    return not (_holds_key(config) or _holds_key(_read(config, "llm")))


def _holds_key(config: object) -> bool:
    key = _read(config, "api_key")
    try:
        reveal = getattr(key, "get_secret_value", None)
        key = reveal() if callable(reveal) else key
        return isinstance(key, str) and key.strip() != ""
    except Exception:  # noqa: BLE001  of an object of whatever kind
        return False


def _read(config: object, name: str) -> object:
    try:
        if callable(get := getattr(config, "get", None)):
            return get(name)
        return config[name] if hasattr(config, "__getitem__") else getattr(config, name, None)
    except Exception:  # noqa: BLE001  of an object of whatever kind
        return None


@dataclass(frozen=True, slots=True)
class Operation:
    """A kind of work that is done for accounts. It tells the meter nothing unless it `emits_billing`.

    Raises `InvalidEvent` for a name that no event could have.
    """

    name: str
    emits_billing: bool = False

    def __post_init__(self) -> None:
        checks.text("operation", self.name, MAX_NAME)

    def run(
        self,
        record: Callable[..., object],
        *,
        account: str,
        caller_type: CallerType = "internal",
        run_id: object = None,
        request_id: object = None,
        session_id: object = None,
        idempotency_key: object = None,
        llm: object = None,
    ) -> Run:
        """One run of it, for `with` and `Meter.record`, or `async with` and `AsyncMeter.record`.

        `idempotency_key` is the same however often a job is tried: what it emits is then recorded once for each line,
        operation and account. `run_id` only says to which run it belongs, which may have many of them. Ids are strings,
        or what str() makes of them; those that no event could have are left out. `llm` is the customer's configuration,
        see `platform_pays`.
        """
        return Run(
            self,
            record,
            key=_text(idempotency_key).strip() or str(new_event_id()),
            said={
                "account": account,
                "operation": self.name,
                "caller_type": caller_type,
                "run_id": _id_that_can_be_kept("run_id", run_id),
                "request_id": _id_that_can_be_kept("request_id", request_id),
                "session_id": _id_that_can_be_kept("session_id", session_id),
                "platform_paid": platform_pays(llm),
            },
        )


def _text(value: object) -> str:
    try:
        return "" if value is None else str(value)
    except Exception:  # noqa: BLE001  of an object of whatever kind
        return ""


def _id_that_can_be_kept(field: str, value: object) -> str | None:
    # It may come from the caller of a request, who must not escape a bill by a strange one.
    text = _text(value)
    try:
        return checks.text(field, text, MAX_NAME) if text else None
    except InvalidEvent as exc:
        logger.warning("a signal goes without its %s: %s", field, exc.expected)
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result(Generic[T]):
    """What an operation came to, and the tokens that its run took."""

    value: T
    totals: RunTokenTotals


class Run:
    """One run of an operation: its tokens, and the signals it emits when it ends well. `Operation.run` makes it.

    What is emitted is recorded when the block ends, as one event a line, unless it ends by an exception, a timeout or a
    cancellation, or was skipped. Tokens and signals that come when it is over, as from a thread that went on after a
    timeout, are left out and counted in `dropped`: they never reach another run. All methods may be called from any
    thread. A run within a run has totals of its own.
    """

    def __init__(
        self, operation: Operation, record: Callable[..., object], *, key: str, said: dict[str, object]
    ) -> None:
        self.dropped = 0
        """Tokens and signals that were left out: they came when it did not run, or could not be understood."""
        self._operation = operation
        self._record = record
        self._key = key
        self._said = said
        self._lock = threading.Lock()
        self._by_model: dict[str, Counter[str]] = {}
        self._signals: dict[str, Signal] = {}
        self._emits = operation.emits_billing
        self._is_running = False
        self._outer: Token[Run | None] | None = None

    @property
    def totals(self) -> RunTokenTotals:
        """The tokens so far."""
        with self._lock:
            by_model = {model: TokenTotals(**counts) for model, counts in sorted(self._by_model.items())}
            counts = sum(self._by_model.values(), Counter[str]())
        return RunTokenTotals(**counts, by_model=by_model, flags=())

    def add(self, usage: object, *, provider: str | None = None, model: str | None = None) -> None:
        """Count what one call of a model took: a `TokenUsage`, or anything `TokenUsage.from_payload` reads.

        `provider` is as there. The model is the one that the payload names, unless it is given.
        """
        try:
            reply = reply_of(usage, provider)
        except InvalidUsage as exc:
            self._drop("tokens", exc)
            return
        with self._lock:
            if self._is_running:
                counts = self._by_model.setdefault(_text(model) or reply.model or UNKNOWN_MODEL, Counter())
                counts.update(reply.usage.to_dict(), model_calls=1)
                return
        self._drop("tokens", "it does not run")

    def emit(self, shape: Callable[P, Signal | None], /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Emit the signal that `shape(*args)` gives, if any: `run.emit(applied_learnings, results)`.

        `shape` is called now, if it matters. Counting a long text takes time that an event loop may not have:
        `await asyncio.to_thread(run.emit, extraction_tokens, text)`.
        """
        if not self._emits:
            return
        try:
            signal = shape(*args, **kwargs)
            if signal is None:
                return
            with self._lock:
                if self._is_running:
                    self._signals[signal.line] = _together(self._signals.get(signal.line), signal)
                    return
        except Exception as exc:  # noqa: BLE001  whatever it is, it is logged
            self._drop("a signal", exc)
            return
        self._drop("a signal", "it does not run")

    def skip(self) -> None:
        """Say that there was nothing to do: no signal is recorded."""
        self._emits = False

    def result(self, value: T) -> Result[T]:
        """The value, with the tokens so far."""
        return Result(value=value, totals=self.totals)

    def __enter__(self) -> Self:
        with self._lock:
            if self._outer is not None:
                raise RuntimeError(f"{self} was run before; make another one for each attempt")
            self._outer = _current.set(self)
            self._is_running = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for event in self._end(error):
            with self._without_harm(event):
                answer = self._record(**event)
                if inspect.iscoroutine(answer):
                    answer.close()
                    raise TypeError("a record that has to be awaited needs `async with`")

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        events = self._end(error)
        if events:
            await to_the_end(self._tell, events)

    def __repr__(self) -> str:
        return f"the run {self._key!r} of {self._operation.name!r}"

    async def _tell(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            with self._without_harm(event):
                answer = self._record(**event)
                if inspect.isawaitable(answer):
                    await answer

    def _end(self, error: BaseException | None) -> list[dict[str, Any]]:
        """From now on it is over. What there is to record."""
        with self._lock:
            self._is_running = False
        assert self._outer is not None
        # A generator's block may end in another context than it began in, or while another run is the current one.
        if _current.get() is self:
            with suppress(ValueError):
                _current.reset(self._outer)
        if error is not None or not self._emits:
            return []
        return [
            {
                **self._said,
                "line": line,
                "quantity": signal.quantity,
                "usage": signal.usage,
                "idempotency_key": str(derive_event_id("signal key", self._key, self._operation.name, line)),
            }
            for line, signal in self._signals.items()
        ]

    @contextmanager
    def _without_harm(self, event: dict[str, Any]) -> Iterator[None]:
        try:
            yield
        except Exception:
            logger.exception("%s could not record its signal on line %r", self, event["line"])

    def _drop(self, what: str, why: object) -> None:
        with self._lock:
            self.dropped += 1
        logger.warning("%s was given %s that is left out: %s", self, what, why)


_current: ContextVar[Run | None] = ContextVar("metering_run", default=None)


def add_tokens(usage: object, *, provider: str | None = None, model: str | None = None) -> None:
    """`Run.add` of the innermost run that this code was called in; without one, nothing.

    Tasks and `asyncio.to_thread` take the run with them. Threads of an executor of your own and generators do not: give
    them the run, and call its `add`.
    """
    run = _current.get()
    if run is not None:
        run.add(usage, provider=provider, model=model)


def _together(one: Signal | None, other: Signal) -> Signal:
    """Two signals of a line as one. Raises `InvalidEvent` for what no event could say."""
    if one is None:
        one = Signal(line=checks.text("line", other.line, MAX_LINE), quantity=Decimal(0), usage=TokenUsage())
    assert one.usage is not None
    quantity = checks.quantity("quantity", other.quantity or 0)
    usage = other.usage or TokenUsage()
    return Signal(
        line=one.line,
        quantity=checks.quantity("quantity", EXACT.add(Decimal(one.quantity or 0), quantity)),
        usage=TokenUsage(**(Counter(one.usage.to_dict()) + Counter(usage.to_dict()))),
    )


class Fetched:
    """A text that is fetched when it is first needed, and then no more: a gate and its operation share one.

    For threads. What `fetch` raises is raised, and the next who asks fetches again.
    """

    def __init__(self, fetch: Callable[[], str]) -> None:
        self._fetch = fetch
        self._lock = threading.Lock()
        self._text: str | None = None

    def text(self) -> str:
        """The text, exactly as it was fetched."""
        with self._lock:
            if self._text is None:
                self._text = self._fetch()
            return self._text


class AsyncFetched:
    """`Fetched` for the tasks of an event loop. Whoever fetches may be cancelled: the next one does."""

    def __init__(self, fetch: Callable[[], Awaitable[str]]) -> None:
        self._fetch = fetch
        self._lock = asyncio.Lock()
        self._text: str | None = None

    async def text(self) -> str:
        """The text, exactly as it was fetched."""
        async with self._lock:
            if self._text is None:
                self._text = await self._fetch()
            return self._text
