"""Chains of rows: each carries a digest over the one before it and its own content, so none changes unseen.

A row's digest is SHA-256, as 64 hex digits, over netstrings (https://cr.yp.to/proto/netstrings.txt): first the digest
of the row before it, then each part of its content. The first row follows `EMPTY`. The head, how many rows there are
and the digest of the newest, lies in a table of its own, so a newest row that goes missing is missed too. Who can write
every table can also write a whole new chain: only a head that was written down elsewhere tells that.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa

from metering.ledger.schema import chains

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["EMPTY", "Fault", "Head", "Link", "digest_of", "faults", "head_of", "locked_head", "move_head"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """How far a chain goes."""

    length: int
    """How many rows it has."""
    digest: str
    """Of the newest one."""


EMPTY = Head(length=0, digest="0" * 64)
"""The head of a chain without a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One row of a chain, as it is kept."""

    number: int
    """Which row it is; numbers ascend, and may leave some out."""
    previous: str
    """The digest of the row before it."""
    digest: str
    content: tuple[bytes, ...]
    """What its digest is over, beside `previous`: all that the row says, its number included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What is wrong with a chain, and where."""

    entry: int | None
    """The number of the row; None for the chain as a whole."""
    problem: str


def digest_of(previous: str, content: Iterable[bytes]) -> str:
    """The digest of a row with this content, after the row whose digest is `previous`."""
    whole = hashlib.sha256()
    for part in (previous.encode(), *content):
        whole.update(b"%d:%b," % (len(part), part))
    return whole.hexdigest()


def faults(links: Iterable[Link], head: Head) -> Iterator[Fault]:
    """What is wrong with a chain, given all its rows, in the order of their numbers; nothing where it holds."""
    length, newest, is_over = 0, None, False
    follows = {EMPTY.digest}
    for link in links:
        length += 1
        if head.digest in follows and not is_over:
            is_over = True
            yield Fault(entry=link.number, problem="stands after the last entry that was written")
        digest = digest_of(link.previous, link.content)
        if digest != link.digest:
            yield Fault(entry=link.number, problem="is not as it was written: its digest is of other content")
        if link.previous not in follows:
            before = "the beginning" if newest is None else f"entry {newest}"
            yield Fault(
                entry=link.number, problem=f"does not follow {before}: something was removed, put in or moved there"
            )
        # Where only a row's own digest was changed, the next row follows what it was.
        follows = {link.digest, digest}
        newest = link.number
    if head.digest not in follows and not is_over:
        yield Fault(entry=newest, problem="is the newest there is, but not the last that was written")
    if length != head.length:
        yield Fault(entry=None, problem=f"{length} entries are there, {head.length} were written")


def head_of(connection: sa.Connection, name: str) -> Head:
    """Within a transaction: the head of the chain with this name."""
    return _head(connection, name, sa.select(chains.c.length, chains.c.digest))


def locked_head(connection: sa.Connection, name: str) -> Head:
    """Within a write transaction: the same, and nobody else adds to the chain until it ends."""
    return _head(connection, name, sa.select(chains.c.length, chains.c.digest).with_for_update())


def move_head(connection: sa.Connection, name: str, head: Head) -> None:
    """Within the transaction that has the head locked, and has written the row it now ends with."""
    row = {"length": head.length, "digest": head.digest}
    moved = connection.execute(chains.update().where(chains.c.name == name).values(row))
    if not moved.rowcount:
        connection.execute(chains.insert().values(name=name, **row))


def _head(connection: sa.Connection, name: str, query: sa.Select[int, str]) -> Head:
    row = connection.execute(query.where(chains.c.name == name)).first()
    return EMPTY if row is None else Head(length=row.length, digest=row.digest)
