"""Periods that are closed, as far as retention asks: with a close, and the inputs that were frozen with it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import sqlalchemy as sa

from metering.billing.closing import PeriodInputs
from metering.ledger import Ledger
from metering.ledger.schema import closes, events, frozen_inputs
from metering.windows import period_of_month
from tests.tasks.place import PERIOD

if TYPE_CHECKING:
    from tests.tasks.place import Place

__all__ = ["close"]


def close(place: Place, account: str, *, period: str = PERIOD, after_days: float = 2) -> datetime:
    """Close a period so many days after its end, or bill what came late to it since; when."""
    ledger = Ledger(place.ledger_url)
    window = period_of_month(period, time_zone="UTC", anchor_day=1)
    closed_at = window.end + timedelta(days=after_days)
    mine = sa.and_(closes.c.account == account, closes.c.period == period)
    with ledger.write() as connection:
        count = connection.execute(
            sa.select(sa.func.count()).where(events.c.account == account, events.c.period == period)
        ).scalar_one()
        archived = connection.exec_driver_sql("SELECT account, period, events FROM archives").all()
        count += sum(n for name, month, n in archived if (name, month) == (account, period))
        revision = connection.execute(
            sa.select(sa.func.count()).where(frozen_inputs.c.account == account, frozen_inputs.c.period == period)
        ).scalar_one()
        if connection.execute(sa.select(closes.c.close).where(mine)).first() is None:
            connection.execute(
                closes.insert().values(
                    account=account,
                    period=period,
                    period_end=window.end,
                    closed_at=closed_at,
                    actor="test",
                    content="{}",
                    previous="",
                    digest="",
                )
            )
        inputs = PeriodInputs(
            account=account,
            name=None,
            address=(),
            time_zone="UTC",
            active_from=None,
            period=period,
            period_start=window.start,
            period_end=window.end,
            plan_version=1,
            plans={},
            price_versions=(),
            usage=(),
            events=count,
            watermark=0,
            last_seq=0,
        )
        connection.execute(
            frozen_inputs.insert().values(
                account=account,
                period=period,
                revision=revision,
                frozen_at=datetime(2024, 1, 1, tzinfo=UTC),
                digest=inputs.digest,
                inputs=inputs.to_json(),
            )
        )
    ledger.close()
    return closed_at
