"""Who changed what: written in the transaction of the change, append-only, and each entry chained to the one before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import sqlalchemy as sa

from metering.ledger import chains
from metering.ledger.chains import Head, Link
from metering.ledger.schema import admin_log
from metering.ledger.types import instant_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from datetime import datetime

    from metering.ledger.chains import Fault

__all__ = ["AdminEntry", "entries", "note", "verify"]

CHAIN = "admin_log"
AT_ONCE = 1_000
"""Rows read at once; more of them need no more memory."""
_TEXTS = ("logged_at", "actor", "action", "subject", "details")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdminEntry:
    """One change: `actor` did `action` (such as `key.revoke`) to `subject`."""

    entry: int
    logged_at: datetime
    actor: str
    action: str
    subject: str
    details: dict[str, Any]
    digest: str
    """Over this entry and, by way of the one before, all that are older: 64 hex digits. See `chains`."""


def note(connection: sa.Connection, *, at: datetime, actor: str, action: str, subject: str, **details: Any) -> None:
    """Within a write transaction: write one entry."""
    head = chains.locked_head(connection, CHAIN)
    newest = connection.execute(sa.select(sa.func.max(admin_log.c.entry))).scalar()
    row = {
        "entry": (newest or 0) + 1,
        "actor": actor,
        "action": action,
        "subject": subject,
        "details": msgspec.json.encode(details, order="sorted").decode(),
    }
    digest = chains.digest_of(head.digest, _content({**row, "logged_at": instant_text(at)}))
    connection.execute(admin_log.insert().values(**row, logged_at=at, previous=head.digest, digest=digest))
    chains.move_head(connection, CHAIN, Head(length=head.length + 1, digest=digest))


def entries(connection: sa.Connection, *, limit: int) -> list[AdminEntry]:
    """The newest entries first."""
    columns = [admin_log.c[name] for name in AdminEntry.__slots__]
    rows = connection.execute(sa.select(*columns).order_by(admin_log.c.entry.desc()).limit(limit)).mappings()
    return [AdminEntry(**{**row, "details": msgspec.json.decode(row["details"])}) for row in rows]


def verify(connection: sa.Connection) -> tuple[Head, list[Fault]]:
    """Within a transaction: where the log ends, and every place where it is not as it was written."""
    head = chains.head_of(connection, CHAIN)
    return head, list(chains.faults(_links(connection), head))


def _links(connection: sa.Connection) -> Iterator[Link]:
    is_file = connection.dialect.name == "sqlite"

    def kept(name: str) -> sa.ColumnElement[Any]:
        column = admin_log.c[name]
        # A file keeps any bytes as text, also those that are none.
        stored = sa.cast(column, sa.LargeBinary) if is_file else sa.type_coerce(column, sa.Text)
        return stored.label(name)

    number = admin_log.c.entry
    query = sa.select(number, *map(kept, _TEXTS), kept("previous"), kept("digest")).order_by(number)
    for row in connection.execute(query, execution_options={"yield_per": AT_ONCE}).mappings():
        yield Link(
            number=row["entry"],
            previous=_bytes(row["previous"]).decode("utf-8", "replace"),
            digest=_bytes(row["digest"]).decode("utf-8", "replace"),
            content=_content(row),
        )


def _content(row: Mapping[str, Any] | sa.RowMapping) -> tuple[bytes, ...]:
    return (b"%d" % row["entry"], *(_bytes(row[name]) for name in _TEXTS))


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value
