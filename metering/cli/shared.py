"""What several commands need: options, a meter as the settings say, and times as people write them."""

from __future__ import annotations

from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metering.errors import InvalidSetting

if TYPE_CHECKING:
    from collections.abc import Iterator

    from metering.meter import Meter

__all__ = ["GROUP", "Account", "AsJson", "End", "Start", "actor", "instant", "open_meter"]

GROUP: dict[str, Any] = {
    "no_args_is_help": True,
    "pretty_exceptions_enable": False,
    "add_completion": False,
    "rich_markup_mode": None,  # rich help costs a quarter of a second at every --help
}
"""How every group of commands is set up."""

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Account = Annotated[str, typer.Argument(help="The account.")]
Start = Annotated[str | None, typer.Option(help="From this time on: 2023-11-01 or 2023-11-01T12:00Z; UTC unless said.")]
End = Annotated[str | None, typer.Option(help="Before this time.")]


@contextmanager
def open_meter(*, create: bool = False) -> Iterator[Meter]:
    """A meter as the settings say. What is changed is logged as done by this user."""
    from metering.meter import Meter

    with Meter.from_env(create=create, actor=actor()) as meter:
        yield meter


def instant(name: str, text: str | None) -> datetime | None:
    """A time as an option gives it; one without an offset is UTC. Raises `InvalidSetting`, which names the option."""
    if text is None:
        return None
    try:
        at = datetime.fromisoformat(text)
        return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
    except (ValueError, OverflowError):
        raise InvalidSetting(name, text, "a time such as 2023-11-01 or 2023-11-01T12:00Z") from None


def actor() -> str:
    """Whom the admin log names."""
    from getpass import getuser

    try:
        return getuser()
    except (KeyError, OSError):
        return "command line"
