"""Holds as an app has them: a `with` block around a call whose cost is not known yet."""

from __future__ import annotations

import logging
import threading
import warnings
from dataclasses import replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from metering import checks
from metering.admission.protocol import Settlement
from metering.bodies import bodies_of, hidden, kept_in_plain, masked_error, refuse_secret
from metering.errors import InvalidEvent, LedgerError
from metering.events import TokenUsage

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from metering.admission.protocol import AdmissionStore, Decision, HoldTicket, Settled
    from metering.events import Call

__all__ = ["Hold", "Keeper", "UnsettledHold"]

logger = logging.getLogger("metering")

MOST_CLOSE_S = 30.0
"""A renewal under way is waited for, but a closing app is not held up for ever."""


class UnsettledHold(UserWarning):
    """A `with` block ended without settling its hold: the estimate was booked, marked `estimated`."""


class Hold:
    """Units reserved for a call. Made by `Meter.reserve`; settle it with the real usage before its block ends.

    Leaving the block without settling books the estimate and warns. An exception before settling gives the quota back.
    """

    def __init__(
        self, store: AdmissionStore, keeper: Keeper, decision: Decision, call: Call, *, secret: str, request: Any
    ) -> None:
        assert decision.hold is not None
        self.decision = decision
        self.settled: Settled | None = None
        """How it was settled; None so far."""
        self._ticket: HoldTicket = decision.hold
        self._store = store
        self._keeper = keeper
        self._call = call
        self._secret = secret
        self._request = request
        self._cost_is_known = False
        self._released = False
        self._unbooked: Settlement | None = None
        """What the store was told while it was away."""

    def __repr__(self) -> str:
        return f"<Hold {self._ticket.hold_id} of account {self._ticket.account!r}, line {self._call.line!r}>"

    def settle(
        self,
        usage: TokenUsage | None = None,
        *,
        quantity: Decimal | int | None = None,
        provider: str | None = None,
        model: str | None = None,
        service_tier: str | None = None,
        response: Any = None,
        latency_ms: int | None = None,
    ) -> Settled:
        """Bill the real cost, in the window the hold was made in; also after the hold has expired.

        What is not given here stays as `reserve` was told, but for the usage: an estimate is not a cost. The same
        settle twice is one; another one raises `SettleConflict`. Raises `InvalidEvent` for usage that cannot be or is
        left out, and for a provider or model left out that a rate of the plan needs.
        """
        self._cost_is_known = True
        with hidden(self._secret):
            call = replace(
                self._call,
                provider=provider or self._call.provider,
                model=model or self._call.model,
                service_tier=service_tier or self._call.service_tier,
                latency_ms=latency_ms,
            )
            refuse_secret(self._secret, kept_in_plain(call))
            if usage is None and self._ticket.usage is not None:
                raise InvalidEvent("usage", None, "a TokenUsage, as in the estimate; TokenUsage() if nothing was used")
            if usage is not None and not isinstance(usage, TokenUsage):
                raise InvalidEvent("usage", usage, "a TokenUsage")
            used = None if quantity is None else checks.quantity("quantity", quantity)
        if self.settled is None:
            self._call = call
        settlement = self._settlement(
            call, usage, self._ticket.quantity if used is None else used, response=response, estimated=False
        )
        try:
            return self._book(settlement)
        except LedgerError:
            self._unbooked = settlement
            raise

    def release(self, error: object = None) -> bool:
        """Give the quota back, without billing. False where the hold was no longer open."""
        self._keeper.remove(self._ticket)
        call = replace(self._call, error=masked_error(error, self._secret))
        bodies = bodies_of(self._secret, self._request, None, replayable=False)
        was_open = self._store.release(self._ticket, call, bodies)
        self._released = True
        return was_open

    def __enter__(self) -> Hold:
        self._keeper.add(self._ticket)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._keeper.remove(self._ticket)
        if self.settled is not None or self._released:
            return
        if error is not None and not self._cost_is_known:
            self._release_after(error)
            return
        # A settle that was refused says that the work was done: the estimate is billed rather than nothing.
        settlement = self._unbooked or self._settlement(
            self._call, self._ticket.usage, self._ticket.quantity, response=None, estimated=True
        )
        try:
            self._book(settlement)
        except LedgerError:
            if error is None:
                raise
            logger.exception("hold %s could not be settled: call settle again before it expires", self._ticket.hold_id)
            return
        if error is None and settlement.estimated:
            warnings.warn(
                f"hold {self._ticket.hold_id} on line {self._call.line!r} was not settled: its estimate was booked",
                UnsettledHold,
                stacklevel=2,
            )

    def _settlement(
        self, call: Call, usage: TokenUsage | None, quantity: Decimal | None, *, response: Any, estimated: bool
    ) -> Settlement:
        return Settlement(
            hold=self._ticket,
            call=call,
            usage=usage or TokenUsage(),
            quantity=quantity or Decimal(0),
            estimated=estimated,
            bodies=bodies_of(self._secret, self._request, response, replayable=call.idempotency_key is not None),
        )

    def _book(self, settlement: Settlement) -> Settled:
        self.settled = self._store.settle(settlement)
        self._keeper.remove(self._ticket)
        return self.settled

    def _release_after(self, error: BaseException) -> None:
        try:
            self.release(error)
        except LedgerError:
            # The app's own exception matters more, and an open hold gives its quota back when its time is over.
            logger.warning("hold %s could not be released; it expires by itself", self._ticket.hold_id, exc_info=True)


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
