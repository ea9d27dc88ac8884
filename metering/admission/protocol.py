"""What every admission store promises, and the words it is asked and answers in.

A store decides one admission in one atomic step, with no other writer in between:

1. Idempotency, scoped to (account, line): same key and fingerprint, replay and consume nothing; same key and another
   fingerprint, conflict; same key still in flight, in progress.
2. Every limit: if any would be exceeded, denied, and nothing is written.
3. All of it at once: counters, the event or the hold, the idempotency record.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime  # noqa: TC003  of records that msgspec reads
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Protocol
from uuid import UUID  # noqa: TC003

import msgspec

from metering.errors import LimitExceeded, Replayed, StoreUnavailable
from metering.events import Call, TokenUsage  # noqa: TC001

if TYPE_CHECKING:
    from collections.abc import Callable

    from metering.events import UsageEvent
    from metering.plans import Limit

__all__ = [
    "Admission",
    "AdmissionStore",
    "Appended",
    "AsyncAdmissionStore",
    "Bodies",
    "Decision",
    "HoldTicket",
    "LimitStatus",
    "Settled",
    "Settlement",
    "Standing",
    "Undecided",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bodies:
    """What the request log and replays keep of a call, already as JSON text. None: not kept."""

    request: str | None = None
    response: str | None = None
    replay: str | None = None
    """The response as a replay returns it; only with an idempotency key."""


class Admission(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One call that asks to be admitted."""

    key_digest: str
    event_id: UUID
    """Minted before the first send; used where the call has no idempotency key."""
    call: Call
    usage: TokenUsage | None
    """Real usage, or the estimate of a hold. None: not stated, an error where a limit counts tokens."""
    quantity: Decimal | None
    fingerprint: str | None
    hold_ttl_s: float | None = None
    """None: the cost is known, and the event is written at once."""
    bodies: Bodies = Bodies()


class Undecided(StoreUnavailable):
    """A call was sent, and no answer came in time. `undo` is what the store is to be told, lest it be admitted."""

    def __init__(self, message: str, undo: dict[str, Any]) -> None:
        super().__init__(message)
        self.undo = undo


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitStatus:
    """Where one limit stands, after the call if it was admitted, before it if not."""

    limit: Limit
    used: int | Decimal
    max: int | Decimal
    """For a rate: its burst."""
    asked: int | Decimal = 0
    reset_at: datetime | None = None
    """End of the window; for a rate, when its burst is whole again."""
    retry_after_s: float | None = None
    """Seconds until the refused units fit; None where the call was not refused by this, or will never fit."""

    @property
    def remaining(self) -> int | Decimal:
        """Units still to be had; 0 when overrun."""
        left = self.max - self.used
        return left if left > 0 else 0

    @property
    def share_left(self) -> Decimal:
        """`remaining` as a share of `max`, 0 to 1."""
        return Decimal(self.remaining) / (Decimal(self.max) or 1)

    @property
    def overrun(self) -> int | Decimal:
        """Units used above the limit, which only an estimate that was too low can cause."""
        over = self.used - self.max
        return over if over > 0 else 0


class Standing(Sequence[LimitStatus]):
    """Where limits stand, weighed when somebody first looks."""

    __slots__ = ("_statuses", "_weigh")

    def __init__(self, weigh: Callable[[], Sequence[LimitStatus]]) -> None:
        self._weigh = weigh
        self._statuses: Sequence[LimitStatus] | None = None

    def __getitem__(self, place: Any) -> Any:
        return self._weighed()[place]

    def __len__(self) -> int:
        return len(self._weighed())

    def __eq__(self, other: object) -> bool:
        return tuple(self) == (tuple(other) if isinstance(other, Standing) else other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))

    def _weighed(self) -> Sequence[LimitStatus]:
        if self._statuses is None:
            self._statuses = tuple(self._weigh())
        return self._statuses


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to one call."""

    allowed: bool
    event_id: UUID
    account: str
    plan: str
    plan_version: int
    key_id: str
    limits: Sequence[LimitStatus] = ()
    refused_by: LimitStatus | None = None
    """The refusing limit that takes longest to fit again."""
    replayed: bool = False
    response: Any = None
    """What a replay answers."""
    response_expired: bool = False
    """True for a replay whose stored response is no longer, or never was, kept."""
    hold: HoldTicket | None = None
    unchecked: bool = False
    """True where no limit was asked: the store was away, and the plan fails open. It is billed and counted later."""

    @property
    def tightest(self) -> LimitStatus | None:
        """The refusing limit, else the one with the smallest share left; None if unlimited, and for a replay."""
        if self.refused_by is not None:
            return self.refused_by
        return min(self.limits, key=lambda status: status.share_left, default=None)

    @property
    def remaining(self) -> int | Decimal | None:
        """Units left of the tightest limit; None if unlimited, and for a replay, which asks no limit."""
        return None if self.tightest is None else self.tightest.remaining

    @property
    def reset_at(self) -> datetime | None:
        """When the tightest limit resets; None where `remaining` is."""
        return None if self.tightest is None else self.tightest.reset_at

    def raise_for_refusal(self) -> None:
        """Raise `LimitExceeded` if a limit refused the call."""
        if self.refused_by is not None:
            raise LimitExceeded(self)

    def raise_unless_admitted(self) -> None:
        """Raise `LimitExceeded` for a refusal and `Replayed` for a replay."""
        self.raise_for_refusal()
        if self.replayed:
            raise Replayed(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldTicket:
    """A hold as its holder knows it: enough to settle it even where the store has forgotten it."""

    hold_id: UUID
    event_id: UUID
    account: str
    key_id: str
    plan_version: int
    period: str
    admitted_at: datetime
    """Decides the windows whose counters a settle moves."""
    expires_at: datetime
    usage: TokenUsage | None
    """The estimate."""
    quantity: Decimal | None
    fingerprint: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settlement:
    """The real cost of what a hold was made for."""

    hold: HoldTicket
    call: Call
    usage: TokenUsage
    quantity: Decimal
    estimated: bool = False
    bodies: Bodies = Bodies()


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """How a hold was settled."""

    event_id: UUID
    billable: bool
    """False where another attempt under the same idempotency key was billed first."""
    late: bool
    """The hold was gone: expired, released, or forgotten by the store."""
    repeated: bool = False
    """The same settle was made before; this one changed nothing."""
    pending: bool = False
    """The store was away: it is told later, and `billable` and `late` are what is expected of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Appended:
    """What became of a batch of facts that ask no limits."""

    inserted: int
    known: int
    """Already in the ledger, equal as far as their fingerprints tell."""
    conflicting: tuple[int, ...] = ()
    """Positions in the batch of facts whose id is taken by one with another fingerprint; not written."""


class AdmissionStore(Protocol):
    """One store. `now` is for tests; None is the store's own clock. All raise `StoreUnavailable` when it is away."""

    def admit(self, admission: Admission, now: datetime | None = None) -> Decision:
        """Decide one call. Raises UnknownKey, RevokedKey, IdempotencyConflict, IdempotencyInProgress, InvalidEvent."""

    def settle(self, settlement: Settlement, now: datetime | None = None) -> Settled:
        """Bill a hold's real cost, once. The same settle again changes nothing; another one raises SettleConflict."""

    def release(self, hold: HoldTicket, call: Call, bodies: Bodies, now: datetime | None = None) -> bool:
        """Give an open hold's quota back, without an event. False where it was no longer open."""

    def renew(self, hold: HoldTicket, ttl_s: float, now: datetime | None = None) -> bool:
        """Let an open hold live `ttl_s` from now. False where it was no longer open."""

    def expire(self, now: datetime | None = None) -> int:
        """Give back the quota of every hold past its time; how many."""

    def append(self, events: Sequence[UsageEvent], now: datetime | None = None) -> Appended:
        """Record facts that ask no limits, all or none. At most 10,000. Raises UnknownAccount."""

    def quota(self, account: str, key_id: str | None = None, now: datetime | None = None) -> tuple[LimitStatus, ...]:
        """Where each limit of the account stands; those per key only with `key_id`. Raises UnknownAccount."""


class AsyncAdmissionStore(Protocol):
    """The same promises, awaited: none of these blocks the event loop.

    A call that is cancelled is made in full or not at all. Any event loop may use the store.
    """

    async def admit(self, admission: Admission, now: datetime | None = None) -> Decision:
        """See `AdmissionStore.admit`."""

    async def settle(self, settlement: Settlement, now: datetime | None = None) -> Settled:
        """See `AdmissionStore.settle`."""

    async def release(self, hold: HoldTicket, call: Call, bodies: Bodies, now: datetime | None = None) -> bool:
        """See `AdmissionStore.release`."""

    async def renew(self, hold: HoldTicket, ttl_s: float, now: datetime | None = None) -> bool:
        """See `AdmissionStore.renew`."""

    async def expire(self, now: datetime | None = None) -> int:
        """See `AdmissionStore.expire`."""

    async def append(self, events: Sequence[UsageEvent], now: datetime | None = None) -> Appended:
        """See `AdmissionStore.append`."""

    async def quota(
        self, account: str, key_id: str | None = None, now: datetime | None = None
    ) -> tuple[LimitStatus, ...]:
        """See `AdmissionStore.quota`."""
