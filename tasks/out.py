"""The folder of a period's reports, and writing into it."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from reports.files import write_atomically
from tasks.errors import ReportError
from tasks.warehouse import lease

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["period_folder", "write_file"]


@contextmanager
def period_folder(out: Path, period: str) -> Iterator[Path]:
    """The folder of a period's reports, for one writer at a time, without what a killed one left in the middle."""
    folder = out / period
    try:
        with lease(folder, exclusive=True):
            (folder / "invoices").mkdir(parents=True, exist_ok=True)
            for path in folder.rglob(".*.tmp"):
                path.unlink()
            yield folder
    except OSError as exc:
        raise ReportError(folder, exc) from exc


def write_file(path: Path, content: str | bytes) -> None:
    """Write one report. Raises `ReportError`."""
    try:
        write_atomically(path, content)
    except OSError as exc:
        raise ReportError(path, exc) from exc
