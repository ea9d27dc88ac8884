"""What an app says of a call, checked, in the form a store is asked. No I/O: both meters build their calls here."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Any, Unpack

from metering import checks
from metering.admission.protocol import Admission
from metering.bodies import bodies_of, hidden, kept_in_plain, masked_error, refuse_secret
from metering.errors import InvalidEvent
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

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from metering.redaction import Redaction

__all__ = ["Calls", "SecretGiven"]


class SecretGiven(Exception):
    """The API key was given as something that is kept in plain, too. If it is a key at all, `refusal` is the answer."""

    def __init__(self, refusal: InvalidEvent) -> None:
        super().__init__(refusal)
        self.refusal = refusal


class Calls:
    """Builds what `Meter` and `AsyncMeter` ask of their stores; the meaning of the arguments is told there."""

    def __init__(
        self, digest: Callable[[str], str], *, clock: Callable[[], datetime], hold_ttl_s: float, redact: Redaction
    ) -> None:
        self._digest = digest
        self._clock = clock
        self._hold_ttl_s = hold_ttl_s
        self._redact = redact

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
    ) -> Admission:
        """A call whose cost is known. Raises `InvalidEvent`, `SecretGiven`."""
        with hidden(api_key):
            call = Call(
                line=line,
                error=masked_error(error, _checked_secret(api_key), self._redact),
                latency_ms=latency_ms,
                idempotency_key=idempotency_key,
                **described,
            )
            return self._admission(api_key, call, usage, quantity, fingerprint, request, response, hold_ttl_s=None)

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
    ) -> Admission:
        """A call whose cost is not known yet. Raises `InvalidEvent`, `SecretGiven`."""
        with hidden(api_key):
            call = Call(line=line, idempotency_key=idempotency_key, **described)
            return self._admission(
                _checked_secret(api_key),
                call,
                estimate,
                quantity,
                fingerprint,
                request,
                None,
                hold_ttl_s=self._hold_ttl_s,
            )

    def signal(
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
    ) -> UsageEvent:
        """A fact that asks no limits. Raises `InvalidEvent`, and TypeError for an argument that is none."""
        unexpected = described.keys() - CallDescription.__annotations__.keys()
        if unexpected:
            raise TypeError(f"record() got an unexpected keyword argument {min(unexpected)!r}")
        return UsageEvent(
            event_id=(
                new_event_id() if idempotency_key is None else derive_event_id("signal", account, line, idempotency_key)
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

    def _admission(
        self,
        api_key: str,
        call: Call,
        usage: TokenUsage | None,
        quantity: Decimal | int | None,
        fingerprint: str | None,
        request: Any,
        response: Any,
        *,
        hold_ttl_s: float | None,
    ) -> Admission:
        if usage is not None and not isinstance(usage, TokenUsage):
            raise InvalidEvent("usage", usage, "a TokenUsage")
        try:
            refuse_secret(api_key, kept_in_plain(call) | {"fingerprint": fingerprint})
        except InvalidEvent as exc:
            raise SecretGiven(exc) from None
        keyed = call.idempotency_key is not None
        if fingerprint is not None:
            checks.text("fingerprint", fingerprint, 255)
        elif keyed:
            fingerprint = fingerprint_of(call.line, call.operation, request)
        return Admission(
            key_digest=self._digest(api_key),
            event_id=new_event_id(),
            call=call,
            usage=usage,
            quantity=None if quantity is None else checks.quantity("quantity", quantity),
            fingerprint=fingerprint,
            hold_ttl_s=hold_ttl_s,
            bodies=bodies_of(api_key, request, response, replayable=keyed, redact=self._redact),
        )


def _checked_secret(api_key: object) -> str:
    if not isinstance(api_key, str) or not api_key:
        raise InvalidEvent("api_key", type(api_key).__name__, "the key's secret, a string")
    return api_key
