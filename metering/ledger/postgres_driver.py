"""Transactions of the writer on Postgres: accounts are locked in one order, and a lost commit is asked after."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import psycopg
from psycopg.pq import TransactionStatus

from metering.errors import StoreUnavailable
from metering.ledger.postgres import SERIAL, connect, described, translated
from metering.ledger.transactions import Locked, Transaction

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Self

    from metering.errors import LedgerError

__all__ = ["PostgresCursor", "PostgresDriver"]

PAUSE_S = 0.02

_LOCK = """
SELECT count(*) FROM (
    SELECT account FROM accounts WHERE account IN (
        SELECT unnest(%(accounts)s::text[]) UNION SELECT account FROM api_keys WHERE digest = ANY(%(digests)s)
    )
    ORDER BY account FOR NO KEY UPDATE OF accounts
) AS locked
"""
_BEGIN_MARKS = """
INSERT INTO writer_commits (writer, mark, marked_at) VALUES (%(writer)s, %(writer)s, now()) ON CONFLICT DO NOTHING
"""
_FORGET_MARKS = "DELETE FROM writer_commits WHERE marked_at < now() - interval '30 days'"
_MARK = "UPDATE writer_commits SET mark = %s, marked_at = now() WHERE writer = %s"
# Waits for the end of the transaction whose answer was lost, if that is still under way: it has the row.
_LAST_MARK = "SELECT mark FROM writer_commits WHERE writer = %s FOR UPDATE"


class PostgresCursor(psycopg.Cursor[Any]):
    """A cursor that takes the statements of `admission.statements`."""

    def execute(self, query: Any, params: Any = None, **options: Any) -> Self:
        """Run a statement, in the spelling of Postgres."""
        return super().execute(getattr(query, "on_postgres", query), params, **options)

    def executemany(self, query: Any, params_seq: Iterable[Any], **options: Any) -> None:
        """Run a statement with many sets of values."""
        super().executemany(getattr(query, "on_postgres", query), params_seq, **options)


class _PostgresTransaction(Transaction, PostgresCursor):
    """`writes` counts statements that wrote."""

    writes = 0

    def execute(self, query: Any, params: Any = None, **options: Any) -> Self:
        super().execute(query, params, **options)
        if self.statusmessage is not None and self.statusmessage.startswith(("INSERT", "UPDATE", "DELETE")):
            self.writes += 1
        return self

    def executemany(self, query: Any, params_seq: Iterable[Any], **options: Any) -> None:
        self.writes += 1
        super().executemany(query, params_seq, **options)


class PostgresDriver:
    """Postgres at a URL. See `Driver`."""

    error: type[Exception] = psycopg.Error
    groups_all = False

    def __init__(self, url: str) -> None:
        self.where = described(url)
        self._url = url
        self._writer = uuid4()

    def connect(self, timeout_s: float) -> psycopg.Connection[Any]:
        """See `Driver`."""
        connection = connect(self._url, timeout_s=timeout_s)
        try:
            connection.execute(_FORGET_MARKS)
            connection.execute(_BEGIN_MARKS, {"writer": self._writer})
        except psycopg.Error as exc:
            connection.close()
            raise self.told(exc) from exc
        return connection

    def set_timeout(self, connection: psycopg.Connection[Any], timeout_s: float) -> None:
        """See `Driver`."""
        connection.execute(f"SET lock_timeout = {max(1, round(timeout_s * 1000))}")

    def is_lost(self, connection: psycopg.Connection[Any]) -> bool:
        """See `Driver`."""
        return connection.closed

    def is_busy(self, connection: psycopg.Connection[Any]) -> bool:
        """See `Driver`."""
        return connection.info.transaction_status not in (TransactionStatus.IDLE, TransactionStatus.UNKNOWN)

    def begin(self, connection: psycopg.Connection[Any]) -> _PostgresTransaction:
        """See `Driver`."""
        transaction = _PostgresTransaction(connection)
        transaction.execute("BEGIN ISOLATION LEVEL READ COMMITTED")
        return transaction

    def lock(self, transaction: _PostgresTransaction, works: Sequence[Callable[[Any], object]]) -> None:
        """See `Driver`."""
        locked = [work for work in works if isinstance(work, Locked)]
        if len(locked) < len(works):
            # Those that do not say what they write about take turns, with each other and with cold writes.
            transaction.execute("SELECT pg_advisory_xact_lock(%s)", (SERIAL,))
        accounts = [account for work in locked for account in work.accounts]
        digests = [work.key_digest for work in locked if work.key_digest is not None]
        if accounts or digests:
            transaction.execute(_LOCK, {"accounts": accounts, "digests": digests})

    def again(self, transaction: _PostgresTransaction) -> _PostgresTransaction:
        """See `Driver`."""
        return _PostgresTransaction(transaction.connection)

    def changes(self, transaction: _PostgresTransaction) -> int:
        """See `Driver`."""
        return transaction.writes

    def commit(self, transaction: _PostgresTransaction, timeout_s: float) -> None:
        """See `Driver`. Where the server went away in the middle it is asked afterwards what became of it."""
        mark = uuid4()
        transaction.execute(_MARK, (mark, self._writer))
        try:
            transaction.execute("COMMIT")
        except psycopg.OperationalError as exc:
            if not transaction.connection.closed:
                raise
            self._require_committed(mark, time.monotonic() + timeout_s, exc)
        if transaction.statusmessage == "ROLLBACK":
            raise StoreUnavailable(f"ledger {self.where}: the transaction was rolled back")

    def rollback(self, connection: psycopg.Connection[Any]) -> None:
        """See `Driver`."""
        if not connection.closed:
            connection.rollback()

    def told(self, error: Exception) -> LedgerError:
        """See `Driver`."""
        assert isinstance(error, psycopg.Error)
        return translated(error, self.where)

    def _require_committed(self, mark: UUID, deadline: float, lost: psycopg.Error) -> None:
        while (left_s := deadline - time.monotonic()) > 0:
            try:
                with connect(self._url, timeout_s=left_s) as connection:
                    found = connection.execute(_LAST_MARK, (self._writer,)).fetchone()
            except (psycopg.Error, StoreUnavailable):
                time.sleep(min(PAUSE_S, left_s))  # nothing tells when a server is back
                continue
            if found is None:
                break
            if UUID(found[0]) == mark:
                return
            raise lost
        raise StoreUnavailable(
            f"ledger {self.where}: the connection was lost in the middle of a commit, so it is not known whether this "
            "call is in the ledger; with an idempotency key it can be sent again"
        ) from lost
