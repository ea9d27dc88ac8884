"""The shards as a whole: whether Redis still has what it had, and beginning anew where it has not."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal

from metering.admission.decide import Counter
from metering.admission.redis import epochs
from metering.admission.redis.copies import from_us, unscaled
from metering.admission.redis.drive import drive
from metering.admission.redis.keys import SHARDS, account_key, counter_parts, shard_key, shard_of
from metering.admission.redis.scripts import arguments
from metering.admission.redis.wire import NotDone, OutcomeUnknown
from metering.admission.verify import CounterCheck
from metering.drain import Drain
from metering.errors import StoreUnavailable
from metering.windows import Window

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from datetime import datetime

    from metering.admission.redis.link import Link
    from metering.admission.redis.verbs import Verbs
    from metering.ledger import Ledger

__all__ = ["ShardState", "check_counters", "rebuild", "shard_states"]

TIMEOUT_S = 5.0
"""How long one command may take. No call waits for these."""

State = Literal["unused", "open", "fenced", "lost", "behind"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardState:
    """One shard, as Redis has it and as the ledger knows it."""

    shard: int
    state: State
    """`lost`: gone from Redis; `behind`: it has less than was drained; `fenced`: admits nothing until it is rebuilt."""
    reason: str | None
    """Why it is fenced."""
    epoch: int
    seq: int
    """Of Redis; 0 where it has none."""


def shard_states(ledger: Ledger, link: Link, shards: Iterable[int] = range(SHARDS)) -> list[ShardState]:
    """How each shard is. Raises `StoreUnavailable`."""
    return [_state(ledger, link, shard) for shard in shards]


def rebuild(
    ledger: Ledger, link: Link, *, clock: Callable[[], datetime], shards: Iterable[int] | None = None
) -> list[int]:
    """Begin a new epoch of each shard that is not well (or of `shards`), once all it still has is in the ledger.

    Its counters are then counted anew from the ledger and the open holds, each at its account's next call. Returns the
    shards that were rebuilt. Raises `StoreUnavailable`; what was rebuilt by then stays so, and the rest stays fenced.
    """
    wanted = None if shards is None else set(shards)
    rebuilt = []
    for found in shard_states(ledger, link):
        if found.state == "unused" or (found.shard not in wanted if wanted is not None else found.state == "open"):
            continue
        _run(link, found.shard, "fence", {"reason": "rebuild"})
        Drain(ledger, link, clock=clock, shards=[found.shard]).run()
        known = epochs.known_of(ledger, found.shard) or (0, 0)
        epoch = max(known[0], found.epoch) + 1
        # The ledger first: after a kill here the shard is behind it, and stays fenced.
        epochs.begin(ledger, found.shard, epoch)
        _run(link, found.shard, "open", {"epoch": epoch})
        rebuilt.append(found.shard)
    return rebuilt


def check_counters(link: Link, verbs: Verbs) -> list[CounterCheck]:
    """Count every current counter again. Calls that are made meanwhile may show as differences."""
    checks = []
    for key in _counter_keys(link):
        account, generation, metric, line, key_id, start_us, end_us = counter_parts(key)
        shard = shard_of(account)
        epoch, gen = _call(link, shard, "HMGET", account_key(shard, "account", account), "epoch", "gen")
        kept = _call(link, shard, "GET", key)
        if kept is None or generation != f"{int(epoch or 0)}.{int(gen or 0)}":
            continue
        counter = Counter(metric, line, key_id, Window(start=from_us(start_us), end=from_us(end_us)))
        _, (count,) = drive(verbs.counted(account, [counter]), link)
        checks.append(
            CounterCheck(
                account=account,
                counter=counter,
                kept=Decimal(unscaled(metric, kept)),
                counted=Decimal(unscaled(metric, count.total)),
            )
        )
    return checks


def _counter_keys(link: Link) -> list[str]:
    try:
        return sorted(link.scan("tally:{m*}:counter:*", TIMEOUT_S))
    except (NotDone, OutcomeUnknown) as exc:
        raise StoreUnavailable(str(exc)) from exc


def _state(ledger: Ledger, link: Link, shard: int) -> ShardState:
    known = epochs.known_of(ledger, shard)  # first: what Redis has only grows
    epoch, seq, fenced = _call(link, shard, "HMGET", shard_key(shard, "shard"), "epoch", "seq", "fenced")
    found = (int(epoch or 0), int(seq or 0))
    state: State = "open"
    if epoch is None:
        state = "unused" if known is None else "lost"
    elif fenced is not None:
        state = "fenced"
    elif known is not None and found < known:
        state = "behind"
    return ShardState(
        shard=shard, state=state, reason=None if fenced is None else fenced.decode(), epoch=found[0], seq=found[1]
    )


def _run(link: Link, shard: int, script: str, said: dict[str, Any]) -> None:
    try:
        link.script(shard, script, [shard_key(shard, "shard")], arguments(said), TIMEOUT_S)
    except (NotDone, OutcomeUnknown) as exc:
        raise StoreUnavailable(str(exc)) from exc


def _call(link: Link, shard: int, *command: Any) -> Any:
    try:
        return link.call(shard, *command, timeout_s=TIMEOUT_S)
    except (NotDone, OutcomeUnknown) as exc:
        raise StoreUnavailable(str(exc)) from exc
