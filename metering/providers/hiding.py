"""A key that a provider sends back is taken out of its answer before anything of the answer is read (pure)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["HIDDEN", "pattern_of", "without"]

HIDDEN = b"[key]"
MIN_LENGTH = 8
"""Characters of a key that is secret. Servers that want none are given ones such as `EMPTY`, or `1`, which stands in
numbers, too."""


def pattern_of(keys: Iterable[str | None]) -> re.Pattern[bytes] | None:
    """Finds any of the keys, in any case; None where there is none to find.

    Each character may be written as it is, as URLs escape it, or as JSON does.
    """
    # The longer one first, or what it has more than the other would be left.
    found = sorted({key for key in keys if key and len(key) >= MIN_LENGTH}, key=len, reverse=True)
    texts = ("".join(_written(character) for character in key) for key in found)
    return re.compile("|".join(texts).encode(), re.IGNORECASE) if found else None


def without(
    pattern: re.Pattern[bytes] | None, headers: Sequence[tuple[bytes, bytes]], body: bytes
) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Headers, names as well as values, and a body in which `[key]` stands for each key."""
    if pattern is None:
        return list(headers), body
    clean = [(pattern.sub(HIDDEN, name), pattern.sub(HIDDEN, value)) for name, value in headers]
    return clean, pattern.sub(HIDDEN, body)


def _written(character: str) -> str:
    plain, code = re.escape(character), f"{ord(character):02x}"
    return rf"(?:\\?{plain}|%{code}|\\u00{code})"
