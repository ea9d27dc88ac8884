"""`python -m flows COMMAND`: every job by name, and the proofs of what they made."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.command import call

if TYPE_CHECKING:
    from collections.abc import Callable

    from flows.places import Places

app = typer.Typer(
    help="Tallystick's jobs. Settings are METERING_* variables; nothing needs a server.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)

reconcile = typer.Typer(help="What reconciliations propose.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(reconcile, name="reconcile")

MAX_NUMBER = 2**31 - 1

Period = Annotated[
    str | None, typer.Option(help="The month the billing periods start in, YYYY-MM; last month unless said.")
]
Final = Annotated[
    bool, typer.Option("--final", help="Close the period of each account, and number its invoice. That stays as it is.")
]
Override = Annotated[
    str | None, typer.Option(help="With --final: why it is closed though something speaks against it.")
]
Actor = Annotated[str | None, typer.Option(help="Who, for the ledger; the system's user unless said.")]
Reason = Annotated[str, typer.Option(help="Why, for the ledger.")]


@app.command("aggregate-usage")
def aggregate_usage() -> None:
    """Cost new events and load them into the warehouse."""
    from flows.aggregate_usage import aggregate_usage as flow

    sys.exit(call(flow))


@app.command("bill-period")
def bill_period(period: Period = None, final: Final = False, override: Override = None, actor: Actor = None) -> None:
    """Write invoices and the index page of a period that is already aggregated: drafts, or final ones."""
    from flows.bill_period import bill_period as flow

    sys.exit(call(flow, period=period, final=final, override=override, actor=actor))


@app.command("billing-cycle")
def billing_cycle(period: Period = None, final: Final = False, override: Override = None, actor: Actor = None) -> None:
    """Aggregate, reconcile where a plan asks for it, then bill a period."""
    from flows.billing_cycle import billing_cycle as flow

    sys.exit(call(flow, period=period, final=final, override=override, actor=actor))


@app.command("drain-events")
def drain_events() -> None:
    """Bring what Redis admitted into the ledger, once, and say how the shards stand."""
    from flows.drain_events import drain_events as flow

    sys.exit(call(flow))


@app.command("enforce-retention")
def enforce_retention(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    replay_days: Annotated[int, typer.Option(help="Answers kept for retries of the same call.")] = 7,
    span_days: Annotated[int, typer.Option(help="Traced spans, once their period is closed.")] = 90,
    observation_days: Annotated[int, typer.Option(help="What providers said of their limits.")] = 90,
    archive_after_days: Annotated[
        int, typer.Option(help="How long after the close of a period its events are archived.")
    ] = 400,
) -> None:
    """Delete what is over: the request log by plan, all else by age; nothing of accounts on legal hold."""
    from flows.enforce_retention import enforce_retention as flow

    sys.exit(
        call(
            flow,
            dry_run=dry_run,
            replay_days=replay_days,
            span_days=span_days,
            observation_days=observation_days,
            archive_after_days=archive_after_days,
        )
    )


@app.command("probe-providers")
def probe_providers() -> None:
    """Ask the providers how much of their rate limits is left, and keep what they say."""
    from flows.probe_providers import probe_providers as flow

    sys.exit(call(flow))


@app.command("pull-reports")
def pull_reports(
    provider: Annotated[str | None, typer.Option(help="One provider; all whose key is set unless said.")] = None,
    start: Annotated[str | None, typer.Option(help="The first UTC day; the first of last month unless said.")] = None,
    end: Annotated[str | None, typer.Option(help="The first UTC day not to ask for; today unless said.")] = None,
) -> None:
    """Pull what providers report of usage and costs into the ledger."""
    from flows.pull_reports import pull_reports as flow

    sys.exit(call(flow, provider=provider, start=start, end=end))


@app.command("import-report")
def import_report(
    files: Annotated[list[Path], typer.Argument(help="Saved answers: a page, a list of pages, or a page a line.")],
    provider: Annotated[str, typer.Option(help="Whose: openai, anthropic or openrouter.")],
    report: Annotated[str, typer.Option(help="Which: usage, embeddings or cost.")],
    organization: Annotated[str, typer.Option(help="A name for the provider's account.")] = "default",
) -> None:
    """Import saved answers of a provider's report API into the ledger."""
    from flows.places import Places
    from tasks.provider_reports import import_reports

    def import_all() -> dict[str, int]:
        return import_reports(Places.from_env().ledger_url, files, provider, report, organization=organization)

    sys.exit(call(import_all))


@app.command()
def rebuild() -> None:
    """Make the warehouse anew from the ledger."""
    from flows.rebuild import rebuild as flow

    sys.exit(call(flow))


@app.command("reconcile-tokens")
def reconcile_tokens(
    period: Annotated[
        str | None,
        typer.Option(help="The month the billing periods start in, YYYY-MM; unless said, last month and this."),
    ] = None,
    tolerance_tokens: Annotated[
        int, typer.Option(min=0, max=MAX_NUMBER, help="By how many tokens a count may differ.")
    ] = 2,
    tolerance_percent: Annotated[str, typer.Option(help="Or by how much of what was traced.")] = "0.1",
) -> None:
    """Compare what was billed with what was traced, run by run, and propose corrections."""
    from flows.reconcile_tokens import reconcile_tokens as flow

    sys.exit(call(flow, period=period, tolerance_tokens=tolerance_tokens, tolerance_percent=tolerance_percent))


@reconcile.command("apply")
def reconcile_apply(
    reconciliation: Annotated[
        int, typer.Argument(metavar="RUN", min=1, max=MAX_NUMBER, help="The number of a reconciliation.")
    ],
    number: Annotated[
        list[int] | None, typer.Option(help="Only the run with this number on its page; may be given more than once.")
    ] = None,
    verdict: Annotated[
        list[str] | None, typer.Option(help="Only runs of this verdict; may be given more than once.")
    ] = None,
    actor: Actor = None,
) -> None:
    """Book the corrections that a reconciliation proposed, each run's once; says which are refused, and why."""
    from flows.places import Places
    from metering.cli.shared import actor as user
    from metering.clock import utc_now
    from tasks.reconciled import apply_reconciliation

    refused: list[str] = []

    def book() -> dict[str, int]:
        outcome = apply_reconciliation(
            Places.from_env().ledger_url,
            reconciliation,
            actor=actor or user(),
            now=utc_now(),
            only=number or (),
            verdicts_of=verdict or (),
        )
        refused.extend(outcome.refused)
        return {"booked": outcome.booked, "booked_before": outcome.booked_before, "refused": len(refused)}

    status = call(book)
    for reason in refused:
        print(reason, file=sys.stderr)
    sys.exit(status or (1 if refused else 0))


@app.command()
def recost(
    period: Annotated[str, typer.Option(help="The month the billing periods start in, YYYY-MM.")],
    reason: Reason,
    actor: Actor = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would change.")] = False,
) -> None:
    """Cost a period's events anew by the installed prices, and make the warehouse anew; says what changes."""
    from flows.recost import recost as flow

    sys.exit(call(flow, period=period, reason=reason, actor=actor, dry_run=dry_run))


@app.command()
def restore(
    period: Annotated[str, typer.Argument(help="The month the billing periods start in, YYYY-MM.")],
) -> None:
    """Read the archives of a period back, into the table restored.usage_events of the warehouse; nothing bills it."""
    from flows.places import Places, billed_month
    from metering.clock import utc_now
    from tasks.restore import restore_period

    def read_back() -> dict[str, int]:
        places = Places.from_env()
        month = billed_month(period, utc_now())
        return restore_period(places.ledger_url, places.warehouse, places.archives, month)

    sys.exit(call(read_back))


@app.command()
def verify(
    subject: Annotated[
        str,
        typer.Argument(
            metavar="rollups|invoice|closes|archives|NUMBER", help="What to verify; a NUMBER as INV-000001."
        ),
    ],
    period: Period = None,
) -> None:
    """Compute again, and compare.

    The rollups and the invoice files of a period with the ledger's own events; a final document with what was frozen
    for it, and its files with the digests they were issued with; the chain of closes, with all that they froze;
    archives with what they were when they were made.
    """
    from flows.places import Places, billed_month
    from metering.clock import utc_now
    from tasks.verify import (
        archive_differences,
        close_differences,
        document_differences,
        invoice_differences,
        rollup_differences,
    )

    def compare() -> list[str]:
        places = Places.from_env()
        match subject:
            case "rollups":
                month = billed_month(period, utc_now())
                return rollup_differences(places.ledger_url, places.warehouse, month, places.archives)
            case "invoice":
                month = billed_month(period, utc_now())
                return invoice_differences(places.ledger_url, places.out, month, places.archives)
            case "archives":
                return archive_differences(places.ledger_url, places.archives)
            case "closes":
                return close_differences(places.ledger_url)
            case _:
                return document_differences(places.ledger_url, places.out, subject)

    differences: list[str] = []
    status = call(lambda: differences.extend(compare()))
    for difference in differences:
        print(difference)
    if status == 0 and not differences:
        print(f"{subject}: no differences")
    sys.exit(status or (1 if differences else 0))


@app.command()
def explain(
    invoice: Annotated[str, typer.Argument(metavar="INVOICE", help="The number of a final document.")],
    item: Annotated[str, typer.Argument(metavar="ITEM", help="The id of one of its items, as in its CSV and JSON.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each event, not CSV.")] = False,
) -> None:
    """The events that an item bills, with the idempotency keys they came with, and what each adds."""
    from flows.places import Places
    from tasks.explain import explain_item

    def show() -> None:
        places = Places.from_env()
        explained = explain_item(places.ledger_url, places.warehouse, invoice, item)
        for line in explained.lines(as_json=as_json):
            print(line)
        said = f"{len(explained.events):,} events of {explained.period}, {explained.quantity:f} {explained.item.metric}"
        print(f"{said}: {explained.item.description}", file=sys.stderr)

    sys.exit(call(show))


@app.command()
def rerate(
    plan: Annotated[Path, typer.Option(help="A plans.toml with other prices.")],
    period: Period = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """What other prices would have made of a period, account by account. Writes nothing."""
    from flows.places import Places, billed_month
    from metering.clock import utc_now
    from metering.console import show
    from metering.errors import InvalidSetting
    from metering.plans import parse_plans
    from tasks.rerate import rerate_period, rerated_rows

    def compare() -> None:
        places, now = Places.from_env(), utc_now()
        try:
            other = parse_plans(plan.read_text(encoding="utf-8"))
        except UnicodeDecodeError as exc:
            raise InvalidSetting("plan", str(plan), f"a file in UTF-8 ({exc})") from None
        found = rerate_period(places.ledger_url, places.warehouse, billed_month(period, now), other, now)
        show(rerated_rows(found), as_json)

    sys.exit(call(compare))


@app.command()
def void(
    invoice: Annotated[str, typer.Argument(metavar="INVOICE", help="The number of a final invoice.")],
    reason: Reason,
    actor: Actor = None,
) -> None:
    """Take an invoice back by a new document: write it, and print its number.

    What it billed is on the account's next invoice.
    """
    from flows.places import MAX_REASON, stated
    from metering.cli.shared import actor as user
    from metering.clock import utc_now
    from metering.events import MAX_NAME
    from tasks.closing import void_invoice

    def issue(places: Places) -> str:
        who, why = stated("actor", actor or user(), MAX_NAME), stated("reason", reason, MAX_REASON)
        return void_invoice(places.ledger_url, invoice, utc_now(), actor=who, reason=why)

    sys.exit(_issued(issue))


@app.command()
def credit(
    invoice: Annotated[str, typer.Argument(metavar="INVOICE", help="The number of a final invoice.")],
    reason: Reason,
    actor: Actor = None,
) -> None:
    """Give back now what was billed too much of an invoice's period: write a credit note, and print its number."""
    from flows.places import MAX_REASON, stated
    from metering.cli.shared import actor as user
    from metering.clock import utc_now
    from metering.events import MAX_NAME
    from tasks.closing import credit_invoice

    def issue(places: Places) -> str:
        who, why = stated("actor", actor or user(), MAX_NAME), stated("reason", reason, MAX_REASON)
        return credit_invoice(places.ledger_url, places.warehouse, invoice, utc_now(), actor=who, reason=why)

    sys.exit(_issued(issue))


def _issued(issue: Callable[[Places], str]) -> int:
    """Issue a document, print its number, and write its files; the number is said also where that fails."""
    from flows.places import Places
    from tasks.bills import write_document

    numbers: list[str] = []

    def issue_one() -> list[str]:
        numbers.append(issue(Places.from_env()))
        return numbers

    def write() -> None:
        places = Places.from_env()
        write_document(places.ledger_url, places.out, *numbers)

    return call(issue_one) or call(write)


if __name__ == "__main__":
    app()
