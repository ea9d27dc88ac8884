"""The Lua scripts, one a verb, each with what all of them share in front of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import msgspec

__all__ = ["Script", "arguments", "script"]

_SHARED = ("_numbers", "_shard", "_holds")


@dataclass(frozen=True, slots=True)
class Script:
    """A script's text, and the digest by which a server that has seen it knows it."""

    text: bytes
    sha: str


@cache
def script(name: str) -> Script:
    """The script of a verb."""
    folder = files(__package__) / "scripts"
    text = "\n".join((folder / f"{part}.lua").read_text(encoding="utf-8") for part in (*_SHARED, name)).encode()
    return Script(text, hashlib.sha1(text, usedforsecurity=False).hexdigest())


def arguments(
    said: Any,
    *blobs: bytes,
    now_us: int | None = None,
    deadline_us: int | None = None,
    floor: tuple[int, int, int] = (0, 0, 0),
) -> tuple[Any, ...]:
    """What a script is told besides its keys: see `_shard.lua`."""
    return (
        "" if now_us is None else now_us,
        "" if deadline_us is None else deadline_us,
        *floor,
        _encode(said),
        *blobs,
    )


_encode = msgspec.msgpack.Encoder().encode
