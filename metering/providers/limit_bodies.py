"""Where JSON bodies say limits (pure). Whatever a body is, nothing here raises."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metering.providers.limits import Field

__all__ = ["inner", "objects", "said"]


def inner(data: object, *names: str) -> Any:
    """What stands within objects; None where it is not there."""
    for name in names:
        data = data.get(name) if isinstance(data, dict) else None
    return data


def objects(data: object, *names: str, place: str = "") -> list[tuple[str, dict[str, Any]]]:
    """The objects of a list within objects, each with its place, such as `error.details[1]`."""
    listed = inner(data, *names)
    place += ".".join(names)
    items = enumerate(listed if isinstance(listed, list) else ())
    return [(f"{place}[{at}]", item) for at, item in items if isinstance(item, dict)]


def said(data: object, place: str, **names: str) -> dict[str, Field]:
    """Parts of a window, by the names that they have in an object; those that are null are as good as left out."""
    found = {part: (f"{place}.{name}".lstrip("."), inner(data, name)) for part, name in names.items()}
    return {part: field for part, field in found.items() if field[1] is not None}
