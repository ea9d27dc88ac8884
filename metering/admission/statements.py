"""Named SQL statements, read once from files of sections that start with `-- name: NAME`."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from operator import itemgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Statement", "by_position", "statements"]

_NAMED = re.compile(r"(?<!:):(\w+)")
_SECTION = re.compile(r"^-- name: (\w+)\n(.*?)(?=^-- name: |\Z)", re.MULTILINE | re.DOTALL)


class Statement(str):
    """A statement as SQLite is told it. `on_postgres` is the same for psycopg."""

    __slots__ = ("on_postgres",)

    on_postgres: str

    def __new__(cls, on_sqlite: str, on_postgres: str) -> Statement:
        """Both spellings."""
        statement = super().__new__(cls, on_sqlite)
        statement.on_postgres = on_postgres
        return statement


@cache
def statements(package: str = "metering.admission") -> dict[str, Statement]:
    """The statements of a package's `sqlite.sql` by name. What Postgres spells otherwise is in `postgres.sql`, too."""
    on_sqlite, on_postgres = (_sections(package, f"{dialect}.sql") for dialect in ("sqlite", "postgres"))
    assert on_postgres.keys() <= on_sqlite.keys()
    return {
        name: Statement(sql, _NAMED.sub(r"%(\1)s", on_postgres.get(name, sql).replace("%", "%%")))
        for name, sql in on_sqlite.items()
    }


def by_position(statement: Statement) -> tuple[Statement, Callable[[Mapping[str, Any]], tuple[Any, ...]]]:
    """A statement with places for its names, and what puts named values in their order.

    To bind forty values by name costs as much as to insert them.
    """
    names = _NAMED.findall(statement)
    on_postgres = re.sub(r"%\(\w+\)s", "%s", statement.on_postgres)
    assert re.findall(r"%\((\w+)\)s", statement.on_postgres) == names
    return Statement(_NAMED.sub("?", statement), on_postgres), itemgetter(*names)


def _sections(package: str, file: str) -> dict[str, str]:
    text = files(package).joinpath(file).read_text(encoding="utf-8")
    return {name: sql.strip() for name, sql in _SECTION.findall(text)}
