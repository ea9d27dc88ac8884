"""`tallystick import-spans`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from metering.cli.importing import REJECTED, rejects_name
from metering.cli.shared import AsJson, open_meter
from metering.console import fields_of, progress_bar, show

__all__ = ["import_spans"]


def import_spans(
    files: Annotated[list[Path], typer.Argument(help="OTLP JSON: one document, or one a line; gzipped or not.")],
    account: Annotated[str | None, typer.Option(help="The account of every span; else what it says itself.")] = None,
    rejects: Annotated[Path | None, typer.Option(help="Folder for refused spans; else METERING_HOME/rejects.")] = None,
    as_json: AsJson = False,
) -> None:
    """Import what was traced. The same span twice changes nothing; texts of calls are not kept.

    Kept are the spans that say what they used, and those above them. Exit status 3: some spans were refused.
    """
    from metering.clock import utc_now
    from metering.settings import Settings
    from metering.traces.importing import SpanImporter

    with open_meter() as meter:
        folder = rejects or Settings.from_env().home / "rejects"
        importer = SpanImporter(meter.ledger, account=account, clock=utc_now)
        try:
            with importer:
                for path in files:
                    with progress_bar(path.name) as progress:
                        importer.run(path, rejects=folder / rejects_name(path), progress=progress)
        finally:
            if importer.reports or as_json:
                show([fields_of(report) for report in importer.reports], as_json)
    if any(report.rejected for report in importer.reports):
        sys.exit(REJECTED)
