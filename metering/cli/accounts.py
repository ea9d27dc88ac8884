"""`tallystick accounts` and `tallystick keys`."""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import Annotated

import typer

from metering.cli.shared import GROUP, Account, AsJson, actor, instant, open_meter
from metering.console import fields_of, show
from metering.errors import InvalidSetting

__all__ = ["accounts", "keys"]

accounts = typer.Typer(help="Who is billed.", **GROUP)
keys = typer.Typer(help="API keys of accounts.", **GROUP)

Plan = Annotated[str, typer.Option(help="The plan's name.")]
TimeZone = Annotated[str, typer.Option(help="IANA time zone in which billing periods begin.")]
AnchorDay = Annotated[int, typer.Option(help="Day of the month on which billing periods begin, 1 to 31.")]
Name = Annotated[str | None, typer.Option(help="The name on invoices.")]
Address = Annotated[list[str] | None, typer.Option(help="A line of the address block; repeat for more.")]
Label = Annotated[str | None, typer.Option(help="What the key is for.")]

MAX_GRACE_HOURS = 24 * 366


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
    with open_meter() as meter:
        created = meter.accounts.create(
            account,
            plan=plan,
            name=name,
            address=tuple(address or ()),
            time_zone=time_zone,
            anchor_day=anchor_day,
            active_from=instant("--active-from", active_from),
        )
    show([fields_of(created)], as_json)


@accounts.command("list")
def accounts_list(as_json: AsJson = False) -> None:
    """Every account."""
    with open_meter() as meter:
        show([fields_of(account) for account in meter.accounts.list()], as_json)


@accounts.command("change-plan")
def accounts_change_plan(account: Account, plan: Plan) -> None:
    """Put an account on another plan from now on."""
    with open_meter() as meter:
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
    with open_meter() as meter:
        updated = meter.accounts.update(
            account,
            name=name,
            address=None if address is None else tuple(address),
            time_zone=time_zone,
            anchor_day=anchor_day,
        )
    show([fields_of(updated)], as_json)


@accounts.command("hold")
def accounts_hold(
    account: Account, reason: Annotated[str, typer.Option(help="Why: such as the number of a case.")]
) -> None:
    """Put an account on legal hold: nothing of it is deleted or erased until it is released."""
    from metering.clock import utc_now
    from metering.legal_holds import place_hold

    with open_meter() as meter:
        hold = place_hold(meter.ledger, account, reason=reason, actor=actor(), now=utc_now())
    typer.echo(f"account {account} is on legal hold since {hold.placed_at:%Y-%m-%d %H:%M:%S}Z: {hold.reason}")


@accounts.command("release")
def accounts_release(account: Account) -> None:
    """Lift the legal hold of an account: what is over goes with the next run of retention."""
    from metering.clock import utc_now
    from metering.legal_holds import release_hold

    with open_meter() as meter:
        hold = release_hold(meter.ledger, account, actor=actor(), now=utc_now())
    typer.echo(f"account {account} is released; it was on legal hold since {hold.placed_at:%Y-%m-%d %H:%M:%S}Z")


@accounts.command("holds")
def accounts_holds(
    account: Annotated[str | None, typer.Argument(help="Of one account; of all unless said.")] = None,
    as_json: AsJson = False,
) -> None:
    """Legal holds, also those that were lifted: who placed them, when and why."""
    from metering.legal_holds import holds_of

    with open_meter() as meter:
        show([fields_of(hold) for hold in holds_of(meter.ledger, account)], as_json)


@keys.command("create")
def keys_create(
    account: Account,
    plan: Annotated[str | None, typer.Option(help="The plan, where the account is new.")] = None,
    label: Label = None,
    as_json: AsJson = False,
) -> None:
    """Issue a key. Its secret is shown now, and never again."""
    with open_meter() as meter:
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
    with open_meter() as meter:
        show([fields_of(meter.keys.adopt(secret, account, plan=plan, label=label))], as_json)


@keys.command("list")
def keys_list(
    account: Annotated[str | None, typer.Argument(help="Of one account; of all unless said.")] = None,
    as_json: AsJson = False,
) -> None:
    """Keys, without their secrets."""
    with open_meter() as meter:
        show([fields_of(key) for key in meter.keys.list(account)], as_json)


@keys.command("revoke")
def keys_revoke(key_id: Annotated[str, typer.Argument(help="The key's id, key_...")]) -> None:
    """Deactivate a key now."""
    with open_meter() as meter:
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
    with open_meter() as meter:
        key = meter.keys.rotate(key_id, grace=timedelta(hours=grace_hours))
    show([{"key_id": key.key_id, "account": key.account, "plan": key.plan, "secret": key.secret}], as_json)
