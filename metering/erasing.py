"""An account's request to be deleted: what goes, and what has to stay, under which rule.

What is billed stays, and what proves it: amounts, times, models, and the ids that tell one call from another. What an
app may write freely of a call goes, and so do bodies, names and keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from metering.errors import Conflict, UnknownAccount
from metering.ledger import admin_log, outbox
from metering.ledger.locks import hold_still
from metering.ledger.retention import Rule, due, held_accounts, shrink, sweep
from metering.ledger.schema import (
    accounts,
    api_keys,
    archives,
    dead_letters,
    events,
    frozen_inputs,
    invoices,
    replays,
    request_log,
    spans,
    verdicts,
)
from metering.ledger.schema import admin_log as admin_entries
from metering.ledger.types import can_be_name

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from metering.ledger import Ledger

__all__ = ["Erasure", "Part", "erase"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Something that is known of an account."""

    what: str
    rows: int
    becomes: str
    """`deleted`, `emptied`, `revoked` or `stays`."""
    rule: str | None = None
    """Why it stays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Erasure:
    """What goes or went of an account, and what stays."""

    account: str
    gone: tuple[Part, ...]
    stays: tuple[Part, ...]


def erase(
    ledger: Ledger,
    account: str,
    *,
    actor: str,
    now: datetime,
    dry_run: bool = False,
    announce: Callable[[], object] = outbox.no_one,
) -> Erasure:
    """Erase what may be erased of an account, a few rows at a time; doing it again finds nothing left to do.

    `announce` has Redis told of the revoked keys. A `dry_run` writes nothing. Raises `UnknownAccount`, and `Conflict`
    where the account is on legal hold.
    """
    rules = _rules(account)
    with ledger.read() as connection:
        _require_free(connection, account)
        gone = _gone(connection, account, rules)
        stays = _stays(connection, account)
    found = Erasure(account=account, gone=gone, stays=stays)
    if dry_run or not gone:
        return found
    # First, so that nothing new comes, and what was begun is in the log.
    with ledger.write() as connection:
        hold_still(connection, [account])
        _require_free(connection, account)
        mine = api_keys.c.account == account
        connection.execute(api_keys.update().where(mine, api_keys.c.revoked_at.is_(None)).values(revoked_at=now))
        connection.execute(api_keys.update().where(mine).values(label=None))
        connection.execute(accounts.update().where(accounts.c.account == account).values(name=None, address=None))
        outbox.note(connection, account, now=now)
        counts = {part.what: part.rows for part in gone}
        admin_log.note(connection, at=now, actor=actor, action="account.erase", subject=account, rows=counts)
    outbox.tell(announce)
    for _, rule in rules:
        sweep(ledger, rule)
    shrink(ledger)
    return found


def _rules(account: str) -> list[tuple[str, Rule]]:
    free = (events.c.session_id, events.c.attributes, events.c.error)
    return [
        (
            "request log",
            Rule(
                table=request_log,
                keys=(request_log.c.logged_at, request_log.c.log_id),
                is_due=request_log.c.account == account,
                account=request_log.c.account,
                source=request_log,
            ),
        ),
        (
            "answers kept for retries",
            Rule(
                table=replays,
                keys=(replays.c.stored_at, replays.c.event_id),
                is_due=events.c.account == account,
                account=events.c.account,
                source=replays.join(events, events.c.event_id == replays.c.event_id),
            ),
        ),
        (
            "session, attributes and error of billed calls",
            Rule(
                table=events,
                keys=(events.c.occurred_at, events.c.seq),
                is_due=sa.and_(events.c.account == account, sa.or_(*(column.is_not(None) for column in free))),
                account=events.c.account,
                source=events,
                emptied=free,
            ),
        ),
    ]


def _require_free(connection: sa.Connection, account: str) -> None:
    known = sa.select(accounts.c.account).where(accounts.c.account == account)
    if not can_be_name(account) or connection.execute(known).first() is None:
        raise UnknownAccount(account)
    if account in held_accounts(connection):
        raise Conflict(f"account {account!r} is on legal hold: nothing of it may be erased until it is released")


def _gone(connection: sa.Connection, account: str, rules: list[tuple[str, Rule]]) -> tuple[Part, ...]:
    mine = api_keys.c.account == account
    named = sa.and_(
        accounts.c.account == account, sa.or_(accounts.c.name.is_not(None), accounts.c.address.is_not(None))
    )
    parts = [
        Part(what="keys", rows=_count(connection, api_keys, mine, api_keys.c.revoked_at.is_(None)), becomes="revoked"),
        Part(
            what="labels of keys",
            rows=_count(connection, api_keys, mine, api_keys.c.label.is_not(None)),
            becomes="emptied",
        ),
        Part(what="name and address", rows=_count(connection, accounts, named), becomes="emptied"),
    ]
    for what, rule in rules:
        goes, _ = due(connection, rule)
        parts.append(Part(what=what, rows=goes.total(), becomes="emptied" if rule.emptied else "deleted"))
    return tuple(part for part in parts if part.rows)


def _stays(connection: sa.Connection, account: str) -> tuple[Part, ...]:
    kept: list[tuple[str, int, str]] = [
        (
            "billed events, with the ids of calls and runs",
            _count(connection, events, events.c.account == account),
            "what is billed, and what tells one call from another, is kept as evidence of the bills",
        ),
        (
            "archives of events",
            _count(connection, archives, archives.c.account == account),
            "as the events in them, which are without session, attributes and error",
        ),
        (
            "final invoices, with name and address",
            _count(connection, invoices, invoices.c.account == account),
            "a final document never changes: it is kept as long as books must be",
        ),
        (
            "inputs of closed periods, with name and address",
            _count(connection, frozen_inputs, frozen_inputs.c.account == account),
            "final invoices are verified by them",
        ),
        (
            "traced spans",
            _count(connection, spans, spans.c.account == account),
            "bills are reconciled with them; they have no text of any call, and go by age once their period is closed",
        ),
        (
            "verdicts on runs",
            _count(connection, verdicts, verdicts.c.account == account),
            "what was corrected, and why",
        ),
        (
            "dead letters",
            _count(connection, dead_letters, dead_letters.c.account == account),
            "calls that could not be billed as they are; also what tells them apart when they come again",
        ),
        (
            "entries of the admin log",
            _count(connection, admin_entries, admin_entries.c.subject == account),
            "who changed what is only ever added to",
        ),
        ("account", 1, "its id is in what is billed"),
    ]
    return tuple(Part(what=what, rows=rows, becomes="stays", rule=rule) for what, rows, rule in kept if rows)


def _count(connection: sa.Connection, table: sa.Table, *conditions: Any) -> int:
    return int(connection.execute(sa.select(sa.func.count()).select_from(table).where(*conditions)).scalar_one())
