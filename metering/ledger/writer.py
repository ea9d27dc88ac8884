"""Group commit: concurrent callers of one process share a transaction, and each is answered after it is durable."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections import deque
from decimal import localcontext
from typing import TYPE_CHECKING, Generic, TypeVar

from metering.billing.money import EXACT
from metering.errors import StoreUnavailable
from metering.ledger.sqlite import connect, translated

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from metering.ledger.forks import Gate

__all__ = ["Writer"]

T = TypeVar("T")

MAX_GROUP = 128
"""Works that share one commit at the most, so that nobody waits for an endless group."""


class _Group:
    """Works that share one transaction. `ended` is set last, in one step that no interrupt can halve."""

    __slots__ = ("ended", "error")

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.ended = False


class _Job(Generic[T]):
    """One caller's work, and where its answer is put."""

    __slots__ = ("answer", "deadline", "error", "group", "work")

    def __init__(self, work: Callable[[sqlite3.Cursor], T], deadline: float) -> None:
        self.work = work
        self.deadline = deadline
        self.answer: T | None = None
        self.error: BaseException | None = None
        self.group: _Group | None = None


class Writer:
    """Runs works one after the other, each atomic, on one connection, with decimals that are never rounded.

    A caller who finds nobody at work commits at once, alone. Callers who arrive meanwhile queue and wait for their
    turn; who gets it first runs the whole queue in one transaction, each work in a savepoint, and the others find
    themselves answered. Nobody is woken by hand, so an interrupt in one caller leaves no other waiting.
    """

    def __init__(self, path: Path, *, timeout_s: float, gate: Gate) -> None:
        self._path = path
        self._timeout_s = timeout_s
        self._gate = gate
        # Re-entrant only because such a lock knows its owner: an interrupt may come right after it was acquired.
        self._turn = threading.RLock()
        self._queue: deque[_Job[object]] = deque()
        self._connection: sqlite3.Connection | None = None
        self._lock_timeout_s = timeout_s

    def run(self, work: Callable[[sqlite3.Cursor], T]) -> T:
        """What `work(cursor)` returned, after its writes were committed. What it raised, with nothing written.

        Raises StoreUnavailable where the ledger cannot be written in time.
        """
        job: _Job[T] = _Job(work, time.monotonic() + self._timeout_s)
        try:
            self._queue.append(job)  # type: ignore[arg-type]
            if not self._turn.acquire(timeout=self._timeout_s):
                if self._withdraw(job):
                    raise StoreUnavailable(  # noqa: TRY301
                        f"ledger {self._path}: no turn to write within {self._timeout_s:g} s"
                    )
                self._turn.acquire()  # it is being run, and will be answered
            if job.group is None:
                self._lead(job)
        except BaseException:
            self._withdraw(job)
            raise
        finally:
            try:  # noqa: SIM105  suppress() is Python code, where an interrupt could come before the release
                self._turn.release()
            except RuntimeError:
                pass  # it was not acquired
        return self._answer(job)

    def close(self) -> None:
        """Close the connection. The next work opens it again. Nobody may be at work."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _answer(self, job: _Job[T]) -> T:
        if job.error is not None:
            raise job.error
        if job.group is None or not job.group.ended:
            raise StoreUnavailable(f"ledger {self._path}: the commit this call shared was interrupted; ask again")
        if job.group.error is not None:
            raise job.group.error
        return job.answer  # type: ignore[return-value]

    def _withdraw(self, job: _Job[T]) -> bool:
        """Take a job out of the queue; False where it is no longer there."""
        try:
            self._queue.remove(job)  # type: ignore[arg-type]
        except ValueError:
            return False
        return True

    def _lead(self, own: _Job[T]) -> None:
        """Run the queue in one transaction. What the leader raises undoes it, and the others run it on their turn."""
        group = _Group()
        jobs: list[_Job[object]] = []
        try:
            with self._gate, localcontext(EXACT):
                self._commit(own, group, jobs)
        except Exception as exc:  # noqa: BLE001  of the database, never of a work
            group.error = translated(exc, self._path) if isinstance(exc, sqlite3.Error) else exc
            group.error.__cause__ = exc if group.error is not exc else exc.__cause__
            self._withdraw(own)
            own.group = group
        except BaseException:
            if not group.ended:
                for job in reversed(jobs):
                    job.group = None
                    if job is not own:
                        self._queue.appendleft(job)
            raise
        group.ended = True

    def _commit(self, own: _Job[T], group: _Group, jobs: list[_Job[object]]) -> None:
        connection = self._open(own.deadline)
        if connection.in_transaction:
            raise StoreUnavailable(f"ledger {self._path}: a signal handler asked for it in the middle of a commit")
        cursor = connection.cursor()
        committing = False
        try:
            # Before anyone else is taken in: if the leader's time is over, those who queue behind have their turn.
            cursor.execute("BEGIN IMMEDIATE")
            self._gather(own, group, jobs)
            if len(jobs) == 1:
                _run(jobs[0], cursor)
            else:
                for job in jobs:
                    _run_in_savepoint(job, cursor)
            committing = True
            cursor.execute("COMMIT")
            group.ended = True
        except BaseException as exc:
            if connection.in_transaction:
                connection.rollback()
            elif committing and not isinstance(exc, sqlite3.Error):
                group.ended = True  # an interrupt that came after the commit: it stands
            if not isinstance(exc, _WorkRaised):
                raise

    def _gather(self, own: _Job[T], group: _Group, jobs: list[_Job[object]]) -> None:
        """Take the leader's work and those that queue with it."""
        self._withdraw(own)
        jobs.append(own)  # type: ignore[arg-type]
        while self._queue and len(jobs) < MAX_GROUP:
            jobs.append(self._queue.popleft())
        for job in jobs:
            job.group = group

    def _open(self, deadline: float) -> sqlite3.Connection:
        """The connection, set to wait for other processes no longer than the caller still has."""
        if self._connection is None:
            self._connection = connect(self._path, timeout_s=self._timeout_s)
            self._lock_timeout_s = self._timeout_s
        left_s = deadline - time.monotonic()
        timeout_s = self._timeout_s if left_s > 0.9 * self._timeout_s else max(left_s, 0.0)
        if timeout_s != self._lock_timeout_s:
            self._connection.execute(f"PRAGMA busy_timeout = {timeout_s * 1000:.0f}")
            self._lock_timeout_s = timeout_s
        return self._connection


class _WorkRaised(Exception):
    """A lone work raised: its transaction is rolled back, and its error is its caller's answer."""


def _run(job: _Job[object], cursor: sqlite3.Cursor) -> None:
    try:
        job.answer = job.work(cursor)
    except sqlite3.Error:
        raise
    except Exception as exc:
        job.error = exc
        raise _WorkRaised from exc


def _run_in_savepoint(job: _Job[object], cursor: sqlite3.Cursor) -> None:
    cursor.execute("SAVEPOINT work")
    try:
        job.answer = job.work(cursor)
    except sqlite3.Error:
        raise  # the whole transaction is in doubt
    except Exception as exc:  # noqa: BLE001  one caller's error is that caller's answer
        cursor.execute("ROLLBACK TO work")
        job.error = exc
    cursor.execute("RELEASE work")
