from __future__ import annotations

import resource
import signal
from typing import TYPE_CHECKING

import pytest

from metering.spool import Spool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "home" / "spool"


@pytest.fixture
def spool(folder: Path) -> Iterator[Spool]:
    with_a_file = Spool(folder)
    yield with_a_file
    with_a_file.close()


@pytest.fixture
def longest_file() -> Iterator[Callable[[int], None]]:
    """After a call, no file of this process grows beyond so many bytes: what a full disk looks like."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN  # Python's own, so that writing fails instead
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
