"""`tallystick log`: what was asked and answered, who changed what, and whether that is still as it was written."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from metering.cli.shared import GROUP, AsJson, End, Start, instant, open_meter
from metering.console import fields_of, show
from metering.errors import InvalidSetting

__all__ = ["log"]

MAX_ENTRIES = 10_000


class _Log(TyperGroup):
    """`log ACCOUNT` is `log show ACCOUNT`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] != "--help" and args[0] not in self.commands):
            args = ["show", *args]
        return super().parse_args(ctx, args)


log = typer.Typer(help="The request log, and the log of who changed what.", cls=_Log, **GROUP)


@log.command("show")
def log_show(
    account: Annotated[str | None, typer.Argument(help="The account; or give --key-id.")] = None,
    key_id: Annotated[str | None, typer.Option(help="Calls of one key.")] = None,
    start: Start = None,
    end: End = None,
    limit: Annotated[int, typer.Option(help="At most so many, the newest first.")] = 100,
    admin: Annotated[bool, typer.Option("--admin", help="The admin log instead: who changed what.")] = False,
    as_json: AsJson = False,
) -> None:
    """Bodies, errors and latencies of calls. `tallystick log ACCOUNT` does the same."""
    from metering.ledger import admin_log

    if not 1 <= limit <= MAX_ENTRIES:
        raise InvalidSetting("--limit", limit, f"1 to {MAX_ENTRIES}")
    if admin and (account or key_id or start or end):
        raise InvalidSetting("--admin", True, "no account, key or time beside it: the admin log is shown as it is")
    with open_meter() as meter:
        entries: Iterable[Any]
        if admin:
            with meter.ledger.read() as connection:
                entries = admin_log.entries(connection, limit=limit)
        else:
            entries = meter.log(
                account, key_id=key_id, start=instant("--start", start), end=instant("--end", end), limit=limit
            )
        show([fields_of(entry) for entry in entries], as_json)


@log.command("verify")
def log_verify(as_json: AsJson = False) -> None:
    """Whether the admin log is as it was written: none changed, missing or moved. Exit status 1: it is not.

    Write the head down elsewhere: who can write every table could make the whole chain anew, and then with another one.
    """
    from metering.ledger import admin_log

    with open_meter() as meter, meter.ledger.read() as connection:
        head, faults = admin_log.verify(connection)
    if as_json:
        show([{"entries": head.length, "head": head.digest, "faults": [fields_of(fault) for fault in faults]}], as_json)
    elif faults:
        for fault in faults:
            typer.echo(f"{'the log' if fault.entry is None else f'entry {fault.entry}'}: {fault.problem}")
    else:
        typer.echo(f"{head.length:,} entries, head {head.digest}")
    if faults:
        sys.exit(1)
