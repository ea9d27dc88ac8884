"""A look at what is configured: is it there, reachable, and of this version?"""

from __future__ import annotations

import sqlite3
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from metering.admission.places import QuotaPlace
from metering.admission.verify import check_counters
from metering.clock import utc_now
from metering.errors import MeteringError, StoreUnavailable
from metering.ledger import SCHEMA, Ledger
from metering.ledger.schema import accounts, dead_letters, events, holds, outbox, shards
from metering.plans import parse_plans
from metering.settings import Settings
from metering.spool import Spool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from metering.admission.redis.link import Link

__all__ = ["Finding", "examine"]

LATE_S = 600.0
"""What has waited longer is a warning: `drain --follow` takes a second, and the flow comes every five minutes."""
LONG_S = 60
"""A transaction open for longer is a warning: what is written after it began is loaded when it has ended."""
INCREMENTAL = 2
"""What `PRAGMA auto_vacuum` says of a file that gives its free pages back when it is told to."""
NAMED = 5
"""Of many shards so many are named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing looked at."""

    what: str
    ok: bool
    warning: bool = False
    """It works, and somebody should do something about it."""
    says: str


def examine() -> list[Finding]:
    """Look at settings, ledger, quotas, spool and plans. Changes nothing and never raises."""
    try:
        settings = Settings.from_env()
    except MeteringError as exc:
        return [Finding(what="settings", ok=False, says=str(exc))]
    findings = [Finding(what="home", ok=True, says=str(settings.home.absolute()))]
    try:
        ledger = Ledger(settings.ledger_url, timeout_s=settings.timeout_s)
    except MeteringError as exc:
        findings.append(Finding(what="ledger", ok=False, says=str(exc)))
    else:
        is_file = ledger.dialect == "sqlite"
        findings += [_finding("ledger", _sqlite, ledger)] if is_file else _postgres(ledger)
        findings.append(_finding("contents", _contents, ledger))
        findings += [_space(ledger)] if is_file else []
        if settings.quota_url is None:
            findings.append(_finding("counters", _counters, ledger))
        if settings.quota_url is not None:
            findings += _redis(settings, settings.quota_url, ledger)
        ledger.close()
    findings += _spool(settings)
    findings.append(_plans(settings))
    warehouse = "is there" if settings.warehouse.exists() else "is absent: `python -m flows` makes it"
    findings.append(Finding(what="warehouse", ok=True, says=f"{settings.warehouse} {warehouse}"))
    return findings


def _finding(what: str, look: Callable[[Ledger], str], ledger: Ledger) -> Finding:
    try:
        return Finding(what=what, ok=True, says=look(ledger))
    except MeteringError as exc:
        return Finding(what=what, ok=False, says=str(exc))


def _sqlite(ledger: Ledger) -> str:
    with ledger.read() as connection:
        mode = connection.exec_driver_sql("PRAGMA journal_mode").scalar()
    return f"{ledger.where}, schema {SCHEMA}, journal {mode}, SQLite {sqlite3.sqlite_version}"


def _space(ledger: Ledger) -> Finding:
    """Whether what is deleted is given back to the disk. It is a property of the file, from before its first table."""
    try:
        with ledger.read() as connection:
            shrinks = connection.exec_driver_sql("PRAGMA auto_vacuum").scalar_one() == INCREMENTAL
            pages, free, size = (
                connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
                for name in ("page_count", "freelist_count", "page_size")
            )
    except MeteringError as exc:
        return Finding(what="space", ok=False, says=str(exc))
    says = f"{pages * size // 2**20:,} MiB, {free * size // 2**20:,} of them free"
    if not shrinks:
        says += (
            "; what is free is used again, but the file never shrinks. Once, while nobody uses it: "
            f"sqlite3 {ledger.path} 'PRAGMA auto_vacuum = INCREMENTAL; VACUUM'"
        )
    return Finding(what="space", ok=True, warning=not shrinks, says=says)


def _postgres(ledger: Ledger) -> list[Finding]:
    """What the server is, whether it keeps what it has, and who holds back the load."""
    try:
        with ledger.read() as connection:
            version = connection.exec_driver_sql("SHOW server_version").scalar_one()
            names = ("fsync", "full_page_writes", "synchronous_commit")
            off = [name for name in names if connection.exec_driver_sql(f"SHOW {name}").scalar_one() == "off"]
            blocking = connection.execute(_BLOCKING, {"long_s": LONG_S}).all()
            sees_all = connection.exec_driver_sql(_SEES_ALL).scalar_one()
    except MeteringError as exc:
        return [Finding(what="ledger", ok=False, says=str(exc))]
    is_kept = f"{' and '.join(off)} off: what was acknowledged may be lost with the server" if off else "all on"
    named = [f"{row.who} of database {row.database} for {row.open_s:,} s" for row in blocking]
    says = f"none open for more than {LONG_S} s"
    if named:
        says = f"{_some(named)}: open for writing, so no load gets past what was written since; end what they do"
    if not sees_all:
        says += "; this user may not see those of others: grant it pg_read_all_stats"
    return [
        Finding(what="ledger", ok=True, says=f"{ledger.where}, schema {SCHEMA}, PostgreSQL {version}"),
        Finding(what="ledger persistence", ok=True, warning=bool(off), says=is_kept),
        Finding(what="long transactions", ok=True, warning=bool(named), says=says),
    ]


_SEES_ALL = "SELECT pg_has_role('pg_read_all_stats', 'USAGE')"

# Every transaction with a number counts for pg_snapshot_xmin, in whichever database of the server it is.
_BLOCKING = sa.text("""
    SELECT who, database, extract(epoch FROM clock_timestamp() - since)::bigint AS open_s
    FROM (
        SELECT 'pid ' || pid || ' (' || coalesce(nullif(application_name, ''), 'no name') || ')' AS who,
            datname AS database, xact_start AS since
        FROM pg_stat_activity WHERE backend_xid IS NOT NULL AND pid <> pg_backend_pid()
        UNION ALL
        SELECT 'prepared transaction ' || gid, database, prepared FROM pg_prepared_xacts
    ) AS open
    WHERE since < clock_timestamp() - make_interval(secs => :long_s)
    ORDER BY since
""")


def _contents(ledger: Ledger) -> str:
    with ledger.read() as connection:
        known = connection.execute(sa.select(sa.func.count()).select_from(accounts)).scalar()
        newest = connection.execute(sa.select(sa.func.coalesce(sa.func.max(events.c.seq), 0))).scalar()
        still_open = connection.execute(
            sa.select(sa.func.count()).select_from(holds).where(holds.c.state == "open")
        ).scalar()
    return f"{known} accounts, events up to number {newest}, {still_open} open holds"


def _counters(ledger: Ledger) -> str:
    checks = check_counters(ledger)
    differing = sum(not check.agrees for check in checks)
    if differing:
        raise MeteringError(f"{differing} of {len(checks)} counters differ from the ledger: see `tallystick verify`")
    return f"{len(checks)}, all equal to the ledger"


def _redis(settings: Settings, url: str, ledger: Ledger) -> Iterator[Finding]:
    try:
        link = QuotaPlace(url=url, timeout_s=settings.quota_timeout_s, allow_eviction=True).link()
    except MeteringError as exc:
        yield Finding(what="redis", ok=False, says=str(exc))
        return
    try:
        yield from _servers(url, link, allow_eviction=settings.allow_eviction)
        yield _shards(ledger, link)
        yield _lag(ledger, link)
    except MeteringError as exc:
        yield Finding(what="redis", ok=False, says=str(exc))
    link.close()
    try:
        yield from _carried(ledger)
    except MeteringError as exc:
        yield Finding(what="drained", ok=False, says=str(exc))


def _servers(url: str, link: Link, *, allow_eviction: bool) -> Iterator[Finding]:
    """What the servers are, and whether they keep what they have. Raises `StoreUnavailable`."""
    from metering.admission.redis.keys import SHARDS  # noqa: PLC0415  where quotas are in the ledger it is not needed
    from metering.admission.redis.wire import Topology  # noqa: PLC0415

    servers: dict[str, dict[str, str]] = {}
    for shard in range(SHARDS):
        info = dict(line.split(":", 1) for line in _ask(link, shard, "INFO").decode().splitlines() if ":" in line)
        if info.get("run_id", "") not in servers:
            servers[info.get("run_id", "")] = {**info, "appendfsync": _appendfsync(link, shard)}
    seed = Topology(url).seed
    versions = {
        f"Valkey {info['valkey_version']}" if "valkey_version" in info else f"Redis {info.get('redis_version')}"
        for info in servers.values()
    }
    number = f", {len(servers)} servers" if len(servers) > 1 else ""
    yield Finding(what="redis", ok=True, says=f"{seed.host}:{seed.port}{number}, {' and '.join(sorted(versions))}")
    policies = {info.get("maxmemory_policy", "unknown") for info in servers.values()}
    is_safe = policies == {"noeviction"}
    yield Finding(
        what="redis memory",
        ok=is_safe or allow_eviction,
        warning=not is_safe,
        says=f"maxmemory-policy {' and '.join(sorted(policies))}"
        + ("" if is_safe else ": a full server throws counters and events away; set noeviction"),
    )
    is_kept = all(info.get("aof_enabled") == "1" for info in servers.values())
    says = "append-only file is off: what was acknowledged may be lost with the server"
    if is_kept:
        syncs = {info["appendfsync"] for info in servers.values()}
        says = f"append-only file is on, appendfsync {' and '.join(sorted(syncs))}"
        says += "" if syncs == {"always"} else ": up to a second of what was acknowledged may be lost"
    yield Finding(what="redis persistence", ok=True, warning=not is_kept, says=says)


def _appendfsync(link: Link, shard: int) -> str:
    try:
        found: list[bytes] = _ask(link, shard, "CONFIG", "GET", "appendfsync")
    except StoreUnavailable:  # some hosts do not tell
        return "unknown"
    return found[1].decode() if found else "unknown"


def _shards(ledger: Ledger, link: Link) -> Finding:
    """Whether each shard still has what it had. Raises `StoreUnavailable`."""
    from metering.admission.redis.shards import shard_states  # noqa: PLC0415

    states = shard_states(ledger, link)
    unwell = [
        f"{found.shard} {found.state}" + (f" ({found.reason})" if found.reason else "")
        for found in states
        if found.state not in ("open", "unused")
    ]
    if unwell:
        says = f"shard {_some(unwell)}: nothing is admitted there until `tallystick quota rebuild`"
        return Finding(what="shards", ok=False, says=says)
    numbers = Counter(found.state for found in states)
    return Finding(what="shards", ok=True, says=f"{numbers['open']} open, {numbers['unused']} unused")


def _lag(ledger: Ledger, link: Link) -> Finding:
    """What waits to be drained. Raises `StoreUnavailable`."""
    from metering.drain import Drain  # noqa: PLC0415

    lags = Drain(ledger, link).lag()
    oldest_s = max((lag.oldest_s for lag in lags if lag.oldest_s is not None), default=0.0)
    says = f"{sum(lag.entries for lag in lags):,} events to drain"
    if oldest_s:
        says += f", the oldest {oldest_s:,.0f} s old"
    is_late = oldest_s > LATE_S
    if is_late:
        says += f", more than {LATE_S:.0f} s: is `tallystick drain --follow` running?"
    return Finding(what="lag", ok=True, warning=is_late, says=says)


def _carried(ledger: Ledger) -> Iterator[Finding]:
    """What the ledger knows of the way between it and Redis."""
    with ledger.read() as connection:
        lost = connection.execute(
            sa.select(shards.c.shard, shards.c.lost).where(shards.c.lost > 0).order_by(shards.c.shard)
        ).all()
        is_open = dead_letters.c.resolved_at.is_(None)
        dead = connection.execute(sa.select(sa.func.count()).select_from(dead_letters).where(is_open)).scalar_one()
        is_unsent = outbox.c.sent_at.is_(None)
        unsent = connection.execute(sa.select(sa.func.count()).select_from(outbox).where(is_unsent)).scalar_one()
    says = "none"
    if lost:
        says = f"{sum(row.lost for row in lost):,} that Redis admitted never came: "
        says += _some([f"{row.lost:,} of shard {row.shard}" for row in lost])
    yield Finding(what="lost events", ok=True, warning=bool(lost), says=says)
    says = f"{dead:,} open" + (": in the ledger's table dead_letters, with error and bytes" if dead else "")
    yield Finding(what="dead letters", ok=True, warning=bool(dead), says=says)
    says = f"{unsent:,} changes that Redis has not been told" + (": the drain tells it" if unsent else "")
    yield Finding(what="outbox", ok=True, warning=bool(unsent), says=says)


def _spool(settings: Settings) -> Iterator[Finding]:
    """What waits on this machine. Without Redis only if there is something."""
    try:
        found = Spool(settings.spool).pending()
    except MeteringError as exc:
        yield Finding(what="spool", ok=False, says=str(exc))
        return
    if settings.quota_url is None and not (found.lines or found.damaged_files):
        return
    says = f"{settings.spool}: {found.lines:,} lines in {found.files:,} files"
    is_late = False
    if found.oldest is not None:
        waits_s = (utc_now() - found.oldest).total_seconds()
        is_late = waits_s > LATE_S
        says += f", the oldest begun {found.oldest:%Y-%m-%d %H:%M:%S}Z"
    if found.damaged_files:
        says += f"; {found.damaged_files:,} files of unreadable lines set aside as *.damaged"
    if is_late:
        says += "; is the store away that they are for, or are they another ledger's? The log says why they stay"
    is_stuck = is_late or found.damaged_files > 0
    yield Finding(what="spool", ok=True, warning=is_stuck, says=says)


def _ask(link: Link, shard: int, *command: Any) -> Any:
    from metering.admission.redis.shards import TIMEOUT_S  # noqa: PLC0415
    from metering.admission.redis.wire import NotDone, OutcomeUnknown  # noqa: PLC0415

    try:
        return link.call(shard, *command, timeout_s=TIMEOUT_S)
    except (NotDone, OutcomeUnknown) as exc:
        raise StoreUnavailable(str(exc)) from exc


def _some(named: Iterable[str]) -> str:
    several = list(named)
    more = f" and {len(several) - NAMED} more" if len(several) > NAMED else ""
    return ", ".join(several[:NAMED]) + more


def _plans(settings: Settings) -> Finding:
    if not settings.plans.exists():
        return Finding(what="plans", ok=True, says=f"{settings.plans} is absent: the four default plans")
    try:
        plans = parse_plans(settings.plans.read_text(encoding="utf-8"))
    except (MeteringError, OSError, UnicodeDecodeError) as exc:
        return Finding(what="plans", ok=False, says=f"{settings.plans}: {exc}")
    return Finding(what="plans", ok=True, says=f"{settings.plans}: {', '.join(plans)}")
