"""`tallystick`: the library's command line. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from zlib import crc32

import typer
from typer.core import TyperGroup

from metering.console import fields_of, progress_bar, show, show_line
from metering.errors import InvalidSetting, MeteringError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from metering.admission.redis.store import RedisStore
    from metering.admission.verify import CounterCheck
    from metering.drain import Drained
    from metering.importing import ImportReport
    from metering.meter import Meter

__all__ = ["app", "main"]

# Rich help costs a quarter of a second at every --help.
_GROUP: dict[str, Any] = {
    "no_args_is_help": True,
    "pretty_exceptions_enable": False,
    "add_completion": False,
    "rich_markup_mode": None,
}
app = typer.Typer(
    help="Metering, quotas and billing facts for LLM-backed APIs. Settings are METERING_* variables; with none set, "
    "everything lies in .tallystick.",
    **_GROUP,
)
plans = typer.Typer(help="Plans and rates: immutable versions in the ledger.", **_GROUP)
accounts = typer.Typer(help="Who is billed.", **_GROUP)
keys = typer.Typer(help="API keys of accounts.", **_GROUP)


class _Quota(TyperGroup):
    """`quota ACCOUNT` is `quota show ACCOUNT`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] != "--help" and args[0] not in self.commands:
            args = ["show", *args]
        return super().parse_args(ctx, args)


quota = typer.Typer(help="Where limits stand, and what to do when Redis has lost data.", cls=_Quota, **_GROUP)
app.add_typer(plans, name="plans")
app.add_typer(accounts, name="accounts")
app.add_typer(keys, name="keys")
app.add_typer(quota, name="quota")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Account = Annotated[str, typer.Argument(help="The account.")]
Start = Annotated[str | None, typer.Option(help="From this time on: 2023-11-01 or 2023-11-01T12:00Z; UTC unless said.")]
End = Annotated[str | None, typer.Option(help="Before this time.")]
Plan = Annotated[str, typer.Option(help="The plan's name.")]
TimeZone = Annotated[str, typer.Option(help="IANA time zone in which billing periods begin.")]
AnchorDay = Annotated[int, typer.Option(help="Day of the month on which billing periods begin, 1 to 31.")]
Name = Annotated[str | None, typer.Option(help="The name on invoices.")]
Address = Annotated[list[str] | None, typer.Option(help="A line of the address block; repeat for more.")]
Label = Annotated[str | None, typer.Option(help="What the key is for.")]

MAX_GRACE_HOURS = 24 * 366
MAX_ENTRIES = 10_000
REJECTED = 3
"""Exit status of an import that kept the good rows and refused others."""
DRAIN_EVERY_S = 1.0


def main() -> None:
    """Run the command line. What is wrong is said in one line, without a traceback."""
    try:
        app()
    except (MeteringError, OSError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        sys.exit(1)


@app.command()
def init() -> None:
    """Create the ledger, with the plans of plans.toml where that file exists."""
    from metering.settings import Settings

    with _meter(create=True) as meter:
        done = "created" if meter.ledger.is_new else "is there already"
        typer.echo(f"ledger {meter.ledger.path} {done}")
        settings = Settings.from_env()
        source = f"from {settings.plans}" if settings.plans.exists() else "built in: free, pro, premium, enterprise"
        if meter.ledger.is_new:
            typer.echo(f"plans {source}")


@app.command()
def migrate() -> None:
    """Bring the ledger's schema to the one this version needs."""
    from metering.ledger import SCHEMA, Ledger
    from metering.settings import Settings

    settings = Settings.from_env()
    ledger = Ledger(settings.ledger_url, timeout_s=settings.timeout_s, upgrade=True)
    ledger.close()
    typer.echo(f"ledger {ledger.path} is at schema {SCHEMA}")


@plans.command("apply")
def plans_apply(
    file: Annotated[Path | None, typer.Argument(help="The plans; METERING_PLANS or plans.toml unless said.")] = None,
    effective_from: Annotated[
        str | None, typer.Option(help="When new versions come into force; now unless said.")
    ] = None,
) -> None:
    """Write a new version of every plan that differs from the one in force. A plan's first version holds since ever."""
    from metering.ledger import plan_versions
    from metering.plans import parse_plans
    from metering.settings import Settings

    path = file or Settings.from_env().plans
    try:
        parsed = parse_plans(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as exc:
        raise InvalidSetting("plans", str(path), f"a readable file ({exc})") from exc
    with _meter() as meter:
        written = meter.apply_plans(parsed.values(), effective_from=_instant("--effective-from", effective_from))
        now = datetime.now(UTC)
        with meter.ledger.read() as connection:
            pending = [version for version in plan_versions.versions(connection) if version.effective_from > now]
    for version in written:
        typer.echo(f"plan {version.plan.name}: version {version.version} from {version.effective_from:%Y-%m-%d %H:%M}Z")
    if not written:
        typer.echo("nothing to do: every plan is in force as it stands in the file")
    for version in pending:
        typer.echo(f"plan {version.plan.name}: version {version.version} follows on {version.effective_from:%Y-%m-%d}")


@plans.command("list")
def plans_list(as_json: AsJson = False) -> None:
    """Every version of every plan; built-in plans are written at their first use."""
    from metering.ledger import plan_versions
    from metering.plans import BUILT_IN

    with _meter() as meter, meter.ledger.read() as connection:
        found = plan_versions.versions(connection)
    rows = [
        {
            "plan": version.plan.name,
            "version": version.version,
            "plan_version": version.plan_version,
            "effective_from": version.effective_from,
            "limits": [str(limit) for limit in version.plan.limits],
            "rates": [str(rate) for rate in version.plan.rates],
        }
        for version in found
    ]
    known = {version.plan.name for version in found}
    rows += [
        {
            "plan": name,
            "version": "built in",
            "plan_version": None,
            "effective_from": None,
            "limits": [str(limit) for limit in plan.limits],
            "rates": [],
        }
        for name, plan in BUILT_IN.items()
        if name not in known
    ]
    show(rows, as_json)


@accounts.command("create")
def accounts_create(
    account: Account,
    plan: Plan,
    name: Name = None,
    address: Address = None,
    time_zone: TimeZone = "UTC",
    anchor_day: AnchorDay = 1,
    active_from: Annotated[str | None, typer.Option(help="Base fees are prorated from here; else since ever.")] = None,
    as_json: AsJson = False,
) -> None:
    """Create an account."""
    with _meter() as meter:
        created = meter.accounts.create(
            account,
            plan=plan,
            name=name,
            address=tuple(address or ()),
            time_zone=time_zone,
            anchor_day=anchor_day,
            active_from=_instant("--active-from", active_from),
        )
    show([fields_of(created)], as_json)


@accounts.command("list")
def accounts_list(as_json: AsJson = False) -> None:
    """Every account."""
    with _meter() as meter:
        show([fields_of(account) for account in meter.accounts.list()], as_json)


@accounts.command("change-plan")
def accounts_change_plan(account: Account, plan: Plan) -> None:
    """Put an account on another plan from now on."""
    with _meter() as meter:
        typer.echo(f"account {account} is on plan {meter.accounts.change_plan(account, plan).plan}")


@accounts.command("update")
def accounts_update(
    account: Account,
    name: Name = None,
    address: Address = None,
    time_zone: Annotated[str | None, typer.Option(help="Only while there is no usage.")] = None,
    anchor_day: Annotated[int | None, typer.Option(help="Only while there is no usage.")] = None,
    as_json: AsJson = False,
) -> None:
    """Change an account's name, address, time zone or anchor day."""
    with _meter() as meter:
        updated = meter.accounts.update(
            account,
            name=name,
            address=None if address is None else tuple(address),
            time_zone=time_zone,
            anchor_day=anchor_day,
        )
    show([fields_of(updated)], as_json)


@keys.command("create")
def keys_create(
    account: Account,
    plan: Annotated[str | None, typer.Option(help="The plan, where the account is new.")] = None,
    label: Label = None,
    as_json: AsJson = False,
) -> None:
    """Issue a key. Its secret is shown now, and never again."""
    with _meter() as meter:
        key = meter.keys.create(account, plan=plan, label=label)
    show([{"key_id": key.key_id, "account": key.account, "plan": key.plan, "secret": key.secret}], as_json)


@keys.command("adopt")
def keys_adopt(
    account: Account,
    plan: Annotated[str | None, typer.Option(help="The plan, where the account is new.")] = None,
    label: Label = None,
    as_json: AsJson = False,
) -> None:
    """Take over a key issued elsewhere; its secret is read from standard input."""
    secret = (
        typer.prompt("secret", hide_input=True, err=True) if sys.stdin.isatty() else sys.stdin.readline().rstrip("\r\n")
    )
    with _meter() as meter:
        show([fields_of(meter.keys.adopt(secret, account, plan=plan, label=label))], as_json)


@keys.command("list")
def keys_list(
    account: Annotated[str | None, typer.Argument(help="Of one account; of all unless said.")] = None,
    as_json: AsJson = False,
) -> None:
    """Keys, without their secrets."""
    with _meter() as meter:
        show([fields_of(key) for key in meter.keys.list(account)], as_json)


@keys.command("revoke")
def keys_revoke(key_id: Annotated[str, typer.Argument(help="The key's id, key_...")]) -> None:
    """Deactivate a key now."""
    with _meter() as meter:
        typer.echo(f"key {meter.keys.revoke(key_id).key_id} is revoked")


@keys.command("rotate")
def keys_rotate(
    key_id: Annotated[str, typer.Argument(help="The key's id, key_...")],
    grace_hours: Annotated[float, typer.Option(help="How long the old key still works, in hours.")] = 24.0,
    as_json: AsJson = False,
) -> None:
    """Issue a successor; the old key works until the grace time is over."""
    if not 0 <= grace_hours <= MAX_GRACE_HOURS:
        raise InvalidSetting("--grace-hours", grace_hours, f"0 to {MAX_GRACE_HOURS} hours")
    with _meter() as meter:
        key = meter.keys.rotate(key_id, grace=timedelta(hours=grace_hours))
    show([{"key_id": key.key_id, "account": key.account, "plan": key.plan, "secret": key.secret}], as_json)


@app.command("import")
def import_files(
    files: Annotated[list[Path], typer.Argument(help="CSV, JSON lines (.jsonl, .ndjson) or Parquet files.")],
    mapping: Annotated[
        list[str] | None,
        typer.Option("--map", help="FIELD=COLUMN, several with commas: occurred_at=TIMESTAMP,model=Model."),
    ] = None,
    account: Annotated[str | None, typer.Option(help="The account of every row.")] = None,
    line: Annotated[str | None, typer.Option(help="The line of every row.")] = None,
    provider: Annotated[str | None, typer.Option(help="The provider of every row.")] = None,
    model: Annotated[str | None, typer.Option(help="The model of every row.")] = None,
    plan: Annotated[str | None, typer.Option(help="The plan of accounts that are new.")] = None,
    source: Annotated[
        str | None, typer.Option(help="Tells equal rows of two systems apart; else the file's stem.")
    ] = None,
    rejects: Annotated[Path | None, typer.Option(help="Folder for refused rows; else METERING_HOME/rejects.")] = None,
    as_json: AsJson = False,
) -> None:
    """Import usage. The same file twice changes nothing, and a killed import is finished by running it again.

    Columns that have a field's name need no --map. Exit status 3: some rows were refused, the others are kept.
    """
    from metering.clock import utc_now
    from metering.importing import Importer
    from metering.settings import Settings

    constants = {"account": account, "line": line, "provider": provider, "model": model, "plan": plan}
    reports: list[ImportReport] = []
    with _meter() as meter:
        importer = Importer(
            meter.ledger,
            meter.accounts,
            mapping=_parse_mapping(mapping or []),
            constants={name: value for name, value in constants.items() if value is not None},
            clock=utc_now,
        )
        folder = rejects or Settings.from_env().home / "rejects"
        try:
            for path in files:
                with progress_bar(path.name) as progress:
                    reports.append(
                        importer.run(path, source=source, rejects=folder / _rejects_name(path), progress=progress)
                    )
        finally:
            if reports or as_json:
                show([fields_of(report) for report in reports], as_json)
            if any(report.zoneless_times for report in reports):
                typer.echo("times without a zone were read as UTC", err=True)
    if any(report.rejected for report in reports):
        sys.exit(REJECTED)


@app.command()
def usage(
    account: Account,
    start: Start = None,
    end: End = None,
    by: Annotated[str | None, typer.Option(help="line, model, day (UTC), key_id or operation.")] = None,
    as_json: AsJson = False,
) -> None:
    """What an account used."""
    with _meter() as meter:
        totals = meter.usage(account, start=_instant("--start", start), end=_instant("--end", end), by=by)  # type: ignore[arg-type]
    show([fields_of(total) for total in totals], as_json)


@quota.command("show")
def quota_show(
    account: Account,
    key_id: Annotated[str | None, typer.Option(help="Show this key's own limits too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Where each limit of an account stands. `tallystick quota ACCOUNT` does the same."""
    with _meter() as meter:
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
    with _meter() as meter:
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


@app.command()
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
    with _meter() as meter:
        store = _redis(meter)
        from metering.drain import Drain

        redis_drain = Drain(meter.ledger, store.link, announce=lambda: _carry(store))
        if not follow:
            _show_drained(redis_drain.run(), as_json, even_nothing=True)
            return
        if not as_json:
            typer.echo("draining until interrupted (Ctrl-C)", err=True)
        with _told_to_stop() as told:
            redis_drain.follow(
                told, every_s=DRAIN_EVERY_S, report=lambda done: _show_drained(done, as_json, even_nothing=False)
            )


@app.command()
def log(
    account: Annotated[str | None, typer.Argument(help="The account; or give --key-id.")] = None,
    key_id: Annotated[str | None, typer.Option(help="Calls of one key.")] = None,
    start: Start = None,
    end: End = None,
    limit: Annotated[int, typer.Option(help="At most so many, the newest first.")] = 100,
    admin: Annotated[bool, typer.Option("--admin", help="The admin log instead: who changed what.")] = False,
    as_json: AsJson = False,
) -> None:
    """The request log: bodies, errors and latencies of calls."""
    from metering.ledger import admin_log

    if not 1 <= limit <= MAX_ENTRIES:
        raise InvalidSetting("--limit", limit, f"1 to {MAX_ENTRIES}")
    if admin and (account or key_id or start or end):
        raise InvalidSetting("--admin", True, "no account, key or time beside it: the admin log is shown as it is")
    with _meter() as meter:
        entries: Iterable[Any]
        if admin:
            with meter.ledger.read() as connection:
                entries = admin_log.entries(connection, limit=limit)
        else:
            entries = meter.log(
                account, key_id=key_id, start=_instant("--start", start), end=_instant("--end", end), limit=limit
            )
        show([fields_of(entry) for entry in entries], as_json)


@app.command()
def verify(as_json: AsJson = False) -> None:
    """Count every quota counter again from the ledger, and say where they differ. Exit status 1: somewhere.

    With quotas on Redis these are its counters, against ledger, stream and open holds. Calls made meanwhile may show as
    differences there.
    """
    with _meter() as meter:
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


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """What is configured, reachable and migrated. Exit status 1: something is not."""
    from metering.doctor import examine

    findings = examine()
    show([fields_of(finding) for finding in findings], as_json)
    if not all(finding.ok for finding in findings):
        sys.exit(1)


@contextmanager
def _meter(*, create: bool = False) -> Iterator[Meter]:
    from metering.meter import Meter

    with Meter.from_env(create=create, actor=_actor()) as meter:
        yield meter


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


def _carry(store: RedisStore) -> None:
    """The spool first: a settle that it has is then in the stream that is about to be drained."""
    try:
        store.flush()
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


def _actor() -> str:
    from getpass import getuser

    try:
        return getuser()
    except (KeyError, OSError):
        return "command line"


def _rejects_name(path: Path) -> str:
    """Never the file's own name, and another one for its namesake in another folder."""
    return f"{path.stem}-{crc32(bytes(path.resolve())):08x}.rejects.csv"


def _parse_mapping(given: Sequence[str]) -> dict[str, str]:
    mapping: dict[str, str] = {}
    for pair in (pair for option in given for pair in option.split(",")):
        name, separator, column = pair.partition("=")
        if not (separator and name and column):
            raise InvalidSetting("--map", pair, "FIELD=COLUMN")
        if mapping.setdefault(name.strip(), column.strip()) != column.strip():
            raise InvalidSetting("--map", pair, f"one column for {name.strip()}, which is mapped already")
    return mapping


def _instant(name: str, text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        at = datetime.fromisoformat(text)
        return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
    except (ValueError, OverflowError):
        raise InvalidSetting(name, text, "a time such as 2023-11-01 or 2023-11-01T12:00Z") from None


if __name__ == "__main__":
    main()
