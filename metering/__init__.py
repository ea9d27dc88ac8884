"""In-process metering, hard quotas and usage events for apps that sell LLM-backed APIs.

`from metering import Meter`. Importing this package is light: each name is loaded at its first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from metering.admission.protocol import Decision, LimitStatus
    from metering.aio import AsyncHold, AsyncMeter
    from metering.billing.pricing import Rate
    from metering.errors import (
        IdempotencyConflict,
        IdempotencyInProgress,
        InvalidEvent,
        InvalidUsage,
        LimitExceeded,
        MeteringError,
        Replayed,
        RevokedKey,
        StoreUnavailable,
        UnknownAccount,
        UnknownKey,
    )
    from metering.events import TokenUsage, UsageEvent
    from metering.holds import Hold
    from metering.meter import Meter
    from metering.plans import Limit, Plan
    from metering.redaction import Redaction

__all__ = [
    "AsyncHold",
    "AsyncMeter",
    "Decision",
    "Hold",
    "IdempotencyConflict",
    "IdempotencyInProgress",
    "InvalidEvent",
    "InvalidUsage",
    "Limit",
    "LimitExceeded",
    "LimitStatus",
    "Meter",
    "MeteringError",
    "Plan",
    "Rate",
    "Redaction",
    "Replayed",
    "RevokedKey",
    "StoreUnavailable",
    "TokenUsage",
    "UnknownAccount",
    "UnknownKey",
    "UsageEvent",
]

_HOMES = {
    "AsyncHold": "aio",
    "AsyncMeter": "aio",
    "Decision": "admission.protocol",
    "Hold": "holds",
    "Limit": "plans",
    "LimitStatus": "admission.protocol",
    "Meter": "meter",
    "Plan": "plans",
    "Rate": "billing.pricing",
    "Redaction": "redaction",
    "TokenUsage": "events",
    "UsageEvent": "events",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'metering' has no attribute {name!r}")
    return getattr(import_module(f"metering.{_HOMES.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return __all__
