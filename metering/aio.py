"""The meter for asyncio: `Meter`'s words with `await` and `async with`."""

from __future__ import annotations

import asyncio
import logging
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeVar

from metering.accounts import Accounts, Keys
from metering.admission.aio import AsyncSqlStore
from metering.admission.patient import AsyncPatientStore
from metering.calls import SecretGiven
from metering.errors import StoreUnavailable
from metering.holds import HeldCall, Hold, Release
from metering.meter import Meter, settings_from_env
from metering.redaction import SECRETS, Redaction
from metering.traces.keeping import kept_span

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator
    from types import TracebackType
    from uuid import UUID

    from metering.admission.protocol import (
        Admission,
        AsyncAdmissionStore,
        Decision,
        HoldTicket,
        LimitStatus,
        Settled,
        Settlement,
    )
    from metering.ledger import Ledger

__all__ = ["AsyncAccounts", "AsyncHold", "AsyncKeys", "AsyncMeter", "Reserving", "to_the_end"]

P = ParamSpec("P")
S = TypeVar("S")
T = TypeVar("T")

logger = logging.getLogger("metering")


class _InThreads(Generic[S]):
    """Stands for an object whose methods block: each is run in a thread of the event loop's own executor."""

    def __init__(self, blocking: S) -> None:
        self._blocking = blocking


def _in_thread(
    method: Callable[Concatenate[S, P], T],
) -> Callable[Concatenate[_InThreads[S], P], Coroutine[Any, Any, T]]:
    """The method, awaited. Cancelled, it goes on in its thread."""

    @wraps(method)
    async def awaited(self: _InThreads[S], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.to_thread(method, self._blocking, *args, **kwargs)

    return awaited


def _same_words(
    method: Callable[Concatenate[Any, P], Any],
) -> Callable[[Callable[Concatenate[S, ...], T]], Callable[Concatenate[S, P], T]]:
    """Gives a method the arguments and the documentation of its blocking counterpart."""

    def of(own: Callable[Concatenate[S, ...], T]) -> Callable[Concatenate[S, P], T]:
        return wraps(method, assigned=("__doc__",) if own.__doc__ is None else ())(own)

    return of


class AsyncKeys(_InThreads[Keys]):
    """`Keys`, awaited."""

    create = _in_thread(Keys.create)
    adopt = _in_thread(Keys.adopt)
    lookup = _in_thread(Keys.lookup)
    authenticate = _in_thread(Keys.authenticate)
    list = _in_thread(Keys.list)
    revoke = _in_thread(Keys.revoke)
    rotate = _in_thread(Keys.rotate)


class AsyncAccounts(_InThreads[Accounts]):
    """`Accounts`, awaited."""

    create = _in_thread(Accounts.create)
    get = _in_thread(Accounts.get)
    list = _in_thread(Accounts.list)
    change_plan = _in_thread(Accounts.change_plan)
    update = _in_thread(Accounts.update)


class AsyncMeter(_InThreads[Meter]):
    """Keys, quotas and usage events of one ledger, for event loops: what `Meter` says, awaited.

    Never blocks the loop. Concurrent tasks share commits. Any number of loops may use it at once; it survives fork.
    Making one opens the ledger, which is not awaited: make it when the app starts, and `aclose` it or use it as
    `async with AsyncMeter(...) as meter:`.
    """

    @_same_words(Meter.__init__)
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(Meter(*args, **options))
        meter = self._blocking
        self.accounts = AsyncAccounts(meter.accounts)
        self.keys = AsyncKeys(meter.keys)
        known = meter._last_known
        self._redis = None
        if meter._quota_place is not None and meter._redis is not None:
            self._redis = meter._quota_place.open_async(meter.ledger, meter._redis, known)
        self._store = AsyncPatientStore(
            self._redis or AsyncSqlStore(meter.ledger, known, clock=meter._clock), meter._store
        )
        self._keeper = _AsyncKeeper(self._renew, every_s=meter._hold_ttl_s / 3)

    @classmethod
    def from_env(cls, *, create: bool | None = None, actor: str = "app", redact: Redaction = SECRETS) -> AsyncMeter:
        """A meter as the METERING_* settings say; with none set, one SQLite file in `.tallystick`."""
        return cls(**settings_from_env(), create=create, actor=actor, redact=redact)

    @property
    def ledger(self) -> Ledger:
        """The ledger. Its own methods block."""
        return self._blocking.ledger

    @property
    def dropped(self) -> int:
        """Signals that `record`, and spans that `record_span`, could not keep since this meter was made."""
        return self._blocking.dropped

    authenticate = _in_thread(Meter.authenticate)
    usage = _in_thread(Meter.usage)
    log = _in_thread(Meter.log)
    apply_plans = _in_thread(Meter.apply_plans)
    correct = _in_thread(Meter.correct)

    @_same_words(Meter.consume)
    async def consume(self, api_key: str, **said: Any) -> Decision:
        return await self._store.admit(await self._asked(self._blocking._calls.consume, api_key, said))

    @_same_words(Meter.reserve)
    def reserve(self, api_key: str, **said: Any) -> Reserving:
        """Reserve quota for a call whose cost is not known yet; use it as `async with meter.reserve(...) as hold:`.

        `hold = await meter.reserve(...)` is the hold alone, to be settled or released whenever, and not renewed.
        An `async with` cannot skip its body, so this raises where the call may not run: `LimitExceeded` (carries the
        decision), `Replayed` (carries the stored response), and what `consume` raises. Cancelled, it reserves nothing.
        """
        return Reserving(self._reserve(api_key, said))

    @_same_words(Meter.record)
    async def record(self, *, account: str, line: str, **said: Any) -> bool:
        try:
            event = self._blocking._calls.signal(account=account, line=line, **said)
            try:
                await self._store.append([event])
            except StoreUnavailable:
                await self._store.append_later(event)
        except Exception:  # noqa: BLE001  whatever it is, it is logged
            self._blocking._note_drop(account, line)
            return False
        return True

    @_same_words(Meter.record_span)
    async def record_span(self, span: Any, **said: Any) -> bool:
        traces = self._blocking._traces
        try:
            spans = [kept_span(span, **said)]
            try:
                await self.ledger.writer.run_async(traces.work(spans))
            except StoreUnavailable:
                await asyncio.to_thread(traces.keep_later, spans)
        except Exception:  # noqa: BLE001  whatever it is, it is logged
            self._blocking._note_dropped_span()
            return False
        return True

    @_same_words(Meter.quota)
    async def quota(self, account: str, *, key_id: str | None = None) -> tuple[LimitStatus, ...]:
        if key_id is not None:
            await asyncio.to_thread(self._blocking._require_key, account, key_id)
        return await self._store.quota(account, key_id)

    @_same_words(Meter.expire_holds)
    async def expire_holds(self) -> int:
        return await self._store.expire()

    flush = _in_thread(Meter.flush)

    async def aclose(self) -> None:
        """Close every connection, after a last attempt to carry what waits in the spool."""
        self._keeper.close()
        if self._redis is not None:
            await self._redis.aclose()
        await asyncio.to_thread(self._blocking.close)

    async def __aenter__(self) -> AsyncMeter:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"<AsyncMeter on {self.ledger.where}>"

    async def _reserve(self, api_key: str, said: dict[str, Any]) -> AsyncHold:
        admission = await self._asked(self._blocking._calls.reserve, api_key, said)
        admitting = asyncio.create_task(self._store.admit(admission))
        was_cancelled = await _ended(admitting)
        try:
            decision = admitting.result()
            decision.raise_unless_admitted()
        except Exception:
            if was_cancelled:
                raise asyncio.CancelledError from None
            raise
        hold = AsyncHold(self._store, self._keeper, decision, admission, secret=api_key, redact=self._blocking._redact)
        if was_cancelled:
            await hold.__aexit__(asyncio.CancelledError, asyncio.CancelledError(), None)
            raise asyncio.CancelledError
        return hold

    async def _asked(
        self, build: Callable[Concatenate[str, ...], Admission], api_key: str, said: dict[str, Any]
    ) -> Admission:
        try:
            return build(api_key, **said)
        except SecretGiven as given:
            await self.keys.lookup(api_key)  # a stranger's key is unknown, whatever it spells
            raise given.refusal from None

    async def _renew(self, ticket: HoldTicket) -> bool:
        return await self._store.renew(ticket, self._blocking._hold_ttl_s)


class Reserving:
    """What `AsyncMeter.reserve` returns: `async with` it for a block that ends the hold, or `await` it for the hold."""

    def __init__(self, reserve: Coroutine[Any, Any, AsyncHold]) -> None:
        self._reserve = reserve

    def __await__(self) -> Generator[Any, Any, AsyncHold]:
        return self._reserve.__await__()

    async def __aenter__(self) -> AsyncHold:
        self._hold = await self._reserve
        return await self._hold.__aenter__()

    def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> Coroutine[Any, Any, None]:
        return self._hold.__aexit__(kind, error, traceback)


class AsyncHold(HeldCall):
    """Units reserved for a call. Made by `AsyncMeter.reserve`; settle it with the real usage before its block ends.

    Leaving the block without settling books the estimate and warns. An exception before settling gives the quota back,
    a cancelled task included: the end of the block is not cut short.
    """

    def __init__(
        self,
        store: AsyncAdmissionStore,
        keeper: _AsyncKeeper,
        decision: Decision,
        admission: Admission,
        *,
        secret: str,
        redact: Redaction,
    ) -> None:
        super().__init__(decision, admission, secret=secret, redact=redact)
        self._store = store
        self._keeper = keeper

    @_same_words(Hold.settle)
    async def settle(self, *args: Any, **said: Any) -> Settled:
        return await self.book(self.real_cost(*args, **said))

    async def book(self, settlement: Settlement) -> Settled:
        """Settle as `real_cost` or `presumed_cost` said. Raises what `settle` does."""
        with self._remembering(settlement):
            return await self._settle(settlement)

    @_same_words(Hold.release)
    async def release(self, error: object = None) -> bool:
        return await self._release(self._release_of(error))

    async def __aenter__(self) -> AsyncHold:
        self._keeper.add(self._ticket)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._keeper.remove(self._ticket)
        ending = self._ending(error)
        if ending is not None:
            with self._telling(ending, error):
                if isinstance(ending, Release):
                    await to_the_end(self._release, ending)
                else:
                    await to_the_end(self._settle, ending)

    def let_go(self) -> None:
        """Renew it no longer: it expires by itself."""
        self._keeper.remove(self._ticket)

    async def _settle(self, settlement: Settlement) -> Settled:
        self.settled = await self._store.settle(settlement)
        self._keeper.remove(self._ticket)
        return self.settled

    async def _release(self, release: Release) -> bool:
        self._keeper.remove(self._ticket)
        was_open = await self._store.release(release.hold, release.call, release.bodies)
        self._released = True
        return was_open


class _AsyncKeeper:
    """Renews the holds of running `async with` blocks, each in a task beside it."""

    def __init__(self, renew: Callable[[HoldTicket], Coroutine[Any, Any, bool]], *, every_s: float) -> None:
        self._renew = renew
        self._every_s = every_s
        self._tasks: dict[UUID, asyncio.Task[None]] = {}

    def add(self, ticket: HoldTicket) -> None:
        """Keep a hold open until it is removed."""
        self._tasks[ticket.hold_id] = asyncio.create_task(self._keep(ticket), name="metering-hold")

    def remove(self, ticket: HoldTicket) -> None:
        """Let a hold go; it may have been removed before."""
        task = self._tasks.pop(ticket.hold_id, None)
        if task is not None:
            task.cancel()

    def close(self) -> None:
        """Stop renewing, on whatever loops."""
        while self._tasks:
            _, task = self._tasks.popitem()
            loop = task.get_loop()
            if not loop.is_closed():
                loop.call_soon_threadsafe(task.cancel)

    async def _keep(self, ticket: HoldTicket) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            try:
                await self._renew(ticket)
            except Exception:
                logger.warning("hold %s could not be renewed", ticket.hold_id, exc_info=True)


async def to_the_end(ask: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `ask(...)` returns, awaited to its end even where this task is cancelled, which is raised afterwards.

    `asyncio.run` cancels every task of a loop that ends, once, and so also the one that asks: it is asked again.
    """
    asking = asyncio.create_task(ask(*args, **kwargs))
    was_cancelled = await _ended(asking)
    if asking.cancelled():
        asking = asyncio.create_task(ask(*args, **kwargs))
        was_cancelled |= await _ended(asking)
    answer = asking.result()
    if was_cancelled:
        raise asyncio.CancelledError
    return answer


async def _ended(task: asyncio.Task[Any]) -> bool:
    """Wait until the task has ended. Whether this task was cancelled meanwhile."""
    was_cancelled = False
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            was_cancelled = True
    return was_cancelled
