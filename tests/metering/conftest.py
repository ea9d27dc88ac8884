"""The command line, run inside the test's own process."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import pytest

from metering.cli import main

if TYPE_CHECKING:
    from collections.abc import Callable


class Ran(NamedTuple):
    """What a command answered."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.out)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs `tallystick ARGUMENTS`. A traceback would be an exception here, and fail the test."""

    def run(*arguments: object, stdin: str = "") -> Ran:
        monkeypatch.setattr(sys, "argv", ["tallystick", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        status: Any = 0
        try:
            main()
        except SystemExit as ended:
            status = ended.code
        return Ran(status or 0, *capsys.readouterr())

    return run


@pytest.fixture
def tallystick(command: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, ledger_url: str) -> Callable[..., Ran]:
    """The same on the test's own empty ledger."""
    monkeypatch.setenv("METERING_LEDGER_URL", ledger_url)
    return command
