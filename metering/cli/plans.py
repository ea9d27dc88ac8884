"""`tallystick plans`."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from metering.cli.shared import GROUP, AsJson, instant, open_meter
from metering.console import show
from metering.errors import InvalidSetting

__all__ = ["plans"]

plans = typer.Typer(help="Plans and rates: immutable versions in the ledger.", **GROUP)


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
    with open_meter() as meter:
        written = meter.apply_plans(parsed.values(), effective_from=instant("--effective-from", effective_from))
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

    with open_meter() as meter, meter.ledger.read() as connection:
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
