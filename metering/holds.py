"""Holds as an app has them: a `with` block around a call whose cost is not known yet."""

from __future__ import annotations

import logging
import threading
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from metering import checks
from metering.admission.holding import settlement_digest
from metering.admission.protocol import Bodies, HoldTicket, Settlement
from metering.bodies import bodies_of, hidden, kept_in_plain, masked_error, refuse_secret, replay_of
from metering.errors import InvalidEvent, LedgerError, SettleConflict
from metering.events import Call, TokenUsage
from metering.payloads import reply_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from metering.admission.protocol import Admission, AdmissionStore, Decision, Settled
    from metering.redaction import Redaction

__all__ = ["HeldCall", "Hold", "Keeper", "Release", "UnsettledHold"]

logger = logging.getLogger("metering")

MOST_CLOSE_S = 30.0
"""A renewal under way is waited for, but a closing app is not held up for ever."""


class UnsettledHold(UserWarning):
    """A `with` block ended without settling its hold: the estimate was booked, marked `estimated`."""


@dataclass(frozen=True, slots=True)
class Release:
    """What a store is told to give a hold back."""

    hold: HoldTicket
    call: Call
    bodies: Bodies


class HeldCall:
    """A hold and the call it was made for: decides what is booked and when. `Hold` and `AsyncHold` ask the store."""

    def __init__(self, decision: Decision, admission: Admission, *, secret: str, redact: Redaction) -> None:
        assert decision.hold is not None
        self.decision = decision
        self.settled: Settled | None = None
        """How it was settled; None so far."""
        self.cost_is_known = False
        """Whether a settle was tried: the work was done, even where what it said was refused."""
        self._ticket: HoldTicket = decision.hold
        self._call = admission.call
        self._request = admission.bodies.request
        self._secret = secret
        self._redact = redact
        self._released = False
        self._unanswered: Settlement | None = None
        """What the store was told, without an answer."""
        self._waiting: Settlement | None = None
        """What waits in the spool."""

    def __repr__(self) -> str:
        ticket = self._ticket
        return f"<{type(self).__name__} {ticket.hold_id} of account {ticket.account!r}, line {self._call.line!r}>"

    @property
    def estimate(self) -> TokenUsage | None:
        """The tokens that were reserved; None where none were asked for."""
        return self._ticket.usage

    def real_cost(
        self,
        usage: object = None,
        *,
        quantity: Decimal | int | None = None,
        provider: str | None = None,
        model: str | None = None,
        service_tier: str | None = None,
        response: Any = None,
        latency_ms: int | None = None,
    ) -> Settlement:
        """What `settle` with these arguments books, told to nobody yet. Raises `InvalidEvent`."""
        self.cost_is_known = True
        with hidden(self._secret):
            if usage is None and self._ticket.usage is not None:
                raise InvalidEvent("usage", None, "a TokenUsage, as in the estimate; TokenUsage() if nothing was used")
            reply = reply_of(TokenUsage() if usage is None else usage, provider or self._call.provider)
            call = replace(
                self._call,
                provider=provider or self._call.provider or reply.provider,
                model=model or self._call.model or reply.model,
                service_tier=service_tier or self._call.service_tier,
                latency_ms=latency_ms,
            )
            refuse_secret(self._secret, kept_in_plain(call))
            used = None if quantity is None else checks.quantity("quantity", quantity)
        if self.settled is None:
            self._call = call
        return self._settlement(
            call,
            reply.usage,
            self._ticket.quantity if used is None else used,
            response=response,
            estimated=False,
        )

    def presumed_cost(self, usage: TokenUsage | None, *, estimated: bool) -> Settlement:
        """What is booked where the app has not said what the call cost: `usage`, and the quantity that was reserved."""
        return self._settlement(self._call, usage, self._ticket.quantity, response=None, estimated=estimated)

    def keeping(self, settlement: Settlement, *, response: Any, reply: Any) -> Settlement:
        """The settlement, with `response` for the request log and `reply` for replays. None keeps nothing."""
        logged = bodies_of(self._secret, None, response, replayable=False, redact=self._redact)
        replayable = settlement.call.idempotency_key is not None
        replay = replay_of(self._secret, reply) if replayable else None
        return replace(settlement, bodies=replace(settlement.bodies, response=logged.response, replay=replay))

    def _release_of(self, error: object) -> Release:
        """What `release(error)` tells the store."""
        return Release(
            self._ticket,
            replace(self._call, error=masked_error(error, self._secret, self._redact)),
            Bodies(request=self._request),
        )

    def _ending(self, error: BaseException | None) -> Settlement | Release | None:
        """What is still to be told at the end of the block; None where all is said."""
        if self.settled is not None or self._released:
            return None
        if error is not None and not self.cost_is_known:
            return self._release_of(error)
        # A settle that was refused says that the work was done: the estimate is billed rather than nothing.
        return self._unanswered or self.presumed_cost(self._ticket.usage, estimated=True)

    @contextmanager
    def _remembering(self, settlement: Settlement) -> Iterator[None]:
        """A block that asks for `settlement`: if no answer comes, the end of the hold's block asks again.

        Raises `SettleConflict` where another settlement waits in the spool: nobody is left to be told later.
        """
        if self._waiting is not None and settlement_digest(self._waiting) != settlement_digest(settlement):
            raise SettleConflict(f"{self} was settled before with other usage, which waits in the spool; that stands")
        try:
            yield
        except BaseException as exc:
            if isinstance(exc, LedgerError) or not isinstance(exc, Exception):
                self._unanswered = settlement
            raise
        if self.settled is not None and self.settled.pending:
            self._waiting = settlement

    @contextmanager
    def _telling(self, ending: Settlement | Release, error: BaseException | None) -> Iterator[None]:
        """A block that tells the store the ending. An outage is raised only where the app has no error of its own."""
        hold_id = ending.hold.hold_id
        try:
            yield
        except LedgerError:
            if error is None:
                raise
            if isinstance(ending, Release):
                logger.warning("hold %s could not be released; it expires by itself", hold_id, exc_info=True)
            else:
                logger.exception("hold %s could not be settled: call settle again before it expires", hold_id)
        else:
            if error is None and isinstance(ending, Settlement) and ending.estimated:
                warnings.warn(
                    f"hold {hold_id} on line {self._call.line!r} was not settled: its estimate was booked",
                    UnsettledHold,
                    stacklevel=4,  # this, contextlib, the end of the block, the app
                )

    def _settlement(
        self, call: Call, usage: TokenUsage | None, quantity: Decimal | None, *, response: Any, estimated: bool
    ) -> Settlement:
        is_keyed = call.idempotency_key is not None
        bodies = bodies_of(self._secret, None, response, replayable=is_keyed, redact=self._redact)
        return Settlement(
            hold=self._ticket,
            call=call,
            usage=usage or TokenUsage(),
            quantity=quantity or Decimal(0),
            estimated=estimated,
            bodies=replace(bodies, request=self._request),
        )


class Hold(HeldCall):
    """Units reserved for a call. Made by `Meter.reserve`; settle it with the real usage before its block ends.

    Leaving the block without settling books the estimate and warns. An exception before settling gives the quota back.
    """

    def __init__(
        self,
        store: AdmissionStore,
        keeper: Keeper,
        decision: Decision,
        admission: Admission,
        *,
        secret: str,
        redact: Redaction,
    ) -> None:
        super().__init__(decision, admission, secret=secret, redact=redact)
        self._store = store
        self._keeper = keeper

    def settle(
        self,
        usage: object = None,
        *,
        quantity: Decimal | int | None = None,
        provider: str | None = None,
        model: str | None = None,
        service_tier: str | None = None,
        response: Any = None,
        latency_ms: int | None = None,
    ) -> Settled:
        """Bill the real cost, in the window the hold was made in; also after the hold has expired.

        `usage` is a `TokenUsage`, or the provider's answer: a payload, an SDK's object or a `UsageStream`, see
        `metering.payloads`. What is not given here stays as `reserve` was told, but for the usage: an estimate is not a
        cost. A provider and a model that neither said are taken from the answer. The same settle twice is one; another
        one raises `SettleConflict`. Raises `InvalidEvent` for usage that cannot be or is left out, and for a provider
        or model left out that a rate of the plan needs. While the store is away it is not lost: it waits in the spool
        (`Settled.pending`), and is told once the store is back.
        """
        settlement = self.real_cost(
            usage,
            quantity=quantity,
            provider=provider,
            model=model,
            service_tier=service_tier,
            response=response,
            latency_ms=latency_ms,
        )
        with self._remembering(settlement):
            return self._settle(settlement)

    def release(self, error: object = None) -> bool:
        """Give the quota back, without billing. False where the hold was no longer open."""
        return self._release(self._release_of(error))

    def __enter__(self) -> Hold:
        self._keeper.add(self._ticket)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._keeper.remove(self._ticket)
        ending = self._ending(error)
        if ending is not None:
            with self._telling(ending, error):
                self._release(ending) if isinstance(ending, Release) else self._settle(ending)

    def _settle(self, settlement: Settlement) -> Settled:
        self.settled = self._store.settle(settlement)
        self._keeper.remove(self._ticket)
        return self.settled

    def _release(self, release: Release) -> bool:
        self._keeper.remove(self._ticket)
        was_open = self._store.release(release.hold, release.call, release.bodies)
        self._released = True
        return was_open


class Keeper:
    """Renews the holds of running `with` blocks, from one thread that lives as long as there are any."""

    def __init__(self, renew: Callable[[HoldTicket], bool], *, every_s: float) -> None:
        self._renew = renew
        self._every_s = every_s
        self._wake = threading.Condition()
        self._tickets: dict[Any, HoldTicket] = {}
        self._thread: threading.Thread | None = None

    def add(self, ticket: HoldTicket) -> None:
        """Keep a hold open until it is removed."""
        with self._wake:
            self._tickets[ticket.hold_id] = ticket
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="metering-holds", daemon=True)
                self._thread.start()

    def remove(self, ticket: HoldTicket) -> None:
        """Let a hold go; it may have been removed before."""
        with self._wake:
            self._tickets.pop(ticket.hold_id, None)

    def close(self) -> None:
        """Stop renewing. Afterwards no renewal is under way."""
        with self._wake:
            self._tickets.clear()
            self._wake.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(MOST_CLOSE_S)

    def start_anew(self) -> None:
        """In the child of a fork: the thread is not here, and the holds are the parent's to keep."""
        self._wake = threading.Condition()
        self._tickets = {}
        self._thread = None

    def _run(self) -> None:
        while True:
            with self._wake:
                if self._tickets:
                    self._wake.wait(self._every_s)
                if not self._tickets:
                    self._thread = None
                    return
                tickets = list(self._tickets.values())
            for ticket in tickets:
                if ticket.hold_id not in self._tickets:
                    continue
                try:
                    self._renew(ticket)
                except Exception:
                    logger.warning("hold %s could not be renewed", ticket.hold_id, exc_info=True)
