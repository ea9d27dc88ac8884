"""The meter: what an app calls, from the gate to the billed fact."""

from __future__ import annotations

import logging
import os
import weakref
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Unpack
from uuid import UUID

from metering import checks, corrections
from metering.accounts import Accounts, Keys
from metering.admission.protocol import Admission
from metering.admission.sql import SqlStore
from metering.bodies import bodies_of, hidden, kept_in_plain, masked_error, refuse_secret
from metering.clock import utc_now
from metering.errors import InvalidEvent, InvalidSetting, UnknownKey
from metering.events import (
    Call,
    CallDescription,
    CallerType,
    TokenUsage,
    UsageEvent,
    derive_event_id,
    fingerprint_of,
    new_event_id,
)
from metering.holds import Hold, Keeper
from metering.ledger import Ledger, plan_versions
from metering.ledger.queries import LogEntry, UsageBy, UsageTotal, request_log_of, usage_of
from metering.plans import parse_plans
from metering.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime
    from pathlib import Path
    from types import TracebackType

    import sqlalchemy as sa

    from metering.accounts import ApiKey
    from metering.admission.protocol import Decision, LimitStatus
    from metering.corrections import Correction

__all__ = ["Meter"]

logger = logging.getLogger("metering")

HOLD_TTL_S = 900.0
"""How long a hold lives without being renewed; `with` blocks renew theirs."""

_meters: weakref.WeakSet[Meter] = weakref.WeakSet()


class Meter:
    """Keys, quotas and usage events of one ledger. Thread-safe, survives fork, and is a context manager.

    `ledger_url` is `sqlite:///FILE`; a ledger that is not there is created (unless `create` is False), with the
    plans of `plans` (a TOML file) where that exists. `clock` is the time of every decision; `actor` is who the admin
    log names.
    """

    def __init__(
        self,
        ledger_url: str,
        *,
        plans: Path | None = None,
        create: bool = True,
        timeout_s: float = 5.0,
        key_pepper: str | None = None,
        clock: Callable[[], datetime] = utc_now,
        actor: str = "app",
        hold_ttl_s: float = HOLD_TTL_S,
        strict_signals: bool = False,
    ) -> None:
        self.ledger = Ledger(
            ledger_url,
            timeout_s=timeout_s,
            create=create,
            first=lambda connection: _apply_file(connection, plans, clock(), actor),
        )
        self.accounts = Accounts(self.ledger, clock=clock, actor=actor)
        self.keys = Keys(self.ledger, self.accounts, clock=clock, actor=actor, pepper=key_pepper)
        self.dropped = 0
        """Signals that `record` could not keep since this meter was made."""
        self._clock = clock
        self._store = SqlStore(self.ledger, clock=clock)
        self._hold_ttl_s = hold_ttl_s
        self._strict_signals = strict_signals
        self._keeper = self._new_keeper()
        _meters.add(self)

    @classmethod
    def from_env(cls, *, create: bool = True, actor: str = "app") -> Meter:
        """A meter as the METERING_* settings say; with none set, one SQLite file in `.tallystick`."""
        settings = Settings.from_env()
        return cls(
            settings.ledger_url,
            plans=settings.plans,
            timeout_s=settings.timeout_s,
            create=create,
            key_pepper=settings.key_pepper,
            actor=actor,
        )

    def authenticate(self, api_key: str) -> ApiKey:
        """The key behind a secret. Raises `UnknownKey`, `RevokedKey`."""
        return self.keys.authenticate(api_key)

    def consume(
        self,
        api_key: str,
        *,
        line: str,
        usage: TokenUsage | None = None,
        quantity: Decimal | int | None = None,
        idempotency_key: str | None = None,
        fingerprint: str | None = None,
        request: Any = None,
        response: Any = None,
        error: object = None,
        latency_ms: int | None = None,
        **described: Unpack[CallDescription],
    ) -> Decision:
        """Admit and bill a call whose cost is known: one atomic step of dedupe, every limit, and the event.

        A refusal is an answer (`decision.allowed`), not an exception. `request` and `response` are anything JSON can
        say. Raises UnknownKey, RevokedKey, IdempotencyConflict, IdempotencyInProgress, InvalidEvent, StoreUnavailable.
        """
        with hidden(api_key):
            call = Call(
                line=line,
                error=masked_error(error, _checked_secret(api_key)),
                latency_ms=latency_ms,
                idempotency_key=idempotency_key,
                **described,
            )
            admission = self._admission(api_key, call, usage, quantity, fingerprint, request, response=response)
        return self._store.admit(admission)

    def reserve(
        self,
        api_key: str,
        *,
        line: str,
        estimate: TokenUsage | None = None,
        quantity: Decimal | int | None = None,
        idempotency_key: str | None = None,
        fingerprint: str | None = None,
        request: Any = None,
        **described: Unpack[CallDescription],
    ) -> Hold:
        """Reserve quota for a call whose cost is not known yet; use it as `with meter.reserve(...) as hold:`.

        A `with` cannot skip its body, so this raises where the call may not run: `LimitExceeded` (carries the
        decision), `Replayed` (carries the stored response), and what `consume` raises.
        """
        with hidden(api_key):
            call = Call(line=line, idempotency_key=idempotency_key, **described)
            admission = self._admission(
                _checked_secret(api_key), call, estimate, quantity, fingerprint, request, hold_ttl_s=self._hold_ttl_s
            )
        decision = self._store.admit(admission)
        decision.raise_unless_admitted()
        return Hold(self._store, self._keeper, decision, call, secret=api_key, request=request)

    def record(
        self,
        *,
        account: str,
        line: str,
        usage: TokenUsage | None = None,
        quantity: Decimal | int | None = None,
        occurred_at: datetime | None = None,
        idempotency_key: str | None = None,
        caller_type: CallerType = "production_agent",
        **described: Unpack[CallDescription],
    ) -> bool:
        """Record a signal: a fact that asks no limits. True if it is in the ledger now, also from an earlier call.

        Never raises into the app: what cannot be kept is logged and counted in `dropped`. `dashboard` and `internal`
        callers are recorded, not billed.
        """
        try:
            unexpected = described.keys() - CallDescription.__annotations__.keys()
            if unexpected:
                raise TypeError(f"record() got an unexpected keyword argument {min(unexpected)!r}")  # noqa: TRY301
            event = UsageEvent(
                event_id=(
                    new_event_id()
                    if idempotency_key is None
                    else derive_event_id("signal", account, line, idempotency_key)
                ),
                kind="signal",
                account=account,
                line=line,
                usage=usage or TokenUsage(),
                quantity=Decimal(0) if quantity is None else checks.quantity("quantity", quantity),
                occurred_at=checks.instant("occurred_at", occurred_at or self._clock()),
                caller_type=caller_type,
                billable=caller_type == "production_agent",
                idempotency_key=idempotency_key,
                **described,
            )
            self._store.append([event])
        except Exception:
            if self._strict_signals:
                raise
            self.dropped += 1
            logger.exception("a signal of account %r on line %r was dropped", account, line)
            return False
        return True

    def correct(
        self,
        event_id: UUID,
        *,
        usage: TokenUsage | None = None,
        quantity: Decimal | int | None = None,
        provider: str | None = None,
        model: str | None = None,
        billable: bool | None = None,
        reason: str,
    ) -> Correction:
        """Book a reversal of a billed event, and a full replacement; None keeps a value. Twice the same is once.

        Raises `UnknownEvent`, and `CorrectionConflict` where other values replaced that event before.
        """
        if not isinstance(event_id, UUID):
            raise InvalidEvent("event_id", event_id, "a UUID")
        if usage is not None and not isinstance(usage, TokenUsage):
            raise InvalidEvent("usage", usage, "a TokenUsage")
        if billable is not None and not isinstance(billable, bool):
            raise InvalidEvent("billable", billable, "True, False or None")
        return corrections.correct(
            self.ledger,
            event_id,
            usage=usage,
            quantity=None if quantity is None else checks.quantity("quantity", quantity),
            provider=None if provider is None else checks.text("provider", provider, 255),
            model=None if model is None else checks.text("model", model, 255),
            billable=billable,
            reason=checks.text("reason", reason, 255),
            now=self._clock(),
        )

    def quota(self, account: str, *, key_id: str | None = None) -> tuple[LimitStatus, ...]:
        """Where each limit of an account stands now; limits per key only with `key_id`.

        Raises `UnknownAccount`, and `UnknownKey` for one that is not the account's.
        """
        if key_id is not None and key_id not in {key.key_id for key in self.keys.list(account)}:
            raise UnknownKey(f"account {account!r} has no API key with the id {key_id!r}")
        return self._store.quota(account, key_id)

    def usage(
        self,
        account: str,
        *,
        start: datetime | None = None,
        end: datetime | None = None,
        by: UsageBy | None = None,
    ) -> list[UsageTotal]:
        """What an account used in [start, end): one total, or one by line, model, day (UTC), key_id or operation."""
        return usage_of(self.ledger, account, start=_given("start", start), end=_given("end", end), by=by)

    def log(
        self,
        account: str | None = None,
        *,
        key_id: str | None = None,
        start: datetime | None = None,
        end: datetime | None = None,
        limit: int = 100,
    ) -> list[LogEntry]:
        """The request log of an account or a key in [start, end), the newest first."""
        return request_log_of(
            self.ledger,
            account=account,
            key_id=key_id,
            start=_given("start", start),
            end=_given("end", end),
            limit=limit,
        )

    def expire_holds(self) -> int:
        """Give back the quota of every hold past its time. Admissions do this for their own account anyway."""
        return self._store.expire()

    def close(self) -> None:
        """Close every connection."""
        self._keeper.close()
        self.ledger.close()

    def __enter__(self) -> Meter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Meter on {self.ledger.path}>"

    def _admission(
        self,
        api_key: str,
        call: Call,
        usage: TokenUsage | None,
        quantity: Decimal | int | None,
        fingerprint: str | None,
        request: Any,
        *,
        response: Any = None,
        hold_ttl_s: float | None = None,
    ) -> Admission:
        if usage is not None and not isinstance(usage, TokenUsage):
            raise InvalidEvent("usage", usage, "a TokenUsage")
        try:
            refuse_secret(api_key, kept_in_plain(call) | {"fingerprint": fingerprint})
        except InvalidEvent:
            self.keys.lookup(api_key)  # a stranger's key is unknown, whatever it spells
            raise
        keyed = call.idempotency_key is not None
        if fingerprint is not None:
            checks.text("fingerprint", fingerprint, 255)
        elif keyed:
            fingerprint = fingerprint_of(call.line, call.operation, request)
        return Admission(
            key_digest=self.keys.digest(api_key),
            event_id=new_event_id(),
            call=call,
            usage=usage,
            quantity=None if quantity is None else checks.quantity("quantity", quantity),
            fingerprint=fingerprint,
            hold_ttl_s=hold_ttl_s,
            bodies=bodies_of(api_key, request, response, replayable=keyed),
        )

    def _new_keeper(self) -> Keeper:
        ttl_s = self._hold_ttl_s
        return Keeper(lambda ticket: self._store.renew(ticket, ttl_s), every_s=ttl_s / 3)


def _given(field: str, at: datetime | None) -> datetime | None:
    if at is None:
        return None
    try:
        return checks.instant(field, at)
    except InvalidEvent as exc:
        raise InvalidSetting(field, at, exc.expected) from None


def _checked_secret(api_key: object) -> str:
    if not isinstance(api_key, str) or not api_key:
        raise InvalidEvent("api_key", type(api_key).__name__, "the key's secret, a string")
    return api_key


def _apply_file(connection: sa.Connection, path: Path | None, now: datetime, actor: str) -> None:
    """Write the plans of a TOML file, where there is one. Raises `InvalidPlan`."""
    if path is None or not path.exists():
        return
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise InvalidSetting("plans", str(path), f"a readable file ({exc})") from exc
    plan_versions.apply(connection, parse_plans(text).values(), now=now, actor=actor)


def _start_anew_after_fork() -> None:
    for meter in _meters:
        meter._keeper.start_anew()


os.register_at_fork(after_in_child=_start_anew_after_fork)
