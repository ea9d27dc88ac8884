"""Closed periods in the ledger: what was frozen, final documents, and their numbers. `proving` proves them."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal, localcontext
from typing import TYPE_CHECKING, Any

import msgspec
import sqlalchemy as sa

from metering.billing.closing import (
    PeriodInputs,
    adjustments,
    billed_parts,
    composed,
    credit_note,
    numbered,
    voided,
)
from metering.billing.invoices import Invoice
from metering.billing.money import EXACT
from metering.errors import Conflict, InvalidSetting, InvoiceConflict, PeriodClosed, UnknownInvoice
from metering.ledger import admin_log, chains, plan_versions
from metering.ledger.schema import closes, events, frozen_inputs, invoice_items, invoices, issuers
from metering.ledger.types import decimal_text, instant_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from metering.plans import Plan

    FilesOf = Callable[[Invoice], tuple[bytes, bytes]]

__all__ = [
    "CLOSES",
    "DOCUMENTS",
    "Act",
    "CloseContent",
    "FinalDocument",
    "billed_of",
    "close_period",
    "document",
    "documents_of",
    "frozen_inputs_of",
    "frozen_of",
    "issue_credit_note",
    "later_events",
    "plans_in",
    "row_content",
    "taken_back",
    "void",
]

CLOSES, DOCUMENTS = "closes", "invoices"
"""The names of the two chains."""
ISSUER = re.compile(r"[A-Z0-9][A-Z0-9-]{0,30}", re.ASCII)
_NUMBER = re.compile(r"(?P<issuer>.+)-(?P<number>\d{6,9})", re.ASCII)


class CloseContent(msgspec.Struct, kw_only=True):
    """What a close says."""

    account: str
    period: str
    override: str | None
    inputs: dict[str, str]
    """Digests of what was frozen with it, by period."""
    documents: dict[str, str]
    """Digests of what was issued with it, by number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Act:
    """Who issues a document, when and as whom. `files_of` renders its CSV and HTML, of which the digests are kept."""

    issuer: str
    actor: str
    at: datetime
    files_of: FilesOf

    def __post_init__(self) -> None:
        if not ISSUER.fullmatch(self.issuer):
            raise InvalidSetting("METERING_ISSUER", self.issuer, "1 to 31 capital letters, digits and dashes")


@dataclass(frozen=True, slots=True, kw_only=True)
class FinalDocument:
    """One row of `invoices`."""

    seq: int
    number: str
    kind: str
    names: str | None
    account: str
    period: str
    issued_at: datetime
    document: bytes
    document_digest: str
    csv_digest: str
    html_digest: str
    inputs: tuple[tuple[str, int], ...]
    """Period and revision of the frozen inputs it was made of; its own period's first."""

    @property
    def invoice(self) -> Invoice:
        """The document, read."""
        return Invoice.from_json(self.document)

    def numbered(self, draft: Invoice) -> bytes:
        """A draft as this document would be, were it made of it: its canonical JSON."""
        return numbered(draft, self.number, self.issued_at).to_json()


def frozen_of(connection: sa.Connection, account: str | None = None) -> dict[str, dict[str, tuple[int, PeriodInputs]]]:
    """By account and period, of all that are closed: the newest revision of what was frozen, and its number."""
    newest = sa.select(
        frozen_inputs.c.account, frozen_inputs.c.period, sa.func.max(frozen_inputs.c.revision).label("revision")
    ).group_by(frozen_inputs.c.account, frozen_inputs.c.period)
    if account is not None:
        newest = newest.where(frozen_inputs.c.account == account)
    found = newest.subquery()
    query = sa.select(frozen_inputs).join(
        found,
        sa.and_(*(frozen_inputs.c[name] == found.c[name] for name in ("account", "period", "revision"))),
    )
    frozen: defaultdict[str, dict[str, tuple[int, PeriodInputs]]] = defaultdict(dict)
    for row in connection.execute(query):
        frozen[row.account][row.period] = row.revision, PeriodInputs.from_json(row.inputs)
    return frozen


def billed_of(connection: sa.Connection, account: str, *, before: int | None = None) -> dict[str, dict[str, Decimal]]:
    """By period and item, the signed sum of what final documents say of an account; of those before one, by `seq`."""
    query = sa.select(invoice_items.c.period, invoice_items.c.item_id, invoice_items.c.amount).where(
        invoice_items.c.account == account
    )
    if before is not None:
        query = query.where(invoice_items.c.seq < before)
    billed: defaultdict[str, dict[str, Decimal]] = defaultdict(dict)
    with localcontext(EXACT):
        for period, item_id, amount in connection.execute(query):
            billed[period][item_id] = billed[period].get(item_id, Decimal(0)) + amount
    return billed


def taken_back(connection: sa.Connection) -> set[tuple[str, str]]:
    """(account, period) of all that a void or a credit note says something of."""
    items = sa.select(invoice_items.c.account, invoice_items.c.period).distinct()
    query = items.join_from(invoice_items, invoices).where(invoices.c.kind != "invoice")
    return {(row.account, row.period) for row in connection.execute(query)}


def close_period(
    connection: sa.Connection,
    inputs: PeriodInputs,
    late: Sequence[PeriodInputs],
    act: Act,
    *,
    override: str | None = None,
) -> list[str]:
    """Within a write transaction: freeze a period of an account, and issue what it comes to; the numbers given.

    `late` is all that closed periods of the account come to now that more is known of, or were voided. Raises
    `PeriodClosed`, and what pricing raises; nothing is written then.
    """
    is_closed = sa.select(closes.c.close).where(closes.c.account == inputs.account, closes.c.period == inputs.period)
    if connection.execute(is_closed).first() is not None:
        raise PeriodClosed(inputs.account, inputs.period)
    plans, billed = plans_in(connection), billed_of(connection, inputs.account)
    adjusted = [each for each in late if adjustments(each, plans, billed.get(each.period, {}))[1]]
    drafts = composed(inputs, adjusted, plans, billed)
    frozen = {each.period: _freeze(connection, each, act.at) for each in (inputs, *late)}
    made_of = [frozen[each.period] for each in (inputs, *adjusted)]
    numbers = [_issue(connection, draft, act, inputs=made_of) for draft in drafts]
    content = CloseContent(
        account=inputs.account,
        period=inputs.period,
        override=override,
        inputs={each.period: each.digest for each in (inputs, *late)},
        documents={number: document(connection, number).document_digest for number in numbers},
    )
    row = {
        "account": inputs.account,
        "period": inputs.period,
        "period_end": inputs.period_end,
        "closed_at": act.at,
        "actor": act.actor,
        "override": override,
        "content": msgspec.json.encode(content, order="sorted").decode(),
    }
    connection.execute(closes.insert().values(**row, **_link(connection, CLOSES, row_content(row))))
    said: dict[str, Any] = {} if override is None else {"override": override}
    admin_log.note(
        connection,
        at=act.at,
        actor=act.actor,
        action="period.close",
        subject=inputs.account,
        period=inputs.period,
        documents=numbers,
        **said,
    )
    return numbers


def void(connection: sa.Connection, number: str, act: Act, *, reason: str) -> str:
    """Within a write transaction: take all of an invoice back by a new document; its number.

    What was billed with it is due again, with the account's next invoice. Raises `UnknownInvoice`, and
    `InvoiceConflict` for what is no invoice or was voided before.
    """
    found = _invoice_to_name(connection, number)
    return _name(connection, found, voided(found.invoice), act, reason, action="invoice.void", inputs=[])


def issue_credit_note(connection: sa.Connection, number: str, inputs: PeriodInputs, act: Act, *, reason: str) -> str:
    """Within a write transaction: give back what was billed too much of an invoice's period, by a new document.

    `inputs` is what the period comes to now. Raises `UnknownInvoice`, and `InvoiceConflict` where nothing was billed
    too much.
    """
    found = _invoice_to_name(connection, number)
    billed = billed_of(connection, found.account).get(found.period, {})
    invoice = found.invoice
    draft = credit_note(invoice, inputs, plans_in(connection), billed)
    if draft.currency != invoice.currency:
        raise InvoiceConflict(number, f"is in {invoice.currency}, and {found.period} is billed in {draft.currency}")
    if draft.total >= 0:
        raise InvoiceConflict(number, f"nothing was billed too much of {found.period}")
    revision = _freeze(connection, inputs, act.at)
    return _name(connection, found, draft, act, reason, action="invoice.credit", inputs=[revision])


def document(connection: sa.Connection, number: str) -> FinalDocument:
    """One final document. Raises `UnknownInvoice`."""
    parts = _NUMBER.fullmatch(number)
    if parts:
        query = sa.select(invoices).where(
            invoices.c.issuer == parts["issuer"], invoices.c.number == int(parts["number"])
        )
        for found in _documents(connection, query):
            if found.number == number:  # and not 0000001 for 000001
                return found
    raise UnknownInvoice(number)


def documents_of(
    connection: sa.Connection, *, period: str | None = None, account: str | None = None
) -> list[FinalDocument]:
    """The final documents of a period or of an account, in the order they were issued."""
    query = sa.select(invoices)
    if period is not None:
        query = query.where(invoices.c.period == period)
    if account is not None:
        query = query.where(invoices.c.account == account)
    return list(_documents(connection, query))


def later_events(connection: sa.Connection, inputs: PeriodInputs) -> set[int]:
    """The numbers of a period's events that were recorded after it was frozen so."""
    is_later = events.c.seq > inputs.last_seq
    if connection.dialect.name == "postgresql":
        # A lower number may be committed later; but after a restore into another server only the number tells.
        is_later |= sa.literal_column("events.commit_xid", sa.BigInteger) > inputs.watermark
    query = sa.select(events.c.seq).where(
        events.c.account == inputs.account, events.c.period == inputs.period, is_later
    )
    return set(connection.execute(query).scalars())


def row_content(row: Mapping[str, Any], items: Sequence[Mapping[str, Any]] = ()) -> tuple[bytes, ...]:
    """All that a row and its items say, as a chain has it."""
    left_out = ("close", "seq", "previous", "digest")
    said = {name: _plain(value) for name, value in row.items() if name not in left_out}
    listed = [[_plain(item[name]) for name in ("position", "account", "period", "item_id", "amount")] for item in items]
    return (msgspec.json.encode([said, listed], order="sorted"),)


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return instant_text(value)
    return decimal_text(value) if isinstance(value, Decimal) else value


def _link(connection: sa.Connection, chain: str, content: tuple[bytes, ...]) -> dict[str, str]:
    """The columns that chain a row with this content to the last one, whose place it takes."""
    head = chains.locked_head(connection, chain)
    digest = chains.digest_of(head.digest, content)
    chains.move_head(connection, chain, chains.Head(length=head.length + 1, digest=digest))
    return {"previous": head.digest, "digest": digest}


def frozen_inputs_of(connection: sa.Connection, found: FinalDocument, period: str, revision: int) -> PeriodInputs:
    """One revision of what a document was made of. Raises `InvoiceConflict` where it is not what was frozen."""
    row = connection.execute(
        sa.select(frozen_inputs.c.inputs, frozen_inputs.c.digest).where(
            frozen_inputs.c.account == found.account,
            frozen_inputs.c.period == period,
            frozen_inputs.c.revision == revision,
        )
    ).one_or_none()
    named = f"what was frozen of {period} (revision {revision})"
    if row is None:
        raise InvoiceConflict(found.number, f"{named} is missing")
    if hashlib.sha256(row.inputs.encode()).hexdigest() != row.digest:
        raise InvoiceConflict(found.number, f"{named} has changed")
    return PeriodInputs.from_json(row.inputs)


def _documents(connection: sa.Connection, query: sa.Select[Any]) -> Iterable[FinalDocument]:
    for row in connection.execute(query.order_by(invoices.c.seq)):
        yield FinalDocument(
            seq=row.seq,
            number=_number(row.issuer, row.number),
            kind=row.kind,
            names=row.names,
            account=row.account,
            period=row.period,
            issued_at=row.issued_at,
            document=row.document.encode(),
            document_digest=row.document_digest,
            csv_digest=row.csv_digest,
            html_digest=row.html_digest,
            inputs=tuple((period, revision) for period, revision in msgspec.json.decode(row.inputs)),
        )


def _invoice_to_name(connection: sa.Connection, number: str) -> FinalDocument:
    found = document(connection, number)
    if found.kind != "invoice":
        raise InvoiceConflict(number, f"is a {found.kind.replace('_', ' ')}, and no invoice")
    voids = sa.select(invoices.c.issuer, invoices.c.number).where(invoices.c.names == number, invoices.c.kind == "void")
    row = connection.execute(voids).first()
    if row is not None:
        raise InvoiceConflict(number, f"was voided by {_number(row.issuer, row.number)}")
    return found


def _name(
    connection: sa.Connection,
    found: FinalDocument,
    draft: Invoice,
    act: Act,
    reason: str,
    *,
    action: str,
    inputs: Sequence[tuple[str, int]],
) -> str:
    number = _issue(connection, draft, act, inputs=inputs, reason=reason)
    admin_log.note(
        connection,
        at=act.at,
        actor=act.actor,
        action=action,
        subject=found.account,
        invoice=found.number,
        document=number,
        reason=reason,
    )
    return number


def _issue(
    connection: sa.Connection,
    draft: Invoice,
    act: Act,
    *,
    inputs: Sequence[tuple[str, int]],
    reason: str | None = None,
) -> str:
    """Number a draft, and write it with its items."""
    last = connection.execute(sa.select(issuers.c.last_number).where(issuers.c.issuer == act.issuer)).scalar()
    if last is None:
        connection.execute(issuers.insert().values(issuer=act.issuer, last_number=1))
    else:
        connection.execute(
            issuers.update().where(issuers.c.issuer == act.issuer).values(last_number=issuers.c.last_number + 1)
        )
    serial = (last or 0) + 1
    final = numbered(draft, _number(act.issuer, serial), act.at)
    content = final.to_json()
    csv, html = act.files_of(final)
    items = [
        {"position": position, "account": final.account, "period": period, "item_id": item_id, "amount": amount}
        for position, (period, item_id, amount) in enumerate(billed_parts(final))
    ]
    row = {
        "issuer": act.issuer,
        "number": serial,
        "kind": final.kind,
        "names": final.names,
        "account": final.account,
        "period": final.period,
        "currency": final.currency,
        "total": final.total,
        "issued_at": act.at,
        "actor": act.actor,
        "reason": reason,
        "inputs": msgspec.json.encode(inputs).decode(),
        "document": content.decode(),
        "document_digest": hashlib.sha256(content).hexdigest(),
        "csv_digest": hashlib.sha256(csv).hexdigest(),
        "html_digest": hashlib.sha256(html).hexdigest(),
    }
    linked = _link(connection, DOCUMENTS, row_content(row, items))
    written = connection.execute(invoices.insert().values(**row, **linked))
    assert written.inserted_primary_key is not None
    if items:
        seq = written.inserted_primary_key[0]
        connection.execute(invoice_items.insert(), [{"seq": seq, **item} for item in items])
    assert final.number is not None
    return final.number


def _freeze(connection: sa.Connection, inputs: PeriodInputs, at: datetime) -> tuple[str, int]:
    """Period and revision of inputs that are frozen with this, or were before."""
    of_period = (frozen_inputs.c.account == inputs.account, frozen_inputs.c.period == inputs.period)
    query = sa.select(frozen_inputs.c.revision, frozen_inputs.c.digest, frozen_inputs.c.inputs).where(*of_period)
    rows = connection.execute(query.order_by(frozen_inputs.c.revision)).all()
    known = {row.digest: row.revision for row in rows}
    if rows and inputs.events < (there := PeriodInputs.from_json(rows[-1].inputs).events):
        raise Conflict(
            f"period {inputs.period} of account {inputs.account!r} has {there:,} events frozen, and {inputs.events:,} "
            "are known here: another run has frozen it meanwhile, or the warehouse lacks what it had"
        )
    if inputs.digest not in known:
        known[inputs.digest] = max(known.values(), default=-1) + 1
        connection.execute(
            frozen_inputs.insert().values(
                account=inputs.account,
                period=inputs.period,
                revision=known[inputs.digest],
                frozen_at=at,
                digest=inputs.digest,
                inputs=inputs.to_json(),
            )
        )
    return inputs.period, known[inputs.digest]


def plans_in(connection: sa.Connection) -> dict[int, Plan]:
    """Every plan version."""
    return {version.plan_version: version.plan for version in plan_versions.versions(connection)}


def _number(issuer: str, serial: int) -> str:
    return f"{issuer}-{serial:06d}"
