"""`tallystick quota`, `drain` and `verify`: where limits stand, in the ledger or on Redis."""

from __future__ import annotations

import signal
import sys
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from metering.cli.shared import GROUP, Account, AsJson, open_meter
from metering.console import show, show_line
from metering.errors import InvalidSetting

if TYPE_CHECKING:
    from collections.abc import Iterator

    from metering.admission.redis.store import RedisStore
    from metering.admission.verify import CounterCheck
    from metering.drain import Drained
    from metering.meter import Meter

__all__ = ["drain", "quota", "verify"]

DRAIN_EVERY_S = 1.0


class _Quota(TyperGroup):
    """`quota ACCOUNT` is `quota show ACCOUNT`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] != "--help" and args[0] not in self.commands:
            args = ["show", *args]
        return super().parse_args(ctx, args)


quota = typer.Typer(help="Where limits stand, and what to do when Redis has lost data.", cls=_Quota, **GROUP)


@quota.command("show")
def quota_show(
    account: Account,
    key_id: Annotated[str | None, typer.Option(help="Show this key's own limits too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Where each limit of an account stands. `tallystick quota ACCOUNT` does the same."""
    with open_meter() as meter:
        statuses = meter.quota(account, key_id=key_id)
    rows = [
        {"limit": str(s.limit), "used": s.used, "max": s.max, "remaining": s.remaining, "reset_at": s.reset_at}
        for s in statuses
    ]
    show(rows, as_json)


@quota.command("rebuild")
def quota_rebuild(
    shard: Annotated[
        list[int] | None, typer.Option(metavar="N", help="Only this shard, however it is; repeat for more.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Let shards of Redis that lost data admit again.

    What they still have is drained, and their counters are counted anew from the ledger and the open holds. Without
    --shard all that are lost, behind or fenced.
    """
    from metering.admission.redis.keys import SHARDS
    from metering.clock import utc_now

    if unknown := [number for number in shard or () if not 0 <= number < SHARDS]:
        raise InvalidSetting("--shard", unknown[0], f"0 to {SHARDS - 1}")
    with open_meter() as meter:
        store = _redis(meter)
        from metering.admission.redis.shards import rebuild, shard_states

        found = shard_states(meter.ledger, store.link)
        rebuilt = rebuild(meter.ledger, store.link, clock=utc_now, shards=shard)
    rows = [
        {"shard": was.shard, "was": was.state, "reason": was.reason, "rebuilt": was.shard in rebuilt}
        for was in found
        if was.shard in rebuilt or was.shard in (shard or ())
    ]
    if as_json:
        show(rows, as_json)
        return
    for row in rows:
        was = f"{row['was']} ({row['reason']})" if row["reason"] else row["was"]
        typer.echo(f"shard {row['shard']}: was {was}, {'rebuilt' if row['rebuilt'] else 'left as it is'}")
    if not rebuilt:
        typer.echo("nothing to do: no shard " + ("of these was ever used" if shard else "has lost data"))


def drain(
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on until interrupted, and wait out what is away.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a line of JSON; with --follow one for each run that did something.")
    ] = False,
) -> None:
    """Bring what Redis admitted into the ledger.

    First what waits in the spool is carried, and Redis told what has changed in the ledger.
    """
    with open_meter() as meter:
        store = _redis(meter)
        from metering.drain import Drain

        redis_drain = Drain(meter.ledger, store.link, announce=lambda: _carry(meter, store))
        if not follow:
            _show_drained(redis_drain.run(), as_json, even_nothing=True)
            return
        if not as_json:
            typer.echo("draining until interrupted (Ctrl-C)", err=True)
        with _told_to_stop() as told:
            redis_drain.follow(
                told, every_s=DRAIN_EVERY_S, report=lambda done: _show_drained(done, as_json, even_nothing=False)
            )


def verify(as_json: AsJson = False) -> None:
    """Count every quota counter again from the ledger, and say where they differ. Exit status 1: somewhere.

    With quotas on Redis these are its counters, against ledger, stream and open holds. Calls made meanwhile may show as
    differences there.
    """
    with open_meter() as meter:
        on_redis = meter._redis is not None
        checks = _counter_checks(meter)
    wrong = [
        {
            "account": check.account,
            "metric": check.counter.metric,
            "line": check.counter.line,
            "key_id": check.counter.key_id,
            "window_start": check.counter.window.start,
            "kept": check.kept,
            "counted": check.counted,
        }
        for check in checks
        if not check.agrees
    ]
    if as_json or wrong:
        show(wrong, as_json)
    if not as_json:
        typer.echo(f"{len(checks)} counters, {len(wrong)} differ from the ledger")
        if wrong and on_redis:
            typer.echo("calls made meanwhile may show as differences: only those that stay are wrong")
    if wrong:
        sys.exit(1)


def _redis(meter: Meter) -> RedisStore:
    if meter._redis is None:
        raise InvalidSetting("METERING_QUOTA_URL", None, "a Redis URL: without one the ledger itself decides quotas")
    return meter._redis


def _counter_checks(meter: Meter) -> list[CounterCheck]:
    if meter._redis is None:
        from metering.admission.verify import check_counters

        return check_counters(meter.ledger)
    from metering.admission.redis import shards
    from metering.admission.redis.verbs import Verbs

    link = meter._redis.link
    return shards.check_counters(link, Verbs(meter.ledger, link, timeout_s=shards.TIMEOUT_S))


def _carry(meter: Meter, store: RedisStore) -> None:
    """The spool first: a settle that it has is then in the stream that is about to be drained."""
    try:
        meter.flush()
    finally:
        store.announce()


def _show_drained(drained: Drained, as_json: bool, *, even_nothing: bool) -> None:
    from metering.booking import Counts

    now, counts = datetime.now(UTC), {name: getattr(drained, name) for name in Counts.__slots__}
    said = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
    if not said and not even_nothing:
        return
    if as_json:
        show_line({"at": now, **counts})
    else:
        typer.echo(f"{now:%Y-%m-%d %H:%M:%S}Z {said or 'nothing to drain'}")


class _Told:
    """Set by SIGINT or SIGTERM; a second one ends at once. Not an Event: its lock may be held when a signal comes."""

    def __init__(self) -> None:
        self._is_set = False
        self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in self._before:
            signal.signal(number, self._set)

    def is_set(self) -> bool:
        return self._is_set

    def wait(self, timeout: float, /) -> None:
        if not self._is_set:
            time.sleep(timeout)  # between two drains; a signal meanwhile is heeded when it is over

    def restore(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _set(self, *_: object) -> None:
        self._is_set = True
        self.restore()


@contextmanager
def _told_to_stop() -> Iterator[_Told]:
    told = _Told()
    try:
        yield told
    finally:
        told.restore()
