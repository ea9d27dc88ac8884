"""Changes that admissions must not overlap."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa

from metering.ledger.schema import accounts

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["hold_still"]


def hold_still(connection: sa.Connection, names: Sequence[str] | sa.Select[str]) -> None:
    """Within a write transaction: nothing is admitted for these accounts until it ends, and what was is there to see.

    On SQLite nothing is admitted beside it anyhow. Rows are locked by name, as admissions do, so none wait in a ring.
    """
    if connection.dialect.name == "postgresql":
        query = sa.select(accounts.c.account).where(accounts.c.account.in_(names)).order_by(accounts.c.account)
        connection.execute(query.with_for_update(key_share=True)).all()
