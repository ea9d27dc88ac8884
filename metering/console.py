"""What the command line prints: JSON for scripts, tables and progress bars for people."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from rich.table import Table

__all__ = ["fields_of", "progress_bar", "show", "show_line", "table_of"]

MAX_LINES = 20
"""Of one cell of a table; JSON has all of them."""


@contextmanager
def progress_bar(name: str) -> Iterator[Any]:
    """A bar on a terminal: yields what takes the share done so far, 0 to 1; None where nobody watches."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    with Progress(console=console) as progress:
        task = progress.add_task(escape(name), total=1.0)
        yield lambda done: progress.update(task, completed=done)


def fields_of(record: Any) -> dict[str, Any]:
    """A record's fields by name."""
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


def show(rows: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    """As JSON, one as fields, or several as a table."""
    if as_json:
        import msgspec

        typer.echo(msgspec.json.format(msgspec.json.encode(rows, enc_hook=str)).decode())
        return
    if not rows:
        typer.echo("nothing")
        return
    from rich.console import Console

    # A piped table must not be cut to a width that nobody sees.
    console = Console() if sys.stdout.isatty() else Console(width=400)
    console.print(table_of(rows))


def table_of(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row as fields, several as a table, without columns that are empty in all of them."""
    from rich.table import Table
    from rich.text import Text

    if len(rows) == 1:
        table = Table.grid(padding=(0, 2))
        for name, value in rows[0].items():
            table.add_row(name, Text(_cell(value)))
    else:
        shown = [name for name in rows[0] if any(row[name] not in (None, "", 0, [], ()) for row in rows)]
        table = Table(*shown)
        for row in rows:
            table.add_row(*(Text(_cell(row[name])) for name in shown))
    return table


def show_line(row: Mapping[str, Any]) -> None:
    """As one line of JSON."""
    import msgspec

    typer.echo(msgspec.json.encode(row, enc_hook=str).decode())


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%d %H:%M:%SZ")
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        shown = [str(item) for item in value[:MAX_LINES]]
        if len(value) > MAX_LINES:
            shown.append(f"and {len(value) - MAX_LINES:,} more")
        return "\n".join(shown) or "-"
    return str(value)
