"""`tallystick`: the library's command line. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from metering.cli import accounts, importing, logs, plans, probing, quotas, spans, tracing
from metering.cli.shared import GROUP, Account, AsJson, End, Start, actor, instant, open_meter
from metering.console import fields_of, show
from metering.errors import MeteringError

__all__ = ["app", "main"]

app = typer.Typer(
    help="Metering, quotas and billing facts for LLM-backed APIs. Settings are METERING_* variables; with none set, "
    "everything lies in .tallystick.",
    **GROUP,
)


def main() -> None:
    """Run the command line. What is wrong is said in one line, without a traceback."""
    try:
        app()
    except (MeteringError, OSError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        sys.exit(1)


def init() -> None:
    """Create the ledger, with the plans of plans.toml where that file exists."""
    from metering.settings import Settings

    with open_meter(create=True) as meter:
        done = "created" if meter.ledger.is_new else "is there already"
        typer.echo(f"ledger {meter.ledger.where} {done}")
        settings = Settings.from_env()
        source = f"from {settings.plans}" if settings.plans.exists() else "built in: free, pro, premium, enterprise"
        if meter.ledger.is_new:
            typer.echo(f"plans {source}")


def migrate() -> None:
    """Bring the ledger's schema to the one this version needs."""
    from metering.clock import utc_now
    from metering.ledger import SCHEMA, Ledger
    from metering.meter import apply_file
    from metering.settings import Settings

    settings = Settings.from_env()
    ledger = Ledger(
        settings.ledger_url,
        timeout_s=settings.timeout_s,
        upgrade=True,
        first=lambda connection: apply_file(connection, settings.plans, utc_now(), actor()),
    )
    ledger.close()
    typer.echo(f"ledger {ledger.where} is at schema {SCHEMA}")


def usage(
    account: Account,
    start: Start = None,
    end: End = None,
    by: Annotated[str | None, typer.Option(help="line, model, day (UTC), key_id or operation.")] = None,
    as_json: AsJson = False,
) -> None:
    """What an account used."""
    with open_meter() as meter:
        totals = meter.usage(account, start=instant("--start", start), end=instant("--end", end), by=by)  # type: ignore[arg-type]
    show([fields_of(total) for total in totals], as_json)


def erase(
    account: Account,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go, and what would stay.")] = False,
    as_json: AsJson = False,
) -> None:
    """Answer a deletion request: bodies, names and keys go, and what has to stay is said, with the rule."""
    from metering.clock import utc_now
    from metering.erasing import erase as erase_account

    with open_meter() as meter:
        if not dry_run:
            meter.flush()  # what waits in the spool would be written after it
        found = erase_account(meter.ledger, account, actor=actor(), now=utc_now(), dry_run=True)
        show([fields_of(part) for part in (*found.gone, *found.stays)], as_json)
        if dry_run or not found.gone:
            return
        if not yes:
            typer.confirm(f"erase account {account}? This cannot be undone", abort=True, err=True)
        erase_account(meter.ledger, account, actor=actor(), now=utc_now(), announce=meter._announce)
    if not as_json:
        typer.echo(f"account {account} is erased, but for what stays")


def doctor(as_json: AsJson = False) -> None:
    """What is configured, reachable and migrated. Exit status 1: something is not."""
    from metering.doctor import examine

    findings = examine()
    show([fields_of(finding) for finding in findings], as_json)
    if not all(finding.ok for finding in findings):
        sys.exit(1)


# In the order of `tallystick --help`.
app.command()(init)
app.command()(migrate)
app.command("import")(importing.import_files)
app.command("import-spans")(spans.import_spans)
app.command()(usage)
app.command()(quotas.drain)
app.command()(tracing.trace)
app.command()(quotas.verify)
app.command()(probing.probe)
app.command()(erase)
app.command()(doctor)
app.add_typer(plans.plans, name="plans")
app.add_typer(accounts.accounts, name="accounts")
app.add_typer(accounts.keys, name="keys")
app.add_typer(quotas.quota, name="quota")
app.add_typer(logs.log, name="log")
