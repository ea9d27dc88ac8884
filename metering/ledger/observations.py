"""Probes in the ledger: what providers said of their limits over time."""

from __future__ import annotations

from collections import defaultdict
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from metering.ledger.schema import provider_probes, provider_windows
from metering.providers.forecast import Reading

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from metering.providers.forecast import Watched
    from metering.providers.probes import ProviderStatus

__all__ = ["readings_since", "record_statuses"]

MAX_PROBLEM = 1_000


def record_statuses(connection: sa.Connection, statuses: Iterable[ProviderStatus]) -> int:
    """Within a transaction: keep what was found; how many were not kept before.

    A status that several share, because it was asked for once, is kept once.
    """
    insert: Any = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}[connection.dialect.name]
    kept = 0
    for status in statuses:
        error = status.error
        probe = (
            insert(provider_probes)
            .values(
                credential=status.account_key,
                provider=status.provider,
                checked_at=status.checked_at,
                reachable=status.reachable,
                error=None if error is None else type(error).__name__,
                problem=None if error is None else str(error)[:MAX_PROBLEM],
                rate_limited=status.rate_limited,
                retry_after_s=None if status.retry_after_s is None else Decimal(str(round(status.retry_after_s, 3))),
                models=len(status.models),
                sample_model=status.sample_model,
                sample_input_tokens=status.sample_input_tokens,
                sample_output_tokens=status.sample_output_tokens,
                sample_latency_ms=status.sample_latency_ms,
                warnings=msgspec.json.encode(status.warnings).decode() if status.warnings else None,
            )
            .on_conflict_do_nothing()
            .returning(provider_probes.c.seq)
        )
        seq = connection.execute(probe).scalar_one_or_none()
        if seq is None:
            continue
        kept += 1
        readings = {name: Reading.of(status.checked_at, window) for name, window in status.windows.items()}
        rows = [
            {
                "seq": seq,
                "name": name,
                "limit_value": reading.limit,
                "remaining": reading.remaining,
                "percent_used": reading.percent_used,
                "reset_at": reading.reset_at,
            }
            for name, reading in readings.items()
        ]
        if rows:
            connection.execute(provider_windows.insert(), rows)
    return kept


def readings_since(connection: sa.Connection, start: datetime) -> dict[Watched, list[Reading]]:
    """What was read of each window from `start` on, oldest first."""
    query = (
        sa.select(
            provider_probes.c.credential,
            provider_probes.c.provider,
            provider_windows.c.name,
            provider_probes.c.checked_at,
            provider_windows.c.limit_value,
            provider_windows.c.remaining,
            provider_windows.c.percent_used,
            provider_windows.c.reset_at,
        )
        .join_from(provider_windows, provider_probes)
        .where(provider_probes.c.checked_at >= start)
        .order_by(provider_probes.c.checked_at, provider_probes.c.seq)
    )
    found: defaultdict[Watched, list[Reading]] = defaultdict(list)
    for credential, provider, name, checked_at, limit, remaining, percent, reset_at in connection.execute(query):
        found[credential, provider, name].append(
            Reading(checked_at=checked_at, limit=limit, remaining=remaining, percent_used=percent, reset_at=reset_at)
        )
    return dict(found)
