"""`tallystick import`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from zlib import crc32

import typer

from metering.cli.shared import AsJson, open_meter
from metering.console import fields_of, progress_bar, show
from metering.errors import InvalidSetting

if TYPE_CHECKING:
    from metering.importing import ImportReport

__all__ = ["import_files", "rejects_name"]

REJECTED = 3
"""Exit status of an import that kept the good rows and refused others."""


def import_files(
    files: Annotated[list[Path], typer.Argument(help="CSV, JSON lines (.jsonl, .ndjson) or Parquet files.")],
    mapping: Annotated[
        list[str] | None,
        typer.Option("--map", help="FIELD=COLUMN, several with commas: occurred_at=TIMESTAMP,model=Model."),
    ] = None,
    account: Annotated[str | None, typer.Option(help="The account of every row.")] = None,
    line: Annotated[str | None, typer.Option(help="The line of every row.")] = None,
    provider: Annotated[str | None, typer.Option(help="The provider of every row.")] = None,
    model: Annotated[str | None, typer.Option(help="The model of every row.")] = None,
    plan: Annotated[str | None, typer.Option(help="The plan of accounts that are new.")] = None,
    source: Annotated[
        str | None, typer.Option(help="Tells equal rows of two systems apart; else the file's stem.")
    ] = None,
    rejects: Annotated[Path | None, typer.Option(help="Folder for refused rows; else METERING_HOME/rejects.")] = None,
    as_json: AsJson = False,
) -> None:
    """Import usage. The same file twice changes nothing, and a killed import is finished by running it again.

    Columns that have a field's name need no --map. Exit status 3: some rows were refused, the others are kept.
    """
    from metering.clock import utc_now
    from metering.importing import Importer
    from metering.settings import Settings

    constants = {"account": account, "line": line, "provider": provider, "model": model, "plan": plan}
    reports: list[ImportReport] = []
    with open_meter() as meter:
        importer = Importer(
            meter.ledger,
            meter.accounts,
            mapping=_parse_mapping(mapping or []),
            constants={name: value for name, value in constants.items() if value is not None},
            clock=utc_now,
        )
        folder = rejects or Settings.from_env().home / "rejects"
        try:
            for path in files:
                with progress_bar(path.name) as progress:
                    reports.append(
                        importer.run(path, source=source, rejects=folder / rejects_name(path), progress=progress)
                    )
        finally:
            if reports or as_json:
                show([fields_of(report) for report in reports], as_json)
            if any(report.zoneless_times for report in reports):
                typer.echo("times without a zone were read as UTC", err=True)
    if any(report.rejected for report in reports):
        sys.exit(REJECTED)


def rejects_name(path: Path) -> str:
    """Never the file's own name, and another one for its namesake in another folder."""
    return f"{path.stem}-{crc32(bytes(path.resolve())):08x}.rejects.csv"


def _parse_mapping(given: Sequence[str]) -> dict[str, str]:
    mapping: dict[str, str] = {}
    for pair in (pair for option in given for pair in option.split(",")):
        name, separator, column = pair.partition("=")
        if not (separator and name and column):
            raise InvalidSetting("--map", pair, "FIELD=COLUMN")
        if mapping.setdefault(name.strip(), column.strip()) != column.strip():
            raise InvalidSetting("--map", pair, f"one column for {name.strip()}, which is mapped already")
    return mapping
