"""Probes in the ledger: what providers said of their limits over time."""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from metering.ledger.schema import provider_probes, provider_windows
from metering.providers.forecast import Reading, fitting

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from metering.providers.forecast import Watched
    from metering.providers.probes import ProviderStatus

__all__ = ["Recorded", "readings_since", "record_statuses"]

MAX_PROBLEM = 1_000

logger = logging.getLogger("metering")


class Recorded(NamedTuple):
    """What became of statuses."""

    kept: int
    """Not those that were kept before."""
    refused: int
    """What no ledger can hold. Each is logged."""


def record_statuses(connection: sa.Connection, statuses: Iterable[ProviderStatus]) -> Recorded:
    """Within a transaction: keep what was found, each status whole or not at all, and none for the sake of another.

    A status that several share, because it was asked for once, is kept once.
    """
    kept = refused = 0
    for status in statuses:
        try:
            with connection.begin_nested():
                kept += _record(connection, status)
        except (sa.exc.OperationalError, sa.exc.InterfaceError):  # of the database, and not of the status
            raise
        except (sa.exc.SQLAlchemyError, ValueError, ArithmeticError) as exc:
            refused += 1
            logger.warning("a probe of %r is not kept: %s", status.account_key, type(exc).__name__)
    return Recorded(kept, refused)


def _record(connection: sa.Connection, status: ProviderStatus) -> bool:
    """Whether it was not kept before."""
    insert: Any = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}[connection.dialect.name]
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
            retry_after_s=None if status.retry_after_s is None else fitting(round(status.retry_after_s, 3)),
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
        return False
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
    return True


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
