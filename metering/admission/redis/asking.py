"""What is asked of Redis for one admission, and what the answer means. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from decimal import localcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from metering.admission.counters import units_of
from metering.admission.decide import asked_of, missing_name, refusing, weigh
from metering.admission.last_known import KnownTerms
from metering.admission.protocol import Decision, HoldTicket, Standing
from metering.admission.redis.copies import from_us, rate_increment, scaled, unscaled
from metering.admission.redis.stream import StreamedEvent, encode
from metering.billing.money import EXACT
from metering.errors import IdempotencyConflict, IdempotencyInProgress, InvalidEvent, RevokedKey, StoreUnavailable
from metering.events import TokenUsage, derive_event_id, encode_attributes, new_event_id
from metering.ledger.types import decimal_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime
    from decimal import Decimal

    from metering.admission.decide import Verdict
    from metering.admission.protocol import Admission
    from metering.admission.redis.copies import AccountCopy, Frame, KnownKey
    from metering.events import Call
    from metering.plans import Limit, Plan

__all__ = ["Asker", "Terms", "reply_body", "require_names", "streamed"]

MAX_REPLY_BYTES = 4096

_NO_TOKENS = TokenUsage()


@dataclass(slots=True)
class Terms:
    """What an admission is asked on: a copy of its account, and the limits it meets in one stretch of time."""

    copy: AccountCopy
    frame: Frame
    key_id: str
    asked: Sequence[tuple[Limit, int | Decimal]]
    """How much of each limit."""
    units: Mapping[str, int | Decimal]
    more: tuple[Any, ...]
    """What else the script is told, after the frame and the amounts."""
    blobs: tuple[bytes, ...] = ()
    """The event and the reply."""
    refusal: InvalidEvent | None = None
    """Why it cannot be asked, unless it is a replay."""

    def known(self) -> KnownTerms:
        """What is worth remembering of it."""
        copy, frame = self.copy, self.frame
        return KnownTerms(copy.account, self.key_id, copy.plan, copy.plan_version, frame.period, frame.period_label)

    def said(self) -> list[Any]:
        """What the script is told, in the order of `admit.lua`."""
        frame, units = self.frame, self.units
        return [
            frame.said,
            [scaled(counter.metric, units[counter.metric]) for counter in frame.counters],
            [rate_increment(rate, units[rate.metric]) for rate in frame.rates],
            *self.more,
        ]

    def verdict(self, reply: list[Any]) -> Verdict:
        """Where the limits stand, weighed on the numbers Redis answered."""
        _, now_us, _, _, used, arrivals = reply
        frame = self.frame
        kept = {counter: unscaled(counter.metric, text) for counter, text in zip(frame.counters, used, strict=True)}
        arrived = {rate: unscaled(rate.metric, text) for rate, text in zip(frame.rates, arrivals, strict=True)}
        with localcontext(EXACT):
            return weigh(
                self.asked,
                key_id=self.key_id,
                period=frame.period,
                now=from_us(now_us),
                used=kept.__getitem__,
                arrival=arrived.__getitem__,
            )


class Asker:
    """One admission: what it asks on given terms, and what the answer means."""

    def __init__(self, admission: Admission, known: KnownKey) -> None:
        call = admission.call
        self._admission = admission
        self._known = known
        self._units = units_of(admission.usage, admission.quantity)
        self._hold_id = None if admission.hold_ttl_s is None else new_event_id()
        self._event_id = (
            admission.event_id
            if call.idempotency_key is None
            else derive_event_id("usage", known.account, call.line, call.idempotency_key)
        )
        self._event = b""

    def question(self, copy: AccountCopy, at: datetime) -> Terms:
        """What is asked on a copy of the account."""
        admission, call, key_id = self._admission, self._admission.call, self._known.key_id
        frame = copy.frame(call.line, key_id, at)
        self._event = encode(
            streamed(
                call,
                account=copy.account,
                key_id=key_id,
                plan_version=copy.plan_version,
                period=frame.period_label,
                usage=admission.usage,
                quantity=admission.quantity,
                fingerprint=admission.fingerprint,
            )
        )
        terms = Terms(
            copy,
            frame,
            key_id,
            (),
            self._units,
            self._more(frame),
            (self._event, reply_body(admission.bodies.replay)),
        )
        try:
            if self._hold_id is None:
                require_names(copy.plan, call, self._units)
            terms.asked = asked_of(
                frame.of_plan,
                call.line,
                self._units,
                usage_given=admission.usage is not None,
                quantity_given=admission.quantity is not None,
                is_estimate=self._hold_id is not None,
            )
        except InvalidEvent as exc:
            terms.refusal, terms.more = exc, self._more(frame, only="known")
        return terms

    def undo(self) -> dict[str, Any]:
        """What `Verbs.cancel` is told where no answer came."""
        admission = self._admission
        said = {
            "event_id": self._event_id.hex,
            "nonce": admission.event_id.hex,
            "keyed": admission.call.idempotency_key is not None,
        }
        if self._hold_id is not None:
            said["hold"] = self._hold_id.hex
        return {"account": self._known.account, "said": said, "event": self._event}

    def decision(self, terms: Terms, reply: list[Any]) -> Decision:
        """What the answer means. Raises what `AdmissionStore.admit` raises."""
        call, copy, account, key_id = self._admission.call, terms.copy, *self._known
        status, now_us, _, _, *rest = reply
        decided = partial(
            Decision,
            event_id=self._event_id,
            account=account,
            plan=copy.plan.name,
            plan_version=copy.plan_version,
            key_id=key_id,
        )
        match status:
            case b"admitted":
                # Most callers only ask whether they were let in.
                standing = Standing(lambda: terms.verdict(reply).statuses)
                return decided(allowed=True, limits=standing, hold=self._ticket(terms, now_us))
            case b"refused":
                verdict = terms.verdict(reply)
                return decided(allowed=False, limits=verdict.statuses, refused_by=refusing(verdict.refused))
            case b"replayed":
                (kept,) = rest
                response = None if kept is None else msgspec.json.decode(kept)
                return decided(allowed=True, replayed=True, response=response, response_expired=kept is None)
            case b"conflict":
                raise IdempotencyConflict(call.line, call.idempotency_key)
            case b"in_progress":
                raise IdempotencyInProgress(call.line, call.idempotency_key, rest[0] / 1e6)
            case b"revoked":
                raise RevokedKey(key_id, account)
            case b"full":
                raise StoreUnavailable(
                    f"shard {copy.shard} of Redis holds too many events that nobody has drained: "
                    "is `tallystick drain --follow` running?"
                )
        assert terms.refusal is not None
        raise terms.refusal

    def _more(self, frame: Frame, only: str = "") -> tuple[Any, ...]:
        admission = self._admission
        hold: tuple[Any, ...] | bool = False
        if self._hold_id is not None and admission.hold_ttl_s is not None:
            hold = (
                self._hold_id.hex,
                int(admission.hold_ttl_s * 1e6),
                admission.call.line,
                [counter.metric for counter in frame.counters],
                {metric: scaled(metric, amount) for metric, amount in self._units.items() if amount},
                self._known.account,
            )
        return (
            admission.event_id.hex,
            self._event_id.hex,
            admission.fingerprint or "",
            admission.call.idempotency_key is not None,
            only,
            hold,
        )

    def _ticket(self, terms: Terms, now_us: int) -> HoldTicket | None:
        admission = self._admission
        if self._hold_id is None or admission.hold_ttl_s is None:
            return None
        return HoldTicket(
            hold_id=self._hold_id,
            event_id=self._event_id,
            account=self._known.account,
            key_id=self._known.key_id,
            plan_version=terms.copy.plan_version,
            period=terms.frame.period_label,
            admitted_at=from_us(now_us),
            expires_at=from_us(now_us) + timedelta(seconds=admission.hold_ttl_s),
            usage=admission.usage,
            quantity=admission.quantity,
            fingerprint=admission.fingerprint,
        )


def require_names(plan: Plan, call: Call, units: Mapping[str, int | Decimal]) -> None:
    """Raise `InvalidEvent` where the call leaves out the provider or model that a rate of its plan needs."""
    missing = missing_name(plan, call, units)
    if missing is not None:
        name, rate = missing
        raise InvalidEvent(name, None, f"the {name}: the plan prices this usage by it ({rate})")


def reply_body(text: str | None) -> bytes:
    """What a replay answers, as Redis keeps it; empty where it is nothing, or too long."""
    body = b"" if text is None else text.encode("utf-8", "replace")
    return body if len(body) <= MAX_REPLY_BYTES else b""


def streamed(
    call: Call,
    *,
    account: str,
    key_id: str,
    plan_version: int,
    period: str,
    usage: TokenUsage | None,
    quantity: Decimal | None,
    fingerprint: str | None,
    estimated: bool = False,
) -> StreamedEvent:
    """A call as an event of the stream."""
    return StreamedEvent(
        account=account,
        key_id=key_id,
        plan_version=plan_version,
        period=period,
        line=call.line,
        operation=call.operation,
        provider=call.provider,
        model=call.model,
        service_tier=call.service_tier,
        run_id=call.run_id,
        request_id=call.request_id,
        session_id=call.session_id,
        attributes=encode_attributes(call.attributes),
        platform_paid=call.platform_paid,
        tokens=(usage or _NO_TOKENS).counts(),
        quantity=decimal_text(quantity or 0),
        estimated=estimated,
        error=call.error,
        latency_ms=call.latency_ms,
        idempotency_key=call.idempotency_key,
        fingerprint=fingerprint,
    )
