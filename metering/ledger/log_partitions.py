"""The request log on Postgres: a partition for each UTC day on which its rows go, dropped whole when the day is over.

Dropping a table costs nothing for each of its rows, and leaves none of them for VACUUM
(postgresql.org/docs/18/ddl-partitioning.html). Both making and dropping one locks the whole log for a moment, and
whoever waits for such a lock keeps those out who come later: so both are given up after LOCKED_MS, and tried again.
What has no partition lies in the default one, and goes row by row.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import msgspec
import sqlalchemy as sa

from metering.errors import StoreUnavailable
from metering.ledger.schema import legal_holds, plan_versions

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import date

    from metering.ledger import Ledger

__all__ = ["PARTITION", "drop_past", "make_ahead", "partitioned_days"]

logger = logging.getLogger("metering")

PARTITION = "request_log_"
DEFAULT = "request_log_default"
AHEAD_DAYS = 7
"""So many days a job may be late before rows fall into the default partition."""
LOCKED_MS = 50
ATTEMPTS = 5
PAUSE_S = 0.2

_FIND = """
SELECT c.relname FROM pg_inherits AS i JOIN pg_class AS c ON c.oid = i.inhrelid
WHERE i.inhparent = 'request_log'::regclass ORDER BY c.relname
"""


def partitioned_days(connection: sa.Connection) -> list[date]:
    """The days that have a partition of their own, oldest first."""
    names = connection.exec_driver_sql(_FIND).scalars()
    return [datetime.strptime(name, f"{PARTITION}%Y%m%d").date() for name in names if name != DEFAULT]  # noqa: DTZ007


def make_ahead(ledger: Ledger, now: datetime) -> int:
    """Make those that rows of the coming days fall into, by any plan there is; how many were made.

    A day that the default partition has rows of has none: they would have to be moved.
    """
    with ledger.read() as connection:
        documents = connection.execute(sa.select(plan_versions.c.document)).scalars()
        kept_days = {int(msgspec.json.decode(document)["retention_days"]) for document in documents}
        known = set(partitioned_days(connection))
        in_default = f"SELECT DISTINCT (expires_at AT TIME ZONE 'UTC')::date FROM {DEFAULT}"  # noqa: S608  ours
        known |= set(connection.exec_driver_sql(in_default).scalars())
    today = now.astimezone(UTC).date()
    wanted = {today + timedelta(days=days + ahead) for days in kept_days for ahead in range(AHEAD_DAYS + 1)}
    return sum(_briefly(ledger, _make, day) for day in sorted(wanted - known))


def drop_past(ledger: Ledger, now: datetime) -> Counter[str]:
    """Drop those whose day is over, but for what a legal hold keeps; how many rows of each account went."""
    today = now.astimezone(UTC).date()
    gone: Counter[str] = Counter()
    with ledger.read() as connection:
        past = [day for day in partitioned_days(connection) if day < today]
    for day in past:
        with ledger.read() as connection:
            query = f"SELECT account, count(*) FROM {_name(day)} GROUP BY account"  # noqa: S608  a date
            counts: dict[str, int] = dict(connection.exec_driver_sql(query).all())
        if _briefly(ledger, _drop, day):
            gone.update(counts)
    return gone


def _briefly(ledger: Ledger, change: Callable[[sa.Connection, date], bool], day: date) -> bool:
    """Whether it was done. No lock is held or waited for longer than LOCKED_MS."""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE_S)  # lets those pass who hold the lock; nothing tells when they have
        try:
            with ledger.write() as connection:
                connection.exec_driver_sql(
                    f"SET LOCAL lock_timeout = {LOCKED_MS}; SET LOCAL statement_timeout = {LOCKED_MS}"
                )
                return change(connection, day)
        except StoreUnavailable as exc:
            problem = exc
    logger.warning("the request log is busy, so its partitions stay as they are until the next run: %s", problem)
    return False


def _make(connection: sa.Connection, day: date) -> bool:
    end = day + timedelta(days=1)
    connection.exec_driver_sql(
        f"CREATE TABLE IF NOT EXISTS {_name(day)} PARTITION OF request_log "
        f"FOR VALUES FROM ('{day} 00:00:00+00') TO ('{end} 00:00:00+00')"
    )
    return True


def _drop(connection: sa.Connection, day: date) -> bool:
    # Holds are placed, and late logs are written, under the lock that this transaction has.
    held = sa.select(legal_holds.c.account).where(legal_holds.c.released_at.is_(None))
    is_kept = sa.select(sa.exists().where(sa.column("account").in_(held)).select_from(sa.table(_name(day))))
    if connection.execute(is_kept).scalar_one():
        return False
    connection.exec_driver_sql(f"DROP TABLE {_name(day)}")
    return True


def _name(day: date) -> str:
    return f"{PARTITION}{day:%Y%m%d}"
