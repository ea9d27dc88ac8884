"""What the ledger knows of each shard: its epoch, and how far it was drained. A server that has less has lost data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa

from metering.ledger.schema import shards

if TYPE_CHECKING:
    from metering.ledger import Ledger

__all__ = ["announced", "begin", "known_of", "known_shards"]

ANNOUNCED = 0
"""The epoch of a shard that is about to be opened for the first time."""


def known_of(ledger: Ledger, shard: int) -> tuple[int, int] | None:
    """Epoch and drained sequence of a shard; None where it was never opened."""
    with ledger.read() as connection:
        row = connection.execute(sa.select(shards.c.epoch, shards.c.seq).where(shards.c.shard == shard)).first()
    return None if row is None or row.epoch == ANNOUNCED else (row.epoch, row.seq)


def known_shards(ledger: Ledger) -> list[int]:
    """The shards that were ever opened."""
    with ledger.read() as connection:
        query = sa.select(shards.c.shard).where(shards.c.epoch > ANNOUNCED).order_by(shards.c.shard)
        return list(connection.execute(query).scalars())


def announced(ledger: Ledger, shard: int) -> None:
    """Note that a shard is about to be opened, so that one that was and is gone is never taken for a new one."""
    with ledger.write() as connection:
        if connection.execute(sa.select(shards.c.shard).where(shards.c.shard == shard)).first() is None:
            connection.execute(shards.insert().values(shard=shard, epoch=ANNOUNCED, seq=0, lost=0))


def begin(ledger: Ledger, shard: int, epoch: int) -> None:
    """Note that a shard is in an epoch, unless it is in one as new already."""
    with ledger.write() as connection:
        connection.execute(
            shards.update().where(shards.c.shard == shard, shards.c.epoch < epoch).values(epoch=epoch, seq=0)
        )
