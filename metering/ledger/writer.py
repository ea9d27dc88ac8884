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
from metering.ledger.sqlite import connect, is_busy, translated

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from metering.ledger.forks import Gate

__all__ = ["Writer"]

T = TypeVar("T")

MAX_GROUP = 128
"""Works that share one commit at the most, so that nobody waits for an endless group."""


class _Job(Generic[T]):
    """One caller's work, and where its answer is put."""

    __slots__ = ("answer", "deadline", "error", "leads", "wake", "work")

    def __init__(self, work: Callable[[sqlite3.Cursor], T], deadline: float) -> None:
        self.work = work
        self.deadline = deadline
        self.answer: T | None = None
        self.error: BaseException | None = None
        self.leads = False
        self.wake = threading.Lock()
        self.wake.acquire()


class Writer:
    """Runs works one after the other, each atomic, on one connection, with decimals that are never rounded.

    A caller who finds nobody at work commits at once, alone. Callers who arrive meanwhile queue; one of them then
    runs the whole queue in one transaction, each work in a savepoint, and all are answered after its commit.
    """

    def __init__(self, path: Path, *, timeout_s: float, gate: Gate) -> None:
        self._path = path
        self._timeout_s = timeout_s
        self._gate = gate
        self._mutex = threading.Lock()
        self._queue: deque[_Job[object]] = deque()
        self._busy = False
        self._connection: sqlite3.Connection | None = None
        self._lock_timeout_s = timeout_s

    def run(self, work: Callable[[sqlite3.Cursor], T]) -> T:
        """What `work(cursor)` returned, after its writes were committed. What it raised, with nothing written.

        Raises StoreUnavailable where the ledger cannot be written in time.
        """
        job: _Job[T] = _Job(work, time.monotonic() + self._timeout_s)
        try:
            with self._mutex:
                if self._busy:
                    self._queue.append(job)  # type: ignore[arg-type]
                else:
                    self._busy = job.leads = True
            if not job.leads:
                self._wait(job)
            if job.leads:
                self._lead(job)
        except BaseException:
            self._desert(job)
            raise
        if job.error is not None:
            raise job.error
        return job.answer  # type: ignore[return-value]

    def close(self) -> None:
        """Close the connection. The next work opens it again. Nobody may be at work."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _wait(self, job: _Job[T]) -> None:
        if job.wake.acquire(timeout=self._timeout_s):
            return
        with self._mutex:
            if job in self._queue:
                self._queue.remove(job)  # type: ignore[arg-type]
                job.error = StoreUnavailable(f"ledger {self._path}: no turn to write within {self._timeout_s:g} s")
                return
        job.wake.acquire()  # it is being run, and will be answered

    def _desert(self, job: _Job[T]) -> None:
        """An interrupt took the caller away: nobody may wait for it to lead."""
        with self._mutex:
            if job in self._queue:
                self._queue.remove(job)  # type: ignore[arg-type]
        self._hand_over(job)

    def _hand_over(self, leader: _Job[T]) -> None:
        with self._mutex:
            if not leader.leads:
                return
            leader.leads = False
            successor = self._queue.popleft() if self._queue else None
            if successor is None:
                self._busy = False
            else:
                successor.leads = True
        if successor is not None:
            successor.wake.release()

    def _lead(self, own: _Job[T]) -> None:
        group: list[_Job[object]] = [own]  # type: ignore[list-item]
        try:
            with self._mutex:
                while self._queue and len(group) < MAX_GROUP:
                    group.append(self._queue.popleft())
            with self._gate, localcontext(EXACT):
                self._commit(group)
        except sqlite3.Error as exc:
            self._fail(group, translated(exc, self._path), exc)
        except BaseException as exc:  # noqa: BLE001  every caller of the group is told; the leader raises it
            self._fail(group, exc, None)
        finally:
            self._hand_over(own)
            for job in group[1:]:
                job.wake.release()

    def _commit(self, group: list[_Job[object]]) -> None:
        connection = self._open(group[0].deadline)
        cursor = connection.cursor()
        committing = False
        try:
            self._begin(cursor, group)
            if len(group) == 1:
                group[0].answer = group[0].work(cursor)
            else:
                for job in group:
                    _run_in_savepoint(job, cursor)
            committing = True
            cursor.execute("COMMIT")
        except BaseException as exc:
            if connection.in_transaction:
                connection.rollback()
            elif committing and not isinstance(exc, sqlite3.Error):
                group[0].error = exc  # an interrupt that came after the commit: the others are answered
                return
            raise

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

    def _begin(self, cursor: sqlite3.Cursor, group: list[_Job[object]]) -> None:
        try:
            cursor.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as exc:
            if is_busy(exc):
                # The leader's time is over, not that of those who came later: they have their turn.
                with self._mutex:
                    self._queue.extendleft(reversed(group[1:]))
                    del group[1:]
            raise

    def _fail(self, group: list[_Job[object]], error: BaseException, cause: BaseException | None) -> None:
        error.__cause__ = cause or error.__cause__
        group[0].error = error
        for job in group[1:]:
            job.error = StoreUnavailable(f"ledger {self._path}: the commit this call shared failed: {error}")
            job.error.__cause__ = error


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
