"""Named SQL statements, read once from a file of sections that start with `-- name: NAME`."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from operator import itemgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["by_position", "statements"]

_NAMED = re.compile(r":(\w+)")
_SECTION = re.compile(r"^-- name: (\w+)\n(.*?)(?=^-- name: |\Z)", re.MULTILINE | re.DOTALL)


@cache
def statements(dialect: str) -> dict[str, str]:
    """The statements of `{dialect}.sql`, by name."""
    text = files(__package__).joinpath(f"{dialect}.sql").read_text(encoding="utf-8")
    return {name: sql.strip() for name, sql in _SECTION.findall(text)}


def by_position(sql: str) -> tuple[str, Callable[[Mapping[str, Any]], tuple[Any, ...]]]:
    """A statement with `?` for its names, and what puts named values in their order.

    To bind forty values by name costs as much as to insert them.
    """
    return _NAMED.sub("?", sql), itemgetter(*_NAMED.findall(sql))
