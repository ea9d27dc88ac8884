"""What Redis admitted, brought into the ledger: the safety net below `tallystick drain --follow`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefect import task

from metering.booking import Counts
from metering.errors import InvalidSetting, StoreUnavailable
from metering.meter import Meter

if TYPE_CHECKING:
    from metering.admission.redis.shards import ShardState
    from metering.drain import ShardLag

__all__ = ["DrainReport", "drain_all", "drain_shards"]

WELL = ("open", "unused")


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainReport:
    """What a run did, and how the shards stand after it."""

    done: dict[str, int]
    """Entries by what became of them, and `expired_holds`."""
    problems: tuple[str, ...]
    """What could not be done, and which shards wait for a rebuild."""
    states: tuple[ShardState, ...]
    lags: tuple[ShardLag, ...]

    def markdown(self) -> str:
        """The report for people, in Markdown."""
        did = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in self.done.items() if count)
        left = sum(lag.entries for lag in self.lags)
        oldest_s = max((lag.oldest_s for lag in self.lags if lag.oldest_s is not None), default=0.0)
        lines = [
            *(f"**{problem}**\n" for problem in self.problems),
            f"- this run: {did or 'nothing to do'}",
            f"- still to drain: {left:,} events" + (f", the oldest {oldest_s:,.0f} s old" if left else ""),
            f"- lost by Redis so far: {sum(lag.lost for lag in self.lags):,} events",
            f"- open dead letters: {sum(lag.dead_letters for lag in self.lags):,}",
        ]
        rows = [
            f"| {lag.shard} | {found.state} | {lag.entries:,} | {lag.lost:,} | {lag.dead_letters:,} |"
            for found, lag in zip(self.states, self.lags, strict=True)
            if found.state not in WELL or lag.entries or lag.lost or lag.dead_letters
        ]
        if rows:
            lines += ["", "| shard | state | to drain | lost | dead letters |", "|--:|---|--:|--:|--:|", *rows]
        return "\n".join(lines)


def drain_all() -> DrainReport:
    """Carry the spool, send the outbox, drain each shard that no other drain is at, give back expired holds.

    None of these keeps another from being done. Reads METERING_* settings. Raises `InvalidSetting` without
    METERING_QUOTA_URL, and `StoreUnavailable` where Redis or the ledger is away.
    """
    done, expired = Counts(), 0
    problems = []
    with Meter.from_env(create=False, actor="drain_events") as meter:
        store = meter._redis
        if store is None:
            raise InvalidSetting(
                "METERING_QUOTA_URL", None, "a Redis URL: without one the ledger itself decides quotas"
            )
        from metering.admission.redis.shards import shard_states  # noqa: PLC0415  jobs need no Redis elsewhere
        from metering.drain import Drain  # noqa: PLC0415

        drain = Drain(meter.ledger, store.link, announce=store.announce)
        try:
            meter.flush()
        except StoreUnavailable as exc:
            problems.append(f"spool: {exc}")
        try:
            done = drain.run(polite=True)
        except StoreUnavailable as exc:
            problems.append(f"drain: {exc}")
        try:
            expired = meter.expire_holds()
        except StoreUnavailable as exc:
            problems.append(f"expired holds: {exc}")
        states = shard_states(meter.ledger, store.link)
        lags = drain.lag()
    unwell = Counter(found.state for found in states if found.state not in WELL)
    if unwell:
        said = ", ".join(f"{count} {state}" for state, count in sorted(unwell.items()))
        problems.insert(0, f"shards: {said}: nothing is admitted there until `tallystick quota rebuild`")
    return DrainReport(
        done={**{name: getattr(done, name) for name in Counts.__slots__}, "expired_holds": expired},
        problems=tuple(problems),
        states=tuple(states),
        lags=tuple(lags),
    )


@task
def drain_shards() -> DrainReport:
    """See `drain_all`."""
    return drain_all()
