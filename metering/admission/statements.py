"""Named SQL statements, read once from a file of sections that start with `-- name: NAME`."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files

__all__ = ["statements"]

_SECTION = re.compile(r"^-- name: (\w+)\n(.*?)(?=^-- name: |\Z)", re.MULTILINE | re.DOTALL)


@cache
def statements(dialect: str) -> dict[str, str]:
    """The statements of `{dialect}.sql`, by name."""
    text = files(__package__).joinpath(f"{dialect}.sql").read_text(encoding="utf-8")
    return {name: sql.strip() for name, sql in _SECTION.findall(text)}
