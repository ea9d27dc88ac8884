"""Facts as rows of the ledger: values in the form the database keeps them."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Any

from metering.events import TokenUsage, encode_attributes
from metering.ledger.types import decimal_text, instant_text

if TYPE_CHECKING:
    from datetime import datetime
    from uuid import UUID

    from metering.admission.protocol import Bodies
    from metering.events import Call

__all__ = ["event_row", "log_row"]

_NO_TOKENS = TokenUsage()


def event_row(
    call: Call,
    *,
    event_id: UUID,
    account: str,
    key_id: str | None,
    plan_version: int,
    period: str,
    occurred_at: datetime,
    recorded_at: datetime,
    usage: TokenUsage | None,
    quantity: Decimal | None,
    kind: str = "usage",
    corrects: UUID | None = None,
    caller_type: str = "production_agent",
    requests: int = 1,
    counted: bool = False,
    billable: bool = True,
    estimated: bool = False,
    late: bool = False,
    fingerprint: str | None = None,
    source: str | None = None,
) -> dict[str, Any]:
    """A row of `events`. A reversal (`requests` -1) holds its numbers negated."""
    counts = (usage or _NO_TOKENS).to_dict()
    if requests != 1:
        counts = {name: count * requests for name, count in counts.items()}
    return {
        **counts,
        "event_id": event_id.hex,
        "kind": kind,
        "corrects": None if corrects is None else corrects.hex,
        "account": account,
        "key_id": key_id,
        "plan_version": plan_version,
        "line": call.line,
        "operation": call.operation,
        "caller_type": caller_type,
        "occurred_at": instant_text(occurred_at),
        "recorded_at": instant_text(recorded_at),
        "period": period,
        "requests": requests,
        "quantity": decimal_text((quantity or Decimal(0)) * requests),
        "provider": call.provider,
        "model": call.model,
        "service_tier": call.service_tier,
        "run_id": call.run_id,
        "request_id": call.request_id,
        "session_id": call.session_id,
        "attributes": encode_attributes(call.attributes),
        "platform_paid": call.platform_paid,
        "billable": billable,
        "estimated": estimated,
        "counted": counted,
        "late": late,
        "error": call.error,
        "latency_ms": call.latency_ms,
        "idempotency_key": call.idempotency_key,
        "fingerprint": fingerprint,
        "source": source,
        "reason": None,
    }


def log_row(
    row: dict[str, Any], call: Call, bodies: Bodies, logged_at: datetime, hold_id: UUID | None
) -> dict[str, Any]:
    """A row of `request_log`, without `expires_at`, for the call that `row` (of `events`, or the like) tells of."""
    return {
        "event_id": row["event_id"],
        "hold_id": None if hold_id is None else hold_id.hex,
        "account": row["account"],
        "key_id": row["key_id"],
        "line": call.line,
        "operation": call.operation,
        "logged_at": instant_text(logged_at),
        "request": bodies.request,
        "response": bodies.response,
        "error": call.error,
        "latency_ms": call.latency_ms,
    }
