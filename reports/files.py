"""Writing a report so that a reader sees the old file or the new one, never half of one."""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["write_atomically"]


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace the file at `path` with `content` (text as UTF-8, line ends untouched). Its folder must exist.

    Durable once it returns. Raises `OSError` where it cannot be written; the old file then stands and nothing is left.
    """
    data = content.encode() if isinstance(content, str) else content
    # Not tempfile: its files are private to the owner, and the report would stay so.
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
