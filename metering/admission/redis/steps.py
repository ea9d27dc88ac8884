"""What the logic of a verb asks for. It is written once, as generators that yield these; a driver for threads and one
for asyncio do them."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Ask", "Call", "Pause", "Read", "Steps"]


@dataclass(slots=True)
class Ask:
    """Run a script on a shard's server; what it answers is sent back. Raises `NotDone`, `OutcomeUnknown`.

    With an era `Greeted`, where the server is another one than then.
    """

    shard: int
    script: str
    keys: Sequence[str]
    args: Sequence[Any]
    timeout_s: float
    era: int | None = None


@dataclass(slots=True)
class Call:
    """Run a command on a shard's server."""

    shard: int
    command: Sequence[Any]
    timeout_s: float


@dataclass(slots=True)
class Read:
    """Do something with the ledger; what it returns is sent back."""

    work: Callable[[], Any]


@dataclass(slots=True)
class Pause:
    """Let some time pass before asking again."""

    seconds: float


T = TypeVar("T")
Steps = Generator[Ask | Call | Read | Pause, Any, T]
"""A verb that returns a T."""
