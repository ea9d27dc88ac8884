"""The verbs of admission on Redis, as generators of steps: what is asked, in which order, and when again."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import UUID

from metering.admission.counters import NOTHING, units_of
from metering.admission.directory import Directory
from metering.admission.holding import settlement_digest
from metering.admission.protocol import Decision, HoldTicket, Settled, Undecided
from metering.admission.redis import epochs
from metering.admission.redis.asking import Asker, Terms, reply_body, require_names, streamed
from metering.admission.redis.copies import (
    Frame,
    from_us,
    rate_increment,
    rate_keys,
    read_account,
    read_key,
    read_plan,
    scaled,
    to_us,
)
from metering.admission.redis.inquirer import PAUSE_S, Doubt, Inquirer, Wire
from metering.admission.redis.keys import SHARDS, account_key, account_keys, shard_key, shard_of
from metering.admission.redis.recount import open_holds, recounted, undrained_of
from metering.admission.redis.steps import Pause, Read
from metering.admission.redis.stream import encode, events_key
from metering.admission.redis.wire import Greeted, OutcomeUnknown
from metering.clock import utc_now
from metering.errors import (
    InvalidSetting,
    SettleConflict,
    StoreUnavailable,
    UnknownKey,
)
from metering.events import derive_event_id
from metering.ledger import outbox

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from datetime import datetime

    from metering.admission.decide import Counter
    from metering.admission.last_known import LastKnown
    from metering.admission.protocol import Admission, LimitStatus, Settlement
    from metering.admission.redis.copies import AccountCopy, KnownKey
    from metering.admission.redis.recount import Count
    from metering.admission.redis.steps import Steps
    from metering.booking import Found
    from metering.ledger import Ledger
    from metering.plans import Plan

__all__ = ["Verbs"]

MOST_COUNTS = 20
PAGE = 1_000
EXPIRED_PER_SWEEP = 1_000


class Verbs(Inquirer):
    """One process's side of the verbs. `clock` is for tests; without one the servers' own clocks decide."""

    def __init__(
        self,
        ledger: Ledger,
        wire: Wire,
        last_known: LastKnown | None = None,
        *,
        timeout_s: float,
        clock: Callable[[], datetime] | None = None,
    ) -> None:
        super().__init__(ledger, wire, timeout_s=timeout_s, clock=clock)
        self._last_known = last_known
        self._directory = Directory()
        self._keys: dict[str, KnownKey] = {}
        self._copies: dict[str, AccountCopy] = {}
        self._plans: dict[int, Plan] = {}
        self._counting: set[str] = set()
        """Accounts whose counters are being counted."""

    def admit(self, admission: Admission, now: datetime | None = None) -> Steps[Decision]:
        """See `AdmissionStore.admit`. Raises `Undecided` where no answer came."""
        known = yield from self._whose(admission.key_digest)
        asker, doubt = Asker(admission, known), Doubt()
        try:
            terms, reply = yield from self._agreed(known.account, asker.question, now or self._told_now(), doubt)
            decision = asker.decision(terms, reply)
        except (InvalidSetting, OutcomeUnknown, StoreUnavailable) as exc:
            if not doubt.unanswered:
                raise
            raise Undecided(
                f"no answer within {self._timeout_s:g} s, so the call is undone: {exc}", asker.undo()
            ) from exc
        # Few plans fail open, and every call comes here.
        if self._last_known is not None and (terms.copy.plan.fail == "open" or self._last_known.knows_any):
            self._last_known.note(admission.key_digest, terms.known())
        return decision

    def quota(
        self, account: str, key_id: str | None = None, now: datetime | None = None
    ) -> Steps[tuple[LimitStatus, ...]]:
        """See `AdmissionStore.quota`."""

        def question(copy: AccountCopy, at: datetime) -> Terms:
            limits = [limit for limit in copy.plan.limits if limit.scope == "account" or key_id is not None]
            frame = Frame(copy, limits, key_id or "", at)
            asked = [(limit, 0) for limit in limits]
            more = ("", "", "", False, "look", False)
            return Terms(copy, frame, key_id or "", asked, NOTHING, more)

        try:
            terms, reply = yield from self._agreed(account, question, now or self._told_now(), Doubt())
        except OutcomeUnknown as exc:
            raise StoreUnavailable(str(exc)) from exc
        return tuple(terms.verdict(reply).statuses)

    def settle(self, settlement: Settlement, now: datetime | None = None) -> Steps[Settled]:
        """See `AdmissionStore.settle`."""
        hold, call = settlement.hold, settlement.call
        given = units_of(settlement.usage, settlement.quantity)
        plan = yield from self._plan(hold.plan_version)
        if not settlement.estimated:
            require_names(plan, call, given)
        event = streamed(
            call,
            account=hold.account,
            key_id=hold.key_id,
            plan_version=hold.plan_version,
            period=hold.period,
            usage=settlement.usage,
            quantity=settlement.quantity,
            fingerprint=hold.fingerprint,
            estimated=settlement.estimated,
        )
        said = {
            "hold": hold.hold_id.hex,
            "event_id": hold.event_id.hex,
            "attempt_id": derive_event_id("attempt", hold.hold_id.hex).hex,
            "digest": settlement_digest(settlement),
            "keyed": call.idempotency_key is not None,
            "fingerprint": hold.fingerprint or "",
            "admitted": to_us(hold.admitted_at),
            "given": {metric: scaled(metric, amount) for metric, amount in given.items()},
            "rates": {
                key: rate_increment(rate, given[rate.metric])
                for rate, key in rate_keys(hold.account, plan, call.line, hold.key_id).items()
            },
        }
        shard = shard_of(hold.account)
        keys = (
            *account_keys(shard, hold.account, "shard", "events"),
            shard_key(shard, f"id:{hold.event_id.hex}"),
            shard_key(shard, f"reply:{hold.event_id.hex}"),
        )
        reply_text = reply_body(settlement.bodies.replay)
        status, _, _, _, *rest = yield from self._ask_twice_over(
            shard, "settle", keys, said, encode(event), reply_text, now=now
        )
        if status == b"conflict":
            raise SettleConflict(f"hold {hold.hold_id} was settled before with other usage; the first settle stands")
        settled_as, billable, late, repeated = rest
        return Settled(
            event_id=UUID(settled_as.decode()), billable=bool(billable), late=bool(late), repeated=bool(repeated)
        )

    def release(self, hold: HoldTicket, now: datetime | None = None) -> Steps[str]:
        """Give a hold back. What it was: `given_back`, or else `settled`, `released`, `expired` or `forgotten`."""
        shard = shard_of(hold.account)
        said = {"hold": hold.hold_id.hex}
        keys = account_keys(shard, hold.account, "shard")
        reply = yield from self._ask_twice_over(shard, "release", keys, said, now=now)
        # What an answer that was lost had given back is released when it is asked again.
        return str(reply[0].decode())

    def renew(self, hold: HoldTicket, ttl_s: float, now: datetime | None = None) -> Steps[bool]:
        """See `AdmissionStore.renew`."""
        shard = shard_of(hold.account)
        said = {"hold": hold.hold_id.hex, "ttl": int(ttl_s * 1e6)}
        keys = (shard_key(shard, "shard"), account_key(shard, "due", hold.account))
        reply = yield from self._ask_twice_over(shard, "renew", keys, said, now=now)
        return bool(reply[0] == b"renewed")

    def expire(self, now: datetime | None = None) -> Steps[int]:
        """See `AdmissionStore.expire`. A shard that is away keeps none of the others from it."""
        total, failure = 0, None
        for shard in (yield Read(partial(epochs.known_shards, self._ledger))):
            keys = (shard_key(shard, "shard"), shard_key(shard, "due"))
            expired = 1
            try:
                while expired:
                    said = {"most": EXPIRED_PER_SWEEP}
                    *_, expired = yield from self._ask_twice_over(shard, "expire", keys, said, now=now)
                    total += expired
            except StoreUnavailable as exc:
                failure = failure or exc
        if failure is not None:
            raise failure
        return total

    def cancel(self, order: Mapping[str, Any], now: datetime | None = None) -> Steps[bool]:
        """Undo a call whose outcome was unknown, as `Undecided.undo` says; whether there was something to undo."""
        account, said = order["account"], order["said"]
        shard = shard_of(account)
        keys = (*account_keys(shard, account, "shard", "events"), shard_key(shard, f"id:{said['event_id']}"))
        reply = yield from self._ask_twice_over(shard, "cancel", keys, said, order["event"], now=now)
        return bool(reply[0] == b"undone")

    def announce(self) -> Steps[None]:
        """Tell Redis what the ledger's outbox has for it. A shard that is away keeps none of the others from it."""
        failure: StoreUnavailable | None = None
        above = 0
        while rows := (yield Read(partial(_unsent, self._ledger, above))):
            told = []
            for row in rows:
                try:
                    yield from self._tell(row)
                    told.append(row.seq)
                except StoreUnavailable as exc:
                    failure = failure or exc
            yield Read(partial(_mark_sent, self._ledger, told))
            above = rows[-1].seq
        if failure is not None:
            raise failure

    def _tell(self, row: outbox.OutboxRow) -> Steps[None]:
        said = {"seq": row.seq, "recount": row.recount}
        for shard in range(SHARDS) if row.account is None else (shard_of(row.account),):
            keys = [shard_key(shard, "shard")]
            if row.account is not None:
                keys.append(account_key(shard, "account", row.account))
            yield from self._ask_twice_over(shard, "notice", keys, said, opened=False)

    def counted(self, account: str, counters: list[Counter]) -> Steps[tuple[int, list[Count]]]:
        """What counters come to, with the account's generation before it was read."""
        shard = shard_of(account)
        keys = account_keys(shard, account, "shard")
        *_, gen, found = yield from self._ask_twice_over(shard, "look", keys, {})
        undrained = yield from self._undrained(shard, account)
        counts = yield Read(
            partial(recounted, self._ledger, shard, account, counters, undrained, open_holds(found), self._server_now())
        )
        return gen, counts

    def _whose(self, digest: str) -> Steps[KnownKey]:
        known = self._keys.get(digest)
        if known is None:
            known = yield Read(partial(read_key, self._ledger, digest))
            if known is None:
                raise UnknownKey
            self._keys[digest] = known
        return known

    def _copy(self, account: str, at: datetime) -> Steps[AccountCopy]:
        copy = self._copies.get(account)
        if copy is None or not copy.covers(at) or copy.era != self._wire.era:
            copy = yield from self._read(account, at)
        return copy

    def _read(self, account: str, at: datetime) -> Steps[AccountCopy]:
        era = self._wire.era
        copy: AccountCopy = yield Read(partial(read_account, self._ledger, self._directory, account, at))
        copy.era = era
        self._copies[account] = copy
        return copy

    def _plan(self, plan_version: int) -> Steps[Plan]:
        if plan_version not in self._plans:
            self._plans[plan_version] = yield Read(partial(read_plan, self._ledger, plan_version))
        return self._plans[plan_version]

    def _agreed(
        self,
        account: str,
        question: Callable[[AccountCopy, datetime], Terms],
        now: datetime | None,
        doubt: Doubt,
    ) -> Steps[tuple[Terms, list[Any]]]:
        """Ask `admit` until Redis and this process agree on who asks, on which plan, in which windows.

        In the steady state they do, and it is asked once. Raises `OutcomeUnknown`.
        """
        not_before_us = counts = 0
        deadline = time.monotonic() + self._timeout_s
        while True:
            at = now or max(self._server_now(), from_us(not_before_us))
            copy = yield from self._copy(account, at)
            terms = question(copy, at)
            try:
                reply = yield from self._ask(
                    copy.shard,
                    "admit",
                    terms.frame.keys,
                    terms.said(),
                    *terms.blobs,
                    now=now,
                    deadline=deadline,
                    doubt=doubt,
                )
            except Greeted:
                continue  # this server may have missed what the last one was told, so the account is read again
            status, now_us, epoch, _, *rest = reply
            match status:
                case b"moved_on":
                    self._wire.heard(now_us)
                    not_before_us = now_us
                case b"stale":
                    yield from self._agree(copy, epoch, rest, at, now, deadline)
                case b"uncounted":
                    counts += 1
                    if counts > MOST_COUNTS:
                        raise StoreUnavailable(f"the counters of account {account!r} are being counted: ask again")
                    counters = list(terms.frame.counters)
                    yield from self._count_once(copy, terms.frame, [counters[place - 1] for place in rest[0]], now)
                    deadline = time.monotonic() + self._timeout_s
                case _:
                    return terms, reply

    def _agree(
        self, copy: AccountCopy, epoch: int, kept: Sequence[int], at: datetime, now: datetime | None, deadline: float
    ) -> Steps[None]:
        """Bring this process's copy of an account and Redis's together, by the ledger where one is too old."""
        version, needed, gen, plan_version, kept_epoch = kept
        if copy.version < needed or kept_epoch != epoch:
            copy = yield from self._read(copy.account, at)
        if (version, plan_version, kept_epoch) == (copy.version, copy.plan_version, epoch):
            copy.agree(epoch, gen)
            return
        said = {
            "version": copy.version,
            "plan": copy.plan_version,
            "placed": copy.placed_us,
            "keys": copy.keys,
        }
        keys = (shard_key(copy.shard, "shard"), account_key(copy.shard, "account", copy.account))
        reply = yield from self._ask_twice_over(copy.shard, "load", keys, said, now=now, deadline=deadline)
        _, _, epoch, _, version, gen, plan_version = reply
        if (version, plan_version) == (copy.version, copy.plan_version):
            copy.agree(epoch, gen)
        else:
            self._copies.pop(copy.account, None)

    def _count_once(self, copy: AccountCopy, frame: Frame, missing: list[Counter], now: datetime | None) -> Steps[None]:
        """Count, or wait while another call of this process counts for the same account: the count serves both."""
        account = copy.account
        if account in self._counting:
            while account in self._counting:
                yield Pause(PAUSE_S)
            return
        self._counting.add(account)
        try:
            yield from self._count(copy, frame, missing, now)
        finally:
            self._counting.discard(account)

    def _count(self, copy: AccountCopy, frame: Frame, missing: list[Counter], now: datetime | None) -> Steps[None]:
        """Count counters anew, unless what is in them changes meanwhile."""
        shard, account = copy.shard, copy.account
        gen, counts = yield from self.counted(account, missing)
        if gen != frame.gen:
            return
        said = {
            "gen": gen,
            "counters": [
                [count.total, to_us(counter.window.end), counter.metric, count.shares]
                for counter, count in zip(missing, counts, strict=True)
            ],
        }
        keys = (
            shard_key(shard, "shard"),
            account_key(shard, "account", account),
            *(frame.counters[counter] for counter in missing),
        )
        yield from self._ask_twice_over(shard, "count", keys, said, now=now)

    def _undrained(self, shard: int, account: str) -> Steps[list[Found]]:
        """What is in a shard's stream of an account."""
        found: list[Found] = []
        start = "-"
        while True:
            entries = yield from self._call(shard, "XRANGE", events_key(shard), start, "+", "COUNT", PAGE)
            found += undrained_of(entries, account)
            if len(entries) < PAGE:
                return found
            start = f"({entries[-1][0].decode()}"


def _unsent(ledger: Ledger, above: int) -> list[outbox.OutboxRow]:
    with ledger.read() as connection:
        return outbox.unsent(connection, PAGE, above=above)


def _mark_sent(ledger: Ledger, seqs: list[int]) -> None:
    with ledger.write() as connection:
        outbox.mark_sent(connection, seqs, utc_now())
