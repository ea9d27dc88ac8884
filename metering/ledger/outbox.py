"""What Redis is to be told of the ledger: written with each change, sent after it, and again until it arrived.

Its numbers are also versions: a copy of an account that is older than `version_of` says is stale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from metering.admission.statements import statements
from metering.errors import StoreUnavailable
from metering.ledger.schema import outbox
from metering.ledger.types import instant_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from datetime import datetime

    from metering.admission.statements import Statement
    from metering.ledger.transactions import Cursor

__all__ = ["OutboxRow", "mark_sent", "no_one", "note", "tell", "unsent", "version_of"]

_SQL = statements()


@dataclass(frozen=True, slots=True, kw_only=True)
class OutboxRow:
    """One change that Redis has not been told yet."""

    seq: int
    account: str | None
    """None: every account."""
    recount: bool
    """Whether the counters of the account are to be counted anew."""
    created_at: datetime


def note(transaction: sa.Connection | Cursor, account: str | None, *, recount: bool = False, now: datetime) -> None:
    """Within a transaction: something that admissions depend on has changed, of one account or (None) of every one."""
    row = {"account": account, "recount": recount, "created_at": instant_text(now)}
    _execute(transaction, _SQL["insert_outbox"], row)


def version_of(transaction: sa.Connection | Cursor, account: str) -> int:
    """The number of the last change to an account; 0 where there was none."""
    return int(_execute(transaction, _SQL["find_version"], {"account": account}).fetchone()[0])


def unsent(connection: sa.Connection, most: int, *, above: int = 0) -> list[OutboxRow]:
    """The oldest rows that Redis has not been told, with numbers above one."""
    columns = [outbox.c[name] for name in OutboxRow.__slots__]
    query = (
        sa.select(*columns).where(outbox.c.sent_at.is_(None), outbox.c.seq > above).order_by(outbox.c.seq).limit(most)
    )
    return [OutboxRow(**row) for row in connection.execute(query).mappings()]


def mark_sent(connection: sa.Connection, seqs: Iterable[int], now: datetime) -> None:
    """Redis has been told these. What was marked before keeps its time."""
    connection.execute(
        outbox.update().where(outbox.c.seq.in_(list(seqs)), outbox.c.sent_at.is_(None)).values(sent_at=now)
    )


def no_one() -> None:
    """Whom to tell where there is no Redis."""


def tell(announce: Callable[[], object]) -> None:
    """After a commit: have Redis told. Raises `StoreUnavailable`, which says that the change stands."""
    try:
        announce()
    except StoreUnavailable as exc:
        raise StoreUnavailable(
            f"the ledger has this change, but Redis could not be told yet: the drain will tell it ({exc})"
        ) from exc


def _execute(transaction: sa.Connection | Cursor, statement: Statement, values: dict[str, Any]) -> Any:
    if isinstance(transaction, sa.Connection):
        is_postgres = transaction.dialect.name == "postgresql"
        return transaction.exec_driver_sql(statement.on_postgres if is_postgres else statement, values)
    return transaction.execute(statement, values)
