"""`tallystick trace`: the life of one call, from its admission to the invoice."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metering.cli.shared import AsJson, open_meter
from metering.console import fields_of, show

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from metering.history import History
    from metering.history.ledger import EventRow

__all__ = ["trace"]


def trace(
    key: Annotated[str, typer.Argument(help="An idempotency key, or the id of an event.")],
    account: Annotated[str | None, typer.Option(help="Only of this account.")] = None,
    line: Annotated[str | None, typer.Option(help="Only on this line.")] = None,
    as_json: AsJson = False,
) -> None:
    """All that became of a call: admission, hold, event, corrections, cost, and the item of an invoice.

    Where quotas are on Redis, also what the drain has not brought yet. Bodies are not shown: `tallystick log` does.
    Exit status 1: nothing is known of it.
    """
    from metering.history import histories_of
    from metering.settings import Settings

    with open_meter() as meter:
        found = histories_of(
            meter.ledger,
            key,
            account=account,
            line=line,
            out=Settings.from_env().out,
            link=None if meter._redis is None else meter._redis.link,
        )
    if as_json:
        show([fields_of(history) for history in found], as_json)
        return
    for history in found:
        under = f", idempotency key {history.idempotency_key}" if history.idempotency_key else ""
        typer.echo(f"account {history.account}, line {history.line}{under}")
        show(sorted(_moments(history), key=lambda row: row["at"]), as_json)
        for bill in history.bills:
            typer.echo(f"period {bill.period} ({_day(bill.period_start)} to {_day(bill.period_end)}): {bill.says}")
            for item in bill.items:
                typer.echo(f"  item {item.item_id}: {item.quantity:f} of {item.description}")
            if bill.document is not None:
                written = f"{bill.document.written_at:%Y-%m-%d %H:%M:%S}Z"
                typer.echo(f"  {bill.document.file}, written {written}, total {bill.document.total}")
                for text in bill.document.items:
                    typer.echo(f"  of all usage, item {text}")


def _moments(history: History) -> Iterator[dict[str, Any]]:
    """What happened, one row each; rows of one moment in the order in which it comes about."""
    keys = {key.key_id: f"key {key.key_id} ({key.begins}...{key.ends})" for key in history.keys}
    yield from _held(history, keys)
    for entry in history.undrained:
        what = "waits in Redis" if entry.kind == "event" else "cancel waits in Redis"
        yield _row(entry.admitted_at, what, entry.event_id, entry.position, keys.get(entry.key_id or "", ""))
    for event in history.events:
        if event.became not in ("reversal", "replacement"):
            asked = "asked the limits" if event.counted else "asked no limits"
            says = (keys.get(event.key_id or "", "no key"), f"plan {event.plan} version {event.version}", asked)
            yield _row(event.occurred_at, "admitted" if event.counted else "happened", event.event_id, *says)
        yield _row(event.recorded_at, event.became, event.event_id, *_of_event(event))
        if event.costed_at is not None:
            cost = "no price known" if event.cost is None else f"{event.cost:f} USD"
            yield _row(event.costed_at, "costed", event.event_id, cost, event.price_version or "")
    for logged in history.log:
        kept = [name for name, has in (("request", logged.has_request), ("response", logged.has_response)) if has]
        bodies = f"has {' and '.join(kept)}" if kept else "no bodies"
        yield _row(logged.logged_at, "request log", logged.event_id or logged.hold_id, bodies, logged.error or "")
    for reuse in history.reuses:
        billed = "the same request: not billed again" if reuse.billed_as is None else "another request: billed too"
        yield _row(reuse.noticed_at, "key used again", reuse.billed_as, billed, reuse.position)
    for letter in history.dead_letters:
        state = "open" if letter.resolved_at is None else "resolved"
        yield _row(
            letter.noticed_at, f"dead letter {letter.dead_letter_id}", None, state, letter.position, letter.error
        )


def _held(history: History, keys: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    for hold in history.holds:
        if hold.admitted_at is not None:
            reserved = ", ".join(f"{amount} {metric}" for metric, amount in hold.reserved.items())
            until = f"until {hold.expires_at:%Y-%m-%d %H:%M:%S}Z" if hold.state == "open" else ""
            says = (hold.state, until, f"reserved {reserved}" if reserved else "", keys.get(hold.key_id or "", ""))
            yield _row(hold.admitted_at, f"hold in {hold.where}", hold.hold_id, *says)


def _of_event(event: EventRow) -> Iterator[str]:
    yield from (f"{count} {name}" for name, count in event.tokens.items())
    if event.quantity:
        yield f"quantity {event.quantity:f}"
    yield " ".join(name for name in (event.provider, event.model, event.service_tier) if name)
    if not event.billable:
        yield f"not billed ({event.caller_type})" if event.caller_type != "production_agent" else "not billed"
    yield from (name for name in ("estimated", "late") if getattr(event, name))
    if event.reason is not None:
        yield f"reason: {event.reason}"
    if event.error is not None:
        yield f"error: {event.error}"
    if event.position is not None:
        yield f"from Redis {event.position}"


def _row(at: datetime, what: str, named: object, *says: str) -> dict[str, Any]:
    return {"at": at, "what": what, "id": named, "says": ", ".join(text for text in says if text)}


def _day(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M}Z"
