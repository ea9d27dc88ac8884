"""What an entry of a shard's stream becomes in the ledger: a fact, a reversal, a key used again, or a dead letter."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal, localcontext
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

import msgspec

from metering import checks
from metering.admission.counters import CounterBook
from metering.admission.redis.stream import BODY, HEADER, decode_event, decode_header, position_of
from metering.admission.rows import event_row
from metering.admission.statements import statements
from metering.billing.money import EXACT
from metering.corrections import billed_event, correcting_ids, reversal_row
from metering.errors import InvalidEvent, UnknownAccount
from metering.events import TOKEN_FIELDS, Call, TokenUsage, derive_event_id
from metering.ledger.transactions import doubts_the_transaction
from metering.ledger.types import instant_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from metering.admission.redis.stream import Header, StreamedEvent
    from metering.ledger.transactions import Cursor


__all__ = ["Booked", "Counts", "book", "foreseen"]

UNDONE = "outcome unknown, undone"
"""The reason of a reversal that a cancel books."""

MAX_ERROR = 1_000
"""Characters of a dead letter's error."""

_SQL = statements()
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(slots=True, kw_only=True)
class Counts:
    """How many entries became what."""

    inserted: int = 0
    """Facts billed."""
    redelivered: int = 0
    """In the ledger already, from the very same entries."""
    reused: int = 0
    """Not billed again: their keys had been used for the same requests, which Redis had forgotten."""
    cancelled: int = 0
    """Calls undone, because nobody learned their outcome."""
    baseless: int = 0
    """Cancels of calls that had never been admitted."""
    dead: int = 0
    """Dead letters."""
    empty: int = 0
    """Entries without content."""
    lost: int = 0
    """Sequence numbers that no readable entry had."""

    def add(self, other: Counts) -> None:
        """Take in what became of others."""
        for name in Counts.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(slots=True, kw_only=True)
class Booked:
    """A batch that the ledger has."""

    counts: Counts = field(default_factory=Counts)
    billed: list[str] = field(default_factory=list)
    """Stream ids whose accounts' counters are right as they are."""
    moot: list[tuple[str, str]] = field(default_factory=list)
    """Stream ids, and the accounts whose counters are to be counted anew."""
    behind: str | None = None
    """How it can be told that the server has gone back in time."""


Found = list[Any] | None
"""An entry as XRANGE answers it."""


def book(cursor: Cursor, shard: int, entries: Iterable[Found], now: datetime) -> Booked:
    """Within a transaction: book a batch. Booking it again finds it booked."""
    return _Batch(_Ledger(cursor), shard, now).book(entries)


def foreseen(cursor: Cursor, shard: int, entries: Iterable[Found], now: datetime) -> list[dict[str, Any]]:
    """The rows that `book` would add to `events`, reversals included. Writes nothing."""
    ledger = _Foresight(cursor)
    with localcontext(EXACT):
        _Batch(ledger, shard, now).foresee(entries)
    return list(ledger.rows.values())


class _Entry(NamedTuple):
    """An entry, as far as it can be read."""

    stream_id: str
    position: str
    packed_header: bytes
    packed_event: bytes
    header: Header | None
    event: StreamedEvent | None
    problem: Exception | None
    """Why header or event are not there."""


class _Outcome(NamedTuple):
    """What became of an entry: the name of one of `Counts`."""

    became: str
    is_known: bool = False
    """Whether it was booked before."""
    is_moot: bool = False
    """Whether the account's counters may differ from the ledger, and are to be counted anew."""


class _Fact(NamedTuple):
    """A fact that came under an id, or under one derived from it because the key was used again."""

    event_id: UUID
    position: str | None
    fingerprint: str | None


class _State(NamedTuple):
    """What is billed for a fact now: itself, or what replaced it; None where it was undone, by the entry at a place."""

    billed: UUID | None
    undone_at: str | None = None


class _Ledger:
    """What the ledger has of facts that came through streams."""

    def __init__(self, cursor: Cursor) -> None:
        self.cursor = cursor

    def known(self, event_id: UUID) -> _Fact | None:
        found = self.cursor.execute(_SQL["find_position"], {"event_id": event_id.hex}).fetchone()
        return None if found is None else _Fact(event_id, *found)

    def facts(self, event_id: UUID) -> list[_Fact]:
        """What came under an id, and was billed."""
        ids = [event_id, *self._reused_as(event_id)]
        return [fact for fact in map(self.known, ids) if fact is not None]

    def state(self, event_id: UUID) -> _State:
        billed = event_id
        while True:
            reversal, replacement = correcting_ids(billed)
            reversed_by = self.known(reversal)
            if reversed_by is None:
                return _State(billed)
            if self.known(replacement) is None:
                return _State(None, reversed_by.position)
            billed = replacement

    def event(self, event_id: UUID) -> dict[str, Any]:
        return billed_event(self.cursor, event_id)

    def insert(self, row: dict[str, Any], position: str) -> bool:
        """Whether it is the first of its id."""
        names = {name: row[name] for name in ("event_id", "period", "fingerprint")}
        self.cursor.execute(_SQL["insert_streamed_id"], names | {"position": position})
        if self.cursor.rowcount == 0:
            return False
        self.cursor.execute(_SQL["insert_event"], row)
        return True

    def insert_reuse(self, row: dict[str, Any]) -> None:
        self.cursor.execute(_SQL["insert_key_reuse"], row)

    def resolve_dead(self, shard: int, event_id: UUID, now: datetime) -> bool:
        """Resolve the dead letter of an event that is undone; whether there was one."""
        names = {"shard": shard, "event_id": event_id.hex, "now": instant_text(now)}
        return self.cursor.execute(_SQL["resolve_dead_event"], names).rowcount > 0

    def _reused_as(self, event_id: UUID) -> list[UUID]:
        found = self.cursor.execute(_SQL["find_key_reuses"], {"event_id": event_id.hex}).fetchall()
        return [UUID(billed_as) for (billed_as,) in found]


class _Foresight(_Ledger):
    """The ledger as it will be: what is written here is kept beside it."""

    def __init__(self, cursor: Cursor) -> None:
        super().__init__(cursor)
        self.rows: dict[UUID, dict[str, Any]] = {}
        self._positions: dict[UUID, str] = {}
        self._reuses: dict[UUID, list[UUID]] = {}

    def known(self, event_id: UUID) -> _Fact | None:
        row = self.rows.get(event_id)
        if row is None:
            return super().known(event_id)
        return _Fact(event_id, self._positions[event_id], row["fingerprint"])

    def event(self, event_id: UUID) -> dict[str, Any]:
        return self.rows.get(event_id) or super().event(event_id)

    def insert(self, row: dict[str, Any], position: str) -> bool:
        event_id = UUID(row["event_id"])
        if self.known(event_id) is not None:
            return False
        self.rows[event_id], self._positions[event_id] = row, position
        return True

    def insert_reuse(self, row: dict[str, Any]) -> None:
        if row["billed_as"] is not None:
            self._reuses.setdefault(UUID(row["event_id"]), []).append(UUID(row["billed_as"]))

    def resolve_dead(self, shard: int, event_id: UUID, now: datetime) -> bool:  # noqa: ARG002
        return False

    def _reused_as(self, event_id: UUID) -> list[UUID]:
        return super()._reused_as(event_id) + self._reuses.get(event_id, [])


class _Batch:
    def __init__(self, ledger: _Ledger, shard: int, now: datetime) -> None:
        self._ledger = ledger
        self._cursor = ledger.cursor
        self._shard = shard
        self._now = now
        self._booked = Booked()
        self._known_plans: set[tuple[str, int]] = set()
        self._moved: set[str] = set()
        self._keys_used: dict[str, datetime] = {}

    def book(self, found: Iterable[Found]) -> Booked:
        row: tuple[int, int, int] | None = self._cursor.execute(_SQL["find_shard"], {"shard": self._shard}).fetchone()
        self._epoch, self._seq, self._lost = row or (0, 0, 0)
        entries = self._read(found)
        handled = self._handled(entries)
        for entry in entries:
            self._book_one(entry, handled.get(entry.position))
        self._keep()
        return self._booked

    def foresee(self, found: Iterable[Found]) -> None:
        entries = self._read(found)
        handled = self._handled(entries)
        for entry in entries:
            self._attempt(entry, handled.get(entry.position))

    def _read(self, found: Iterable[Found]) -> list[_Entry]:
        entries = []
        for answered in found:
            if answered is not None and answered[1]:
                entries.append(_read(self._shard, answered[0].decode(), answered[1]))
                continue
            self._booked.counts.empty += 1  # Redis 6.2 answers nil for an entry that is gone
            if answered is not None:
                self._booked.billed.append(answered[0].decode())
        return entries

    def _handled(self, entries: list[_Entry]) -> dict[str, str]:
        positions = msgspec.json.encode([entry.position for entry in entries]).decode()
        return dict(self._cursor.execute(_SQL["find_handled"], {"positions": positions}).fetchall())

    def _book_one(self, entry: _Entry, handled: str | None) -> None:
        self._cursor.execute("SAVEPOINT entry")
        outcome = self._attempt(entry, handled)
        if isinstance(outcome, Exception):
            self._cursor.execute("ROLLBACK TO entry")
            outcome = self._bury(entry, outcome)
        self._cursor.execute("RELEASE entry")
        counts = self._booked.counts
        setattr(counts, outcome.became, getattr(counts, outcome.became) + 1)
        if outcome.is_moot and entry.event is not None:
            self._booked.moot.append((entry.stream_id, entry.event.account))
        else:
            self._booked.billed.append(entry.stream_id)
        if entry.header is not None:
            self._number(entry.header, entry.position, is_known=outcome.is_known)

    def _attempt(self, entry: _Entry, handled: str | None) -> _Outcome | Exception:
        try:
            return self._outcome(entry, handled)
        except Exception as exc:
            if doubts_the_transaction(exc):
                raise
            return exc  # whatever stands there, what comes after it is drained

    def _outcome(self, entry: _Entry, handled: str | None) -> _Outcome:
        if handled is not None:
            return _Outcome("redelivered", is_known=True, is_moot=handled == "reused")
        if entry.header is None or entry.event is None:
            raise entry.problem or AssertionError
        if entry.header.kind == "cancel":
            return self._undo(entry.position, UUID(entry.header.event_id))
        return self._bill(entry.position, entry.header, entry.event)

    def _bury(self, entry: _Entry, problem: Exception) -> _Outcome:
        error = f"{type(problem).__name__}: {problem}"[:MAX_ERROR]
        self._cursor.execute(
            _SQL["insert_dead_letter"],
            {
                "position": entry.position,
                "shard": self._shard,
                "noticed_at": instant_text(self._now),
                "error": error.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0"),
                "header": entry.packed_header,
                "body": entry.packed_event,
                "account": entry.event and entry.event.account,
                "period": entry.event and entry.event.period,
            },
        )
        return _Outcome("dead")

    def _bill(self, position: str, header: Header, event: StreamedEvent) -> _Outcome:
        event_id = UUID(header.event_id)
        outcome = _Outcome("inserted")
        if not self._insert(position, header, event, event_id):
            facts = self._ledger.facts(event_id)
            if facts[0].position == position:
                return _Outcome("redelivered", is_known=True)
            same = [fact for fact in facts if fact.fingerprint == event.fingerprint]
            outcome = _Outcome("reused", is_moot=True)
            billed_as = None
            if not any(self._ledger.state(fact.event_id).billed for fact in same):
                outcome = _Outcome("inserted", is_moot=True)
                billed_as = derive_event_id("reused", event_id.hex, position)
                self._insert(position, header, event, billed_as)
            self._ledger.insert_reuse(
                {
                    "position": position,
                    "account": event.account,
                    "event_id": event_id.hex,
                    "billed_as": billed_as and billed_as.hex,
                    "noticed_at": instant_text(self._now),
                }
            )
        if event.key_id is not None:
            used_at = _moment(header.occurred_us)
            self._keys_used[event.key_id] = max(used_at, self._keys_used.get(event.key_id, used_at))
        return outcome

    def _insert(self, position: str, header: Header, event: StreamedEvent, event_id: UUID) -> bool:
        self._require_known(event)
        usage = TokenUsage(**dict(zip(TOKEN_FIELDS, event.tokens, strict=True)))
        call = Call(
            line=event.line,
            operation=event.operation,
            provider=event.provider,
            model=event.model,
            service_tier=event.service_tier,
            run_id=event.run_id,
            request_id=event.request_id,
            session_id=event.session_id,
            attributes=None if event.attributes is None else msgspec.json.decode(event.attributes),
            platform_paid=event.platform_paid,
            error=event.error,
            latency_ms=event.latency_ms,
            idempotency_key=event.idempotency_key,
        )
        row = event_row(
            call,
            event_id=event_id,
            account=event.account,
            key_id=event.key_id,
            plan_version=event.plan_version,
            period=event.period,
            occurred_at=_moment(header.occurred_us),
            recorded_at=self._now,
            usage=usage,
            quantity=checks.quantity("quantity", Decimal(event.quantity)),
            counted=True,
            billable=header.billable,
            estimated=event.estimated,
            late=header.late,
            fingerprint=event.fingerprint,
        )
        return self._insert_row(row, position)

    def _insert_row(self, row: dict[str, Any], position: str) -> bool:
        self._moved.add(row["account"])
        return self._ledger.insert(row, position)

    def _require_known(self, event: StreamedEvent) -> None:
        place = (event.account, event.plan_version)
        if place not in self._known_plans:
            names = {"account": event.account, "plan_version": event.plan_version}
            has_account, has_plan = self._cursor.execute(_SQL["find_billable_to"], names).fetchone()
            if not has_account:
                raise UnknownAccount(event.account)
            if not has_plan:
                raise InvalidEvent("plan_version", event.plan_version, "a version of a plan in the ledger")
            self._known_plans.add(place)

    def _undo(self, position: str, event_id: UUID) -> _Outcome:
        """Reverse the last fact under an id that came before the cancel, as it is billed now."""
        before = [fact for fact in self._ledger.facts(event_id) if self._is_before(fact.position, position)]
        for fact in sorted(before, key=lambda fact: _order(fact.position or ""), reverse=True):
            state = self._ledger.state(fact.event_id)
            if state.undone_at == position:
                return _Outcome("redelivered", is_known=True, is_moot=True)
            if state.billed is not None:
                row = self._ledger.event(state.billed)
                self._insert_row(reversal_row(row, reason=UNDONE, now=self._now), position)
                return _Outcome("cancelled", is_moot=True)
        was_dead = self._ledger.resolve_dead(self._shard, event_id, self._now)
        # A cancel that finds nothing leaves nothing by which it would be known again.
        return _Outcome("cancelled" if was_dead else "baseless", is_known=True, is_moot=True)

    def _is_before(self, position: str | None, other: str) -> bool:
        return position is not None and position.startswith(f"{self._shard}/") and _order(position) < _order(other)

    def _number(self, header: Header, position: str, *, is_known: bool) -> None:
        """Follow the shard's sequence. Entries come in order, so what it jumps over is never seen."""
        if header.epoch > self._epoch:
            self._epoch, self._seq, last = header.epoch, header.seq, 0
        elif header.epoch == self._epoch and header.seq > self._seq:
            self._seq, last = header.seq, self._seq
        else:
            if header.epoch == self._epoch and not is_known and self._booked.behind is None:
                self._booked.behind = f"entry {position} is number {header.seq}, but {self._seq} were drained before"
            return
        self._booked.counts.lost += header.seq - last - 1

    def _keep(self) -> None:
        cursor = self._cursor
        cursor.execute(
            _SQL["put_shard"],
            {
                "shard": self._shard,
                "epoch": self._epoch,
                "seq": self._seq,
                "lost": self._lost + self._booked.counts.lost,
                "drained_at": instant_text(self._now),
            },
        )
        CounterBook.of(cursor).forget(sorted(self._moved))
        used = [{"key_id": key_id, "at": instant_text(at)} for key_id, at in self._keys_used.items()]
        cursor.executemany(_SQL["note_key_used"], used)


def _read(shard: int, stream_id: str, pairs: Sequence[bytes]) -> _Entry:
    fields = dict(zip(pairs[::2], pairs[1::2], strict=False))
    header = event = problem = None
    try:
        header = decode_header(fields[HEADER])
        event = decode_event(fields[BODY])
    except Exception as exc:  # noqa: BLE001  it is kept as it is, and what comes after it is drained
        problem = exc
    packed_header = fields.get(HEADER, b"")
    packed_event = fields[BODY] if fields.keys() >= {HEADER, BODY} else msgspec.msgpack.encode(pairs)
    position = position_of(shard, header.epoch if header else 0, stream_id)
    return _Entry(stream_id, position, packed_header, packed_event, header, event, problem)


def _moment(us: int) -> datetime:
    return _EPOCH + timedelta(microseconds=us)


def _order(position: str) -> tuple[int, int, int]:
    """Epoch and stream id of a position: where it stands in its shard."""
    _, epoch, stream_id = position.split("/")
    milliseconds, _, number = stream_id.partition("-")
    return int(epoch), int(milliseconds), int(number)
