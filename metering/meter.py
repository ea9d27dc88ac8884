"""The meter: what an app calls, from the gate to the billed fact."""

from __future__ import annotations

import logging
import os
import weakref
from typing import TYPE_CHECKING, Any, ParamSpec, TypedDict, Unpack
from uuid import UUID

from metering import checks, corrections
from metering.accounts import Accounts, Keys
from metering.admission.last_known import LastKnown
from metering.admission.patient import PatientStore
from metering.admission.places import QuotaPlace
from metering.admission.sql import SqlStore
from metering.calls import Calls, SecretGiven
from metering.clock import utc_now
from metering.courier import Courier
from metering.errors import InvalidEvent, InvalidSetting, StoreUnavailable, UnknownKey
from metering.events import CallDescription, CallerType, TokenUsage
from metering.holds import Hold, Keeper
from metering.ledger import Ledger, plan_versions
from metering.ledger.outbox import no_one, tell
from metering.ledger.queries import LogEntry, UsageBy, UsageTotal, request_log_of, usage_of
from metering.plans import parse_plans
from metering.redaction import SECRETS, Redaction
from metering.settings import Settings
from metering.traces.keeping import TraceStore, kept_span

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from datetime import datetime
    from decimal import Decimal
    from pathlib import Path
    from types import TracebackType

    import sqlalchemy as sa

    from metering.accounts import ApiKey
    from metering.admission.protocol import Decision, LimitStatus
    from metering.corrections import Correction
    from metering.ledger.plan_versions import PlanVersion
    from metering.plans import Plan

__all__ = ["Meter", "MeterSettings", "apply_file", "settings_from_env"]

P = ParamSpec("P")

logger = logging.getLogger("metering")

HOLD_TTL_S = 900.0
"""How long a hold lives without being renewed; `with` blocks renew theirs."""

_meters: weakref.WeakSet[Meter] = weakref.WeakSet()


class MeterSettings(TypedDict):
    """The arguments of a meter that have a METERING_* setting."""

    ledger_url: str
    plans: Path | None
    timeout_s: float
    key_pepper: str | None
    quota_url: str | None
    quota_timeout_s: float
    spool: Path
    allow_eviction: bool


def settings_from_env() -> MeterSettings:
    """What the METERING_* settings say. Raises `InvalidSetting`."""
    settings = Settings.from_env()
    return MeterSettings(
        ledger_url=settings.ledger_url,
        plans=settings.plans,
        timeout_s=settings.timeout_s,
        key_pepper=settings.key_pepper,
        quota_url=settings.quota_url,
        quota_timeout_s=settings.quota_timeout_s,
        spool=settings.spool,
        allow_eviction=settings.allow_eviction,
    )


class Meter:
    """Keys, quotas and usage events of one ledger. Thread-safe, survives fork, and is a context manager.

    `ledger_url` is `sqlite:///FILE` or `postgresql+psycopg://...`. With `create` a ledger that is not there is created,
    with the plans of `plans` (a TOML file) where that exists; unless said, a file is, and a schema on a server is not.
    `clock` is the time of every decision; `actor` is who the admin log names; `redact` says what of bodies and errors
    is not kept, unless said well-known secrets.

    With `quota_url` (`redis://`, `rediss://`, `redis+cluster://`) admissions are decided on Redis, each within
    `quota_timeout_s`, and reach the ledger by `tallystick drain`; what Redis could not be told waits in the folder
    `spool` (unless said: beside the ledger's file, or in `.tallystick`). Without it they are decided in the ledger
    itself.
    """

    def __init__(
        self,
        ledger_url: str,
        *,
        plans: Path | None = None,
        create: bool | None = None,
        timeout_s: float = 5.0,
        key_pepper: str | None = None,
        clock: Callable[[], datetime] = utc_now,
        actor: str = "app",
        hold_ttl_s: float = HOLD_TTL_S,
        strict_signals: bool = False,
        quota_url: str | None = None,
        quota_timeout_s: float = 0.25,
        spool: Path | None = None,
        allow_eviction: bool = False,
        redact: Redaction = SECRETS,
    ) -> None:
        if not isinstance(redact, Redaction):
            raise InvalidSetting("redact", type(redact).__name__, "a Redaction")
        self.ledger = Ledger(
            ledger_url,
            timeout_s=timeout_s,
            create=ledger_url.startswith("sqlite:") if create is None else create,
            first=lambda connection: apply_file(connection, plans, clock(), actor),
        )
        self._courier = Courier(spool or _spool_beside(self.ledger), self.ledger.ledger_id)
        self._last_known = LastKnown(clock)
        self._quota_place = None
        if quota_url is not None:
            self._quota_place = QuotaPlace(
                url=quota_url,
                timeout_s=quota_timeout_s,
                clock=None if clock is utc_now else clock,
                allow_eviction=allow_eviction,
            )
        self._redis = None
        if self._quota_place is not None:
            self._redis = self._quota_place.open(self.ledger, self._courier, self._last_known)
        self._announce: Callable[[], object] = no_one if self._redis is None else self._redis.announce
        self.accounts = Accounts(self.ledger, clock=clock, actor=actor, announce=self._announce)
        self.keys = Keys(
            self.ledger, self.accounts, clock=clock, actor=actor, pepper=key_pepper, announce=self._announce
        )
        self.dropped = 0
        """Signals that `record`, and spans that `record_span`, could not keep since this meter was made."""
        self._clock = clock
        self._actor = actor
        self._traces = TraceStore(self.ledger, self._courier, clock=clock)
        self._store = PatientStore(
            self._redis or SqlStore(self.ledger, self._last_known, clock=clock), self._courier, self._last_known
        )
        self._calls = Calls(self.keys.digest, clock=clock, hold_ttl_s=hold_ttl_s, redact=redact)
        self._hold_ttl_s = hold_ttl_s
        self._redact = redact
        self._strict_signals = strict_signals
        self._keeper = self._new_keeper()
        _meters.add(self)

    @classmethod
    def from_env(cls, *, create: bool | None = None, actor: str = "app", redact: Redaction = SECRETS) -> Meter:
        """A meter as the METERING_* settings say; with none set, one SQLite file in `.tallystick`."""
        return cls(**settings_from_env(), create=create, actor=actor, redact=redact)

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
        try:
            admission = self._calls.consume(
                api_key,
                line=line,
                usage=usage,
                quantity=quantity,
                idempotency_key=idempotency_key,
                fingerprint=fingerprint,
                request=request,
                response=response,
                error=error,
                latency_ms=latency_ms,
                **described,
            )
        except SecretGiven as given:
            raise self._refusal(api_key, given) from None
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
        try:
            admission = self._calls.reserve(
                api_key,
                line=line,
                estimate=estimate,
                quantity=quantity,
                idempotency_key=idempotency_key,
                fingerprint=fingerprint,
                request=request,
                **described,
            )
        except SecretGiven as given:
            raise self._refusal(api_key, given) from None
        decision = self._store.admit(admission)
        decision.raise_unless_admitted()
        return Hold(self._store, self._keeper, decision, admission, secret=api_key, redact=self._redact)

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
        """Record a signal: a fact that asks no limits. True if the ledger has it, or will: it may wait in the spool.

        Never raises into the app: what cannot be kept is logged and counted in `dropped`. `dashboard` and `internal`
        callers are recorded, not billed.
        """
        try:
            event = self._calls.signal(
                account=account,
                line=line,
                usage=usage,
                quantity=quantity,
                occurred_at=occurred_at,
                idempotency_key=idempotency_key,
                caller_type=caller_type,
                **described,
            )
            try:
                self._store.append([event])
            except StoreUnavailable:
                self._store.append_later(event)
        except Exception:  # noqa: BLE001  whatever it is, it is logged
            self._note_drop(account, line)
            return False
        return True

    def record_span(self, span: Any, *, account: str | None = None, run_id: str | None = None) -> bool:
        """Record what was traced of a call. True if the ledger has it, or will: it may wait in the spool.

        `span` is anything that `traces.read_span` takes, and must have a trace and a span id; the same span again is
        none. `account` and `run_id` stand above what it says itself. Its tokens, model, times and place in its trace
        are kept, its texts are not. Never raises into the app: what cannot be kept is logged and counted in `dropped`.
        """
        try:
            self._traces.keep([kept_span(span, account=account, run_id=run_id)])
        except Exception:  # noqa: BLE001  whatever it is, it is logged
            self._note_dropped_span()
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

        Raises `UnknownEvent` (also for one that Redis has and the drain has not brought yet), and `CorrectionConflict`
        where other values replaced that event before, or it is archived.
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
            announce=self._announce,
        )

    def quota(self, account: str, *, key_id: str | None = None) -> tuple[LimitStatus, ...]:
        """Where each limit of an account stands now; limits per key only with `key_id`.

        Raises `UnknownAccount`, and `UnknownKey` for one that is not the account's.
        """
        self._require_key(account, key_id)
        return self._store.quota(account, key_id)

    def usage(
        self,
        account: str,
        *,
        start: datetime | None = None,
        end: datetime | None = None,
        by: UsageBy | None = None,
    ) -> list[UsageTotal]:
        """What an account used in [start, end): one total, or one by line, model, day (UTC), key_id or operation.

        Raises `EventsArchived` where some of it has left the ledger: nothing is counted by halves.
        """
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

    def apply_plans(self, plans: Iterable[Plan], *, effective_from: datetime | None = None) -> list[PlanVersion]:
        """Write a version of each plan that differs from the one then in force. See `plan_versions.apply`."""
        with self.ledger.write() as connection:
            written = plan_versions.apply(
                connection, plans, now=self._clock(), actor=self._actor, effective_from=effective_from
            )
        tell(self._announce)
        return written

    def flush(self) -> None:
        """Carry what waits in the spool, of this process and of those that are gone.

        Raises `StoreUnavailable` where some of it has to go on waiting.
        """
        kept = self._courier.ship().kept
        if kept:
            raise StoreUnavailable(f"{kept} lines go on waiting in the spool: their store is away")

    def close(self) -> None:
        """Close every connection, after a last attempt to carry what waits in the spool."""
        self._keeper.close()
        self._courier.close()
        if self._redis is not None:
            self._redis.close()
        self.ledger.close()

    def __enter__(self) -> Meter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Meter on {self.ledger.where}>"

    def _refusal(self, api_key: str, given: SecretGiven) -> InvalidEvent:
        """What to raise for a key that was passed as something else. Raises `UnknownKey` for a stranger's."""
        self.keys.lookup(api_key)  # a stranger's key is unknown, whatever it spells
        return given.refusal

    def _require_key(self, account: str, key_id: str | None) -> None:
        if key_id is not None and key_id not in {key.key_id for key in self.keys.list(account)}:
            raise UnknownKey(f"account {account!r} has no API key with the id {key_id!r}")

    def _note_drop(self, account: str, line: str) -> None:
        """Within `except`: count and log the signal that could not be kept, or raise where signals are strict."""
        if self._strict_signals:
            raise  # noqa: PLE0704
        self.dropped += 1
        logger.exception("a signal of account %r on line %r was dropped", account, line)

    def _note_dropped_span(self) -> None:
        """Within `except`: as `_note_drop`, for a span."""
        if self._strict_signals:
            raise  # noqa: PLE0704
        self.dropped += 1
        logger.exception("a span was dropped")

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


def _spool_beside(ledger: Ledger) -> Path:
    return (ledger.path.parent if ledger.dialect == "sqlite" else Settings().home) / "spool"


def apply_file(connection: sa.Connection, path: Path | None, now: datetime, actor: str) -> None:
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
