"""Tables whose rows the database itself refuses to change or delete, whoever asks; for migrations."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["append_only"]


def append_only(dialect: str, table: str, *keys: tuple[str, ...]) -> Iterator[str]:
    """The statements that make a table append-only, on SQLite or Postgres. `keys` are its unique keys."""
    says = f"{table} is append-only"
    if dialect == "sqlite":
        for verb in ("UPDATE", "DELETE"):
            yield _sqlite_trigger(table, verb, f"SELECT RAISE(ABORT, '{says}')")
        # An INSERT that replaces deletes without a delete trigger (sqlite.org/lang_conflict.html).
        same = " OR ".join(f"({' AND '.join(f'{name} = NEW.{name}' for name in key)})" for key in keys)
        found = f"(SELECT 1 FROM {table} WHERE {same})"  # noqa: S608  names from migrations
        yield _sqlite_trigger(table, "INSERT", f"SELECT RAISE(ABORT, '{says}') WHERE EXISTS {found}")
        return
    yield (
        f"CREATE FUNCTION {table}_stays() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$BEGIN RAISE EXCEPTION '{says}' USING ERRCODE = 'restrict_violation'; END$$"
    )
    for each, verbs in (("ROW", "UPDATE OR DELETE"), ("STATEMENT", "TRUNCATE")):
        yield (
            f"CREATE TRIGGER {table}_stays_{each.lower()} BEFORE {verbs} ON {table} "
            f"FOR EACH {each} EXECUTE FUNCTION {table}_stays()"
        )


def _sqlite_trigger(table: str, verb: str, does: str) -> str:
    return f"CREATE TRIGGER {table}_stays_{verb.lower()} BEFORE {verb} ON {table} BEGIN {does}; END"
