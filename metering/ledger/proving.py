"""Proofs of what is final: documents computed again, and closes and documents that are as they were written."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import sqlalchemy as sa

from metering.billing.closing import composed, credit_note, voided
from metering.errors import InvoiceConflict, UnknownInvoice
from metering.ledger import chains
from metering.ledger.closing import (
    CLOSES,
    DOCUMENTS,
    CloseContent,
    billed_of,
    document,
    frozen_inputs_of,
    plans_in,
    row_content,
)
from metering.ledger.schema import closes, frozen_inputs, invoice_items, invoices, issuers

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from metering.ledger.closing import FinalDocument

__all__ = ["chain_faults", "recomputed"]

MADE_OF = list[tuple[str, int]]
"""Periods and revisions of the frozen inputs of a document."""

_T = TypeVar("_T")


def recomputed(connection: sa.Connection, found: FinalDocument) -> bytes:
    """A final document's canonical JSON anew, from what was frozen and what was billed before it.

    Raises `InvoiceConflict` where frozen inputs are not those that were frozen.
    """
    if found.kind == "void":
        assert found.names is not None
        return found.numbered(voided(document(connection, found.names).invoice))
    inputs = [frozen_inputs_of(connection, found, *each) for each in found.inputs]
    plans, billed = plans_in(connection), billed_of(connection, found.account, before=found.seq)
    if found.kind == "credit_note":
        assert found.names is not None
        invoice = document(connection, found.names).invoice
        return found.numbered(credit_note(invoice, inputs[0], plans, billed.get(found.period, {})))
    for draft in composed(inputs[0], inputs[1:], plans, billed):
        if draft.currency == found.invoice.currency:
            return found.numbered(draft)
    raise InvoiceConflict(found.number, "what was frozen comes to no document in its currency")


def chain_faults(connection: sa.Connection) -> list[str]:
    """What of closes and final documents is not as it was written: a row, its place, its items, or what was frozen."""
    closed = _rows(connection, sa.select(closes).order_by(closes.c.close))
    issued = _rows(connection, sa.select(invoices).order_by(invoices.c.seq))
    items: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
    for item in _rows(connection, sa.select(invoice_items).order_by(*invoice_items.primary_key)):
        items[item["seq"]].append(item)
    found = [
        *_chain_faults(connection, CLOSES, "close", [(row["close"], row, row_content(row)) for row in closed]),
        *_chain_faults(
            connection,
            DOCUMENTS,
            "document",
            [(row["seq"], row, row_content(row, items[row["seq"]])) for row in issued],
        ),
        *_number_faults(connection, issued),
    ]
    for row in closed:
        named = f"close {row['close']} ({row['account']!r}, {row['period']})"
        found += [f"{named}: {each}" for each in _close_faults(connection, row)]
    made_of = {(row["account"], *each) for row in issued for each in _read(row["inputs"], MADE_OF) or ()}
    frozen = {
        (row["account"], *each)
        for row in closed
        if (content := _read(row["content"], CloseContent)) is not None
        for each in content.inputs.items()
    }
    for row in _rows(connection, sa.select(frozen_inputs)):
        key = (row["account"], row["period"])
        if (*key, row["revision"]) not in made_of and (*key, row["digest"]) not in frozen:
            found.append(f"what was frozen of {key[0]!r} in {key[1]} (revision {row['revision']}): nothing froze it")
    return found


def _rows(connection: sa.Connection, query: sa.Select[Any]) -> list[dict[str, Any]]:
    return [dict(row) for row in connection.execute(query).mappings()]


def _read(text: str, shape: type[_T]) -> _T | None:
    try:
        return msgspec.json.decode(text, type=shape)
    except msgspec.DecodeError:
        return None


def _chain_faults(
    connection: sa.Connection, chain: str, what: str, rows: Sequence[tuple[int, Mapping[str, Any], tuple[bytes, ...]]]
) -> Iterator[str]:
    links = (
        chains.Link(number=number, previous=row["previous"], digest=row["digest"], content=content)
        for number, row, content in rows
    )
    for fault in chains.faults(links, chains.head_of(connection, chain)):
        yield f"{what} {fault.entry}: {fault.problem}" if fault.entry is not None else f"{what}s: {fault.problem}"


def _number_faults(connection: sa.Connection, issued: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Where numbers are not 1, 2, 3 and so on, as far as their issuer has given any."""
    given: defaultdict[str, list[int]] = defaultdict(list)
    for row in issued:
        given[row["issuer"]].append(row["number"])
    for issuer, last in connection.execute(sa.select(issuers.c.issuer, issuers.c.last_number)):
        if sorted(given.pop(issuer, [])) != list(range(1, last + 1)):
            yield f"issuer {issuer}: its documents are not those numbered 1 to {last}"
    for issuer in given:
        yield f"issuer {issuer}: is not known, and has documents"


def _close_faults(connection: sa.Connection, row: Mapping[str, Any]) -> Iterator[str]:
    """Where a close and what it froze do not fit together."""
    content = _read(row["content"], CloseContent)
    if content is None:
        yield "cannot be read"
        return
    if (content.account, content.period, content.override) != (row["account"], row["period"], row["override"]):
        yield "is not of the account, the period or the override that was written"
    for period, digest in content.inputs.items():
        query = sa.select(frozen_inputs.c.inputs).where(
            frozen_inputs.c.account == content.account, frozen_inputs.c.period == period
        )
        if digest not in {hashlib.sha256(text.encode()).hexdigest() for text in connection.execute(query).scalars()}:
            yield f"what was frozen of {period} has changed"
    for number, digest in content.documents.items():
        try:
            if hashlib.sha256(document(connection, number).document).hexdigest() != digest:
                yield f"document {number} has changed"
        except UnknownInvoice:
            yield f"document {number} is missing"
