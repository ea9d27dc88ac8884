"""Group commit: concurrent callers of one process share a transaction, and each is answered after it is durable."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from decimal import localcontext
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from metering.billing.money import EXACT
from metering.errors import StoreUnavailable
from metering.ledger.transactions import Locked

if TYPE_CHECKING:
    from metering.ledger.forks import Gate
    from metering.ledger.transactions import Driver, Transaction

__all__ = ["Work", "Writer"]

T = TypeVar("T")

Work = Callable[[Any], T]
"""What a caller wants done with the cursor of a `Transaction`. It may be run more than once, with what it wrote before
undone. See `Locked`.
"""

MAX_GROUP = 128
"""Works that share one commit at the most, so that nobody waits for an endless group."""

LOOK_S = 0.01
"""How often one who waits looks for himself whether it is his turn: who should have woken him may be interrupted."""

IDLE_S = 10.0
"""How long the thread that serves event loops waits for more before it ends."""


class _Group:
    """Works that share one transaction. `ended` is set last, in one step that no interrupt can halve."""

    __slots__ = ("ended", "error")

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.ended = False


class _Asked(Generic[T]):
    """One caller's work, and where its answer is put."""

    __slots__ = ("answer", "deadline", "error", "group", "work")

    def __init__(self, work: Work[T], deadline: float) -> None:
        self.work = work
        self.deadline = deadline
        self.answer: T | None = None
        self.error: BaseException | None = None
        self.group: _Group | None = None


class _Job(_Asked[T]):
    """A work that a thread waits for."""

    __slots__ = ("_news",)

    def __init__(self, work: Work[T], deadline: float) -> None:
        super().__init__(work, deadline)
        self._news = threading.Lock()
        self._news.acquire()

    def wait(self) -> None:
        """Wait to be woken, or for LOOK_S."""
        self._news.acquire(timeout=LOOK_S)

    def wake(self) -> None:
        """Let its caller look again."""
        try:  # noqa: SIM105  suppress() would take longer than the waking
            self._news.release()
        except RuntimeError:
            pass  # it was woken before


class _AwaitedJob(_Asked[T]):
    """A work that a task awaits. Its loop may withdraw it until the worker takes it."""

    __slots__ = ("_free", "done")

    def __init__(self, work: Work[T], deadline: float, done: asyncio.Future[None]) -> None:
        super().__init__(work, deadline)
        self.done = done
        self._free = [self]

    def take(self) -> bool:
        """Whether nobody took it before: the worker to run it, or its loop to withdraw it."""
        try:
            self._free.pop()
        except IndexError:
            return False
        return True


class Writer:
    """Runs works one after the other, each atomic, on one connection, with decimals that are never rounded.

    A caller who finds nobody at work commits at once, alone. Callers who arrive meanwhile queue and wait for their
    turn; who gets it first runs the whole queue in one transaction, wakes the others, who find themselves answered, and
    then the first of those who came later. Everyone also looks for himself now and then, so an interrupt in one caller
    leaves no other waiting.

    An event loop must not wait for its turn. What its tasks ask for is run by one worker thread, as groups as well: it
    is never interrupted, so it may wake them.
    """

    def __init__(self, driver: Driver, *, timeout_s: float, gate: Gate) -> None:
        self._driver = driver
        self._timeout_s = timeout_s
        self._gate = gate
        # Re-entrant only because such a lock knows its owner: an interrupt may come right after it was acquired.
        self._turn = threading.RLock()
        self._queue: deque[_Job[object]] = deque()
        self._inbox: SimpleQueue[_AwaitedJob[object] | None] = SimpleQueue()
        self._worker: threading.Thread | None = None
        self._connection: Any = None
        self._lock_timeout_s = timeout_s

    def run(self, work: Work[T]) -> T:
        """What `work(cursor)` returned, after its writes were committed. What it raised, with nothing written.

        Raises StoreUnavailable where the ledger cannot be written in time.
        """
        job: _Job[T] = _Job(work, time.monotonic() + self._timeout_s)
        try:
            self._queue.append(job)  # type: ignore[arg-type]
            while not self._turn.acquire(blocking=False):
                group = job.group
                if group is not None and group.ended:
                    return self._answer(job)
                if time.monotonic() > job.deadline and self._withdraw(job):
                    raise self._no_turn()  # noqa: TRY301
                job.wait()
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
        self._pass_on()
        return self._answer(job)

    async def run_async(self, work: Work[T]) -> T:
        """As `run`, never blocking the event loop. Cancelled before it was begun, the work is not done; else it is."""
        loop = asyncio.get_running_loop()
        job: _AwaitedJob[T] = _AwaitedJob(work, time.monotonic() + self._timeout_s, loop.create_future())
        timer = loop.call_later(self._timeout_s, self._give_up, job)
        try:
            self._inbox.put(job)  # type: ignore[arg-type]
            if self._worker is None:
                self._start_worker()
            await job.done
        except BaseException:
            job.take()
            raise
        finally:
            timer.cancel()
        return self._answer(job)

    def close(self) -> None:
        """Close the connection. The next work opens it again. Nobody may be at work."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        if self._worker is not None:
            self._inbox.put(None)

    def _answer(self, job: _Asked[T]) -> T:
        if job.error is not None:
            raise job.error
        if job.group is None or not job.group.ended:
            raise StoreUnavailable(
                f"ledger {self._driver.where}: the commit this call shared was interrupted; ask again"
            )
        if job.group.error is not None:
            raise job.group.error
        return job.answer  # type: ignore[return-value]

    def _no_turn(self) -> StoreUnavailable:
        return StoreUnavailable(f"ledger {self._driver.where}: no turn to write within {self._timeout_s:g} s")

    def _withdraw(self, job: _Job[T]) -> bool:
        """Take a job out of the queue; False where it is no longer there."""
        try:
            self._queue.remove(job)  # type: ignore[arg-type]
        except ValueError:
            return False
        return True

    def _pass_on(self) -> None:
        """Wake the first in the queue: it is his turn."""
        with suppress(IndexError):
            self._queue[0].wake()

    def _lead(self, own: _Job[T]) -> None:
        """Run the queue in one transaction. What the leader raises undoes it, and the others run it on their turn."""
        group = _Group()
        jobs: list[_Job[object]] = []

        def gather() -> None:
            self._withdraw(own)
            jobs.append(own)  # type: ignore[arg-type]
            while self._queue and self._may_join(jobs, self._queue[0]):
                jobs.append(self._queue.popleft())

        try:
            with self._gate, localcontext(EXACT):
                self._commit(own.deadline, gather, group, jobs)
        except Exception as exc:  # noqa: BLE001  of the database, never of a work
            group.error = self._told(exc)
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
        for job in jobs:
            job.wake()

    def _commit(
        self, deadline: float, gather: Callable[[], None], group: _Group, jobs: Sequence[_Asked[object]]
    ) -> None:
        """One transaction with the jobs that `gather` puts into `jobs`; begun by `deadline`, or not at all."""
        driver = self._driver
        connection = self._open(deadline)
        if driver.is_busy(connection):
            raise StoreUnavailable(f"ledger {driver.where}: a signal handler asked for it in the middle of a commit")
        committing = False
        try:
            # Before anyone else is taken in: if the leader's time is over, those who queue behind have their turn.
            try:
                cursor = driver.begin(connection)
            except driver.error:
                if not driver.is_lost(connection):
                    raise
                connection = self._open(deadline)  # the server has been away since the last transaction
                cursor = driver.begin(connection)
            gather()
            for job in jobs:
                job.group = group
            driver.lock(cursor, [job.work for job in jobs])
            if len(jobs) == 1:
                self._run(jobs[0], cursor)
            else:
                self._run_together(jobs, cursor)
            committing = True
            driver.commit(cursor, self._timeout_s)
            group.ended = True
        except BaseException as exc:
            if driver.is_busy(connection):
                driver.rollback(connection)
            elif committing and not isinstance(exc, (driver.error, StoreUnavailable)):
                group.ended = True  # an interrupt that came after the commit: it stands
            if not isinstance(exc, _WorkRaised):
                raise

    def _open(self, deadline: float) -> Any:
        """The connection, set to wait for other processes no longer than the caller still has."""
        if self._connection is not None and self._driver.is_lost(self._connection):
            self._connection = None
        if self._connection is None:
            self._connection = self._driver.connect(self._timeout_s)
            self._lock_timeout_s = self._timeout_s
        left_s = deadline - time.monotonic()
        timeout_s = self._timeout_s if left_s > 0.9 * self._timeout_s else max(left_s, 0.0)
        if timeout_s != self._lock_timeout_s:
            self._driver.set_timeout(self._connection, timeout_s)
            self._lock_timeout_s = timeout_s
        return self._connection

    def _may_join(self, jobs: Sequence[_Asked[object]], job: _Asked[object]) -> bool:
        """Whether a work may share a transaction with those before it."""
        if len(jobs) >= MAX_GROUP:
            return False
        return self._driver.groups_all or (isinstance(job.work, Locked) and isinstance(jobs[0].work, Locked))

    def _run(self, job: _Asked[object], cursor: Transaction) -> None:
        try:
            job.answer = job.work(cursor)
        except self._driver.error:
            raise
        except Exception as exc:
            job.error = exc
            raise _WorkRaised from exc
        cursor.complete()

    def _run_together(self, jobs: Sequence[_Asked[object]], cursor: Any) -> None:
        """Run each; what raises has written nothing. A savepoint a work is dear, so only where one failed halfway."""
        cursor.execute("SAVEPOINT works")
        if all(self._ran_cleanly(job, cursor) for job in jobs):
            cursor.complete()
            return
        cursor.execute("ROLLBACK TO works")
        for job in jobs:
            alone = self._driver.again(cursor)
            alone.execute("SAVEPOINT work")
            if self._ran_cleanly(job, alone):
                alone.complete()
            else:
                alone.execute("ROLLBACK TO work")
            alone.execute("RELEASE work")

    def _ran_cleanly(self, job: _Asked[object], cursor: Any) -> bool:
        """Run a work. False where it raised after it had written."""
        job.error = None
        before = self._driver.changes(cursor)
        try:
            job.answer = job.work(cursor)
        except self._driver.error:
            raise  # the whole transaction is in doubt
        except Exception as exc:  # noqa: BLE001  one caller's error is that caller's answer
            job.error = exc
            return self._driver.changes(cursor) == before
        return True

    def _told(self, error: Exception) -> Exception:
        """What callers are told of an error of the database."""
        if not isinstance(error, self._driver.error):
            return error
        told: Exception = self._driver.told(error)
        told.__cause__ = error
        return told

    # What follows serves event loops. `_work` and what it calls run on the worker, `_give_up` on the loop of its job.

    def _give_up(self, job: _AwaitedJob[T]) -> None:
        if job.take():
            job.error = self._no_turn()
            _wake([job.done])

    def _start_worker(self) -> None:
        self._worker = threading.Thread(target=self._work, name="metering-ledger", daemon=True)
        try:
            self._worker.start()
        except BaseException:
            self._worker = None
            raise

    def _work(self) -> None:
        waiting: deque[_AwaitedJob[object]] = deque()
        while True:
            job = None
            with suppress(Empty):
                job = self._inbox.get(timeout=IDLE_S)
            if job is not None:
                waiting.append(job)
                while waiting:
                    self._lead_for(waiting)
                continue
            self._worker = None
            # Whoever put a job in before that has started no other worker. Two of them at once would do no harm.
            if self._inbox.empty():
                return
            self._worker = threading.current_thread()

    def _lead_for(self, waiting: deque[_AwaitedJob[object]]) -> None:
        """Run those who wait in one transaction, and wake them. The first is told where it could not begin."""
        group = _Group()
        jobs: list[_AwaitedJob[object]] = []
        first = waiting[0]

        def gather() -> None:
            while len(jobs) < MAX_GROUP:
                try:
                    job = waiting.popleft() if waiting else self._inbox.get_nowait()
                except Empty:
                    return
                if job is None:
                    continue
                if jobs and not self._may_join(jobs, job):
                    waiting.appendleft(job)
                    return
                if job.take():
                    jobs.append(job)

        try:
            with self._turn, self._gate, localcontext(EXACT):
                self._commit(first.deadline, gather, group, jobs)
        except BaseException as exc:  # noqa: BLE001  whatever it is, they wait for an answer
            group.error = self._told(exc) if isinstance(exc, Exception) else exc
            if not jobs and first in waiting:
                waiting.popleft()
                if first.take():
                    first.group = group
                    jobs.append(first)
        group.ended = True
        self._pass_on()
        _tell(jobs)


def _tell(jobs: list[_AwaitedJob[object]]) -> None:
    by_loop: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for job in jobs:
        by_loop.setdefault(job.done.get_loop(), []).append(job.done)
    for loop, done in by_loop.items():
        with suppress(RuntimeError):  # it was closed, and its tasks with it
            loop.call_soon_threadsafe(_wake, done)


def _wake(done: list[asyncio.Future[None]]) -> None:
    for future in done:
        if not future.done():
            future.set_result(None)


class _WorkRaised(Exception):
    """A lone work raised: its transaction is rolled back, and its error is its caller's answer."""
