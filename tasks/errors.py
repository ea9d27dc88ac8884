"""What keeps a job from its work.

JobError
├── WarehouseError      the warehouse cannot be used
├── ReportError         a report cannot be written
├── ArchiveError        an archive cannot be written, or is not what was archived
├── ProviderError       a provider's report cannot be had
└── AccountsNotBilled   every other account's invoice is there
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["AccountsNotBilled", "ArchiveError", "JobError", "ProviderError", "ReportError", "WarehouseError"]


class JobError(Exception):
    """Root of what a job raises on purpose; the message says what to do."""


class WarehouseError(JobError):
    """The warehouse cannot be used."""


class ReportError(JobError):
    """A report cannot be written. What was there before stands."""

    def __init__(self, path: Path, cause: OSError) -> None:
        super().__init__(f"{path}: cannot be written: {cause.strerror or cause}")
        self.path = path


class ArchiveError(JobError):
    """An archive cannot be written, or is not what was archived. Nothing is deleted then."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path


class ProviderError(JobError):
    """A provider's report cannot be had. What was pulled before stands, and the next pull goes on from there."""

    def __init__(self, provider: str, problem: str) -> None:
        super().__init__(f"{provider}: {problem}")
        self.provider = provider
        self.problem = problem


class AccountsNotBilled(JobError):
    """Some accounts could not be billed. The others are, and the index page lists these with the reason."""

    def __init__(self, problems: Sequence[tuple[str, str]], index: Path) -> None:
        named = "; ".join(f"{account!r}: {reason}" for account, reason in problems[:SHOWN])
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        super().__init__(f"{len(problems)} not billed: {named}{more}. The others are, see {index.absolute()}")
        self.problems = tuple(problems)
        """(account, reason)."""
        self.index = index


SHOWN = 5
