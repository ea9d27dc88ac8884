"""Who is billed, and the API keys they call with."""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
from dataclasses import dataclass, field, fields
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from metering import checks
from metering.bodies import refuse_secret
from metering.errors import (
    AccountConflict,
    Conflict,
    InvalidEvent,
    InvalidSetting,
    RevokedKey,
    StoreUnavailable,
    UnknownAccount,
    UnknownKey,
)
from metering.ledger import admin_log, outbox, plan_versions
from metering.ledger.archived import has_archives
from metering.ledger.locks import hold_still
from metering.ledger.schema import account_plans, accounts, api_keys, closes, events
from metering.ledger.types import can_be_name
from metering.windows import checked_anchor_day, checked_time_zone

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from metering.ledger import Ledger

__all__ = ["Account", "Accounts", "ApiKey", "Keys", "NewKey", "key_digest", "list_accounts"]

logger = logging.getLogger("metering")

MIN_SECRET = 16
MAX_SECRET = 512
_PREFIX = "tsk_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Who is billed."""

    account: str
    """The id an app uses, at most 255 characters."""
    plan: str
    """The plan now."""
    name: str | None
    address: tuple[str, ...]
    """Lines of the address block."""
    time_zone: str
    """IANA name; billing periods begin at midnight there."""
    anchor_day: int
    """Day of the month on which billing periods begin, 1 to 31."""
    active_from: datetime | None
    """Base fees are prorated from here; None: since ever."""
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """An API key as it may be shown: never the secret."""

    key_id: str
    account: str
    plan: str
    """The plan of its account now."""
    prefix: str
    last_four: str
    label: str | None
    created_at: datetime
    expires_at: datetime | None
    """End of its grace time after a rotation."""
    revoked_at: datetime | None
    last_used_at: datetime | None
    """To the minute."""
    rotated_to: str | None
    """The key that replaces it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewKey(ApiKey):
    """A key just issued. `secret` is shown once and kept nowhere."""

    secret: str = field(repr=False)


class Accounts:
    """Create, change and list accounts.

    `announce` has Redis told of a change, after its commit. Where that raises `StoreUnavailable` so does the method,
    and the change stands.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        clock: Callable[[], datetime],
        actor: str,
        announce: Callable[[], object] = outbox.no_one,
    ) -> None:
        self._ledger = ledger
        self._clock = clock
        self._actor = actor
        self._announce = announce

    def create(
        self,
        account: str,
        *,
        plan: str,
        name: str | None = None,
        address: tuple[str, ...] = (),
        time_zone: str = "UTC",
        anchor_day: int = 1,
        active_from: datetime | None = None,
    ) -> Account:
        """Create an account. Raises `Conflict` if it exists, `UnknownPlan`, `InvalidSetting`, `InvalidEvent`."""
        with self._ledger.write() as connection:
            existing = _find_account(connection, account, self._clock())
            if existing is not None:
                raise Conflict(f"account {account!r} exists already, on plan {existing.plan!r}")
            self._insert(connection, account, plan, name, address, time_zone, anchor_day, active_from)
            created = self._get(connection, account)
        outbox.tell(self._announce)
        return created

    def ensure(self, connection: sa.Connection, account: str, plan: str | None, active_from: datetime | None) -> None:
        """Within a transaction: create the account if it is new; if not, `plan` must be its plan or None."""
        now = self._clock()
        existing = _find_account(connection, account, now)
        if existing is None:
            if plan is None:
                raise InvalidSetting("plan", None, f"a plan, because account {account!r} is new")
            self._insert(connection, account, plan, None, (), "UTC", 1, active_from)
        elif plan is not None and existing.plan != plan:
            raise AccountConflict(account, "plan", existing.plan, plan)

    def known(self, connection: sa.Connection, names: Iterable[str]) -> set[str]:
        """Within a transaction: those of `names` that are accounts."""
        query = sa.select(accounts.c.account).where(accounts.c.account.in_(list(names)))
        return set(connection.execute(query).scalars())

    def get(self, account: str) -> Account:
        """One account. Raises `UnknownAccount`."""
        with self._ledger.read() as connection:
            return self._get(connection, account)

    def list(self) -> list[Account]:
        """Every account, by name."""
        with self._ledger.read() as connection:
            return list_accounts(connection, self._clock())

    def change_plan(self, account: str, plan: str) -> Account:
        """Put the account on another plan from now on: its limits change at once."""
        now = self._clock()
        with self._ledger.write() as connection:
            before = self._get(connection, account)
            hold_still(connection, [account])
            if before.plan != plan:
                self._assign(connection, account, plan, now)
                self._note(connection, now, "account.change_plan", account, before=before.plan, after=plan)
            changed = self._get(connection, account)
        outbox.tell(self._announce)
        return changed

    def update(
        self,
        account: str,
        *,
        name: str | None = None,
        address: tuple[str, ...] | None = None,
        time_zone: str | None = None,
        anchor_day: int | None = None,
    ) -> Account:
        """Change what is given.

        Zone and anchor day cut the periods, so they stay once there is usage, or a period is closed (`Conflict`): cut
        anew, the next one would take in days that are billed, or leave some out.
        """
        changes: dict[str, Any] = {}
        if name is not None:
            changes["name"] = checks.text("name", name, 255)
        if address is not None:
            changes["address"] = _address_text(address)
        if time_zone is not None:
            changes["time_zone"] = checked_time_zone("time_zone", time_zone)
        if anchor_day is not None:
            changes["anchor_day"] = checked_anchor_day("anchor_day", anchor_day)
        cuts_periods = bool(changes.keys() & {"time_zone", "anchor_day"})
        with self._ledger.write() as connection:
            self._get(connection, account)
            if cuts_periods:
                hold_still(connection, [account])
            if cuts_periods and (there := _cut_already(connection, account)):
                raise Conflict(
                    f"account {account!r} has {there}: its time zone and anchor day cut its periods and stay"
                )
            if changes:
                connection.execute(accounts.update().where(accounts.c.account == account).values(**changes))
                # Names and addresses may have to be erased one day, and of the log nothing ever is.
                said = {name: value for name, value in changes.items() if name not in ("name", "address")}
                self._note(connection, self._clock(), "account.update", account, changed=sorted(changes), **said)
            if cuts_periods:
                outbox.note(connection, account, now=self._clock())
            changed = self._get(connection, account)
        if cuts_periods:
            outbox.tell(self._announce)
        return changed

    def _assign(self, connection: sa.Connection, account: str, plan: str, now: datetime) -> None:
        plan_versions.ensure(connection, plan, now=now, actor=self._actor)
        # A second change within one tick of the clock takes the place of the first.
        connection.execute(
            account_plans.delete().where(account_plans.c.account == account, account_plans.c.effective_from == now)
        )
        connection.execute(account_plans.insert().values(account=account, effective_from=now, plan=plan))
        outbox.note(connection, account, now=now)

    def _insert(
        self,
        connection: sa.Connection,
        account: str,
        plan: str,
        name: str | None,
        address: tuple[str, ...],
        time_zone: str,
        anchor_day: int,
        active_from: datetime | None,
    ) -> None:
        now = self._clock()
        connection.execute(
            accounts.insert().values(
                account=checks.text("account", account, 255),
                name=None if name is None else checks.text("name", name, 255),
                address=_address_text(address),
                time_zone=checked_time_zone("time_zone", time_zone),
                anchor_day=checked_anchor_day("anchor_day", anchor_day),
                active_from=None if active_from is None else checks.instant("active_from", active_from),
                created_at=now,
            )
        )
        plan_versions.ensure(connection, plan, now=now, actor=self._actor)
        connection.execute(account_plans.insert().values(account=account, effective_from=plan_versions.EVER, plan=plan))
        outbox.note(connection, account, now=now)
        self._note(connection, now, "account.create", account, plan=plan, time_zone=time_zone, anchor_day=anchor_day)

    def _get(self, connection: sa.Connection, account: str) -> Account:
        found = _find_account(connection, account, self._clock())
        if found is None:
            raise UnknownAccount(account)
        return found

    def _note(self, connection: sa.Connection, at: datetime, action: str, subject: str, **details: Any) -> None:
        admin_log.note(connection, at=at, actor=self._actor, action=action, subject=subject, **details)


class Keys:
    """Issue, adopt, look up, rotate and revoke API keys. Only digests of secrets are kept.

    `announce` has Redis told of a change, after its commit. Where that raises `StoreUnavailable` so do `adopt` and
    `revoke`, and the change stands: a revoke that returns is known there. `create` and `rotate` log it instead, because
    their secret is shown once, and a key that Redis has not heard of is looked up in the ledger.
    """

    def __init__(
        self,
        ledger: Ledger,
        accounts: Accounts,
        *,
        clock: Callable[[], datetime],
        actor: str,
        pepper: str | None,
        announce: Callable[[], object] = outbox.no_one,
    ) -> None:
        self._ledger = ledger
        self._accounts = accounts
        self._clock = clock
        self._actor = actor
        self._pepper = pepper
        self._announce = announce

    def digest(self, secret: str) -> str:
        """What the ledger keeps of a secret."""
        return key_digest(secret, self._pepper)

    def create(self, account: str, *, plan: str | None = None, label: str | None = None) -> NewKey:
        """Issue a key, creating the account if it is new. Raises `AccountConflict` where it has another plan."""
        secret = _PREFIX + secrets.token_urlsafe(32)
        with self._ledger.write() as connection:
            self._accounts.ensure(connection, account, plan, active_from=self._clock())
            key = self._insert(connection, secret, account, label, "key.create")
        self._try_to_tell(key)
        return _with_secret(key, secret)

    def adopt(self, secret: str, account: str, *, plan: str | None = None, label: str | None = None) -> ApiKey:
        """Take over a key that was issued elsewhere. Adopting it twice changes nothing: the first plan stays.

        Raises `Conflict` where the key belongs to another account, `InvalidSetting` for a secret below 16 characters.
        """
        if not isinstance(secret, str) or not MIN_SECRET <= len(secret) <= MAX_SECRET or not secret.isprintable():
            raise InvalidSetting("secret", "(not shown)", f"{MIN_SECRET} to {MAX_SECRET} printable characters")
        refuse_secret(secret, {"account": account, "plan": plan, "label": label})
        with self._ledger.write() as connection:
            key = self._find(connection, self.digest(secret))
            if key is None:
                self._accounts.ensure(connection, account, plan, active_from=self._clock())
                key = self._insert(connection, secret, account, label, "key.adopt")
            elif key.account != account:
                raise Conflict(f"API key {key.key_id} was adopted before, for another account")
        outbox.tell(self._announce)
        return key

    def lookup(self, secret: str) -> ApiKey:
        """The key, with its account and plan. Raises `UnknownKey`; a revoked key is found, and says so."""
        with self._ledger.read() as connection:
            found = self._find(connection, self.digest(secret))
        if found is None:
            raise UnknownKey
        return found

    def authenticate(self, secret: str) -> ApiKey:
        """As `lookup`, and raises `RevokedKey` where the key is no longer valid."""
        key = self.lookup(secret)
        if key.revoked_at is not None or (key.expires_at is not None and key.expires_at <= self._clock()):
            raise RevokedKey(key.key_id, key.account)
        return key

    def list(self, account: str | None = None) -> list[ApiKey]:
        """Every key, of one account or of all, oldest first."""
        query = sa.select(api_keys).order_by(api_keys.c.created_at, api_keys.c.key_id)
        if account is not None:
            query = query.where(api_keys.c.account == account if can_be_name(account) else sa.false())
        with self._ledger.read() as connection:
            return [self._record(connection, row) for row in connection.execute(query).mappings().all()]

    def revoke(self, key_id: str) -> ApiKey:
        """Deactivate a key now. Revoking twice is once. Raises `UnknownKey`."""
        now = self._clock()
        with self._ledger.write() as connection:
            key = self._get(connection, key_id)
            hold_still(connection, [key.account])
            if key.revoked_at is None:
                connection.execute(api_keys.update().where(api_keys.c.key_id == key_id).values(revoked_at=now))
                outbox.note(connection, key.account, now=now)
                self._note(connection, now, "key.revoke", key_id, account=key.account)
                key = self._get(connection, key_id)
        outbox.tell(self._announce)
        return key

    def rotate(self, key_id: str, *, grace: timedelta = timedelta(days=1)) -> NewKey:
        """Issue a successor; the old key works until `grace` is over. Raises `UnknownKey`, `RevokedKey`."""
        if grace < timedelta(0):
            raise InvalidSetting("grace", grace, "0 or more")
        now = self._clock()
        secret = _PREFIX + secrets.token_urlsafe(32)
        with self._ledger.write() as connection:
            old = self._get(connection, key_id)
            hold_still(connection, [old.account])
            if old.revoked_at is not None or old.rotated_to is not None:
                raise RevokedKey(key_id, old.account)
            new = self._insert(connection, secret, old.account, old.label, "key.create")
            connection.execute(
                api_keys.update()
                .where(api_keys.c.key_id == key_id)
                .values(expires_at=now + grace, rotated_to=new.key_id)
            )
            self._note(
                connection,
                now,
                "key.rotate",
                key_id,
                account=old.account,
                rotated_to=new.key_id,
                expires_at=now + grace,
            )
        self._try_to_tell(new)
        return _with_secret(new, secret)

    def _try_to_tell(self, key: ApiKey) -> None:
        try:
            outbox.tell(self._announce)
        except StoreUnavailable as exc:
            logger.warning("API key %s of account %r: %s", key.key_id, key.account, exc)

    def _insert(self, connection: sa.Connection, secret: str, account: str, label: str | None, action: str) -> ApiKey:
        now = self._clock()
        key_id = f"key_{secrets.token_hex(8)}"
        connection.execute(
            api_keys.insert().values(
                key_id=key_id,
                account=account,
                digest=self.digest(secret),
                prefix=secret[:4],
                last_four=secret[-4:],
                label=None if label is None else checks.text("label", label, 255),
                created_at=now,
            )
        )
        outbox.note(connection, account, now=now)
        self._note(connection, now, action, key_id, account=account, label=label)
        return self._get(connection, key_id)

    def _find(self, connection: sa.Connection, digest: str) -> ApiKey | None:
        row = connection.execute(sa.select(api_keys).where(api_keys.c.digest == digest)).mappings().one_or_none()
        return None if row is None else self._record(connection, row)

    def _get(self, connection: sa.Connection, key_id: str) -> ApiKey:
        query = sa.select(api_keys).where(api_keys.c.key_id == key_id)
        row = connection.execute(query).mappings().one_or_none() if can_be_name(key_id) else None
        if row is None:
            raise UnknownKey(f"no API key has the id {key_id!r}")
        return self._record(connection, row)

    def _record(self, connection: sa.Connection, row: sa.RowMapping) -> ApiKey:
        plan = plan_versions.assigned_plan(connection, row["account"], self._clock())
        assert plan is not None
        return ApiKey(plan=plan, **{name: row[name] for name in row if name != "digest"})

    def _note(self, connection: sa.Connection, at: datetime, action: str, subject: str, **details: Any) -> None:
        admin_log.note(connection, at=at, actor=self._actor, action=action, subject=subject, **details)


def key_digest(secret: str, pepper: str | None) -> str:
    """SHA-256 of a secret, HMAC-SHA-256 where there is a pepper, as 64 hex digits."""
    if not isinstance(secret, str):
        raise InvalidEvent("api_key", type(secret).__name__, "the secret as a string")
    encoded = secret.encode("utf-8", "surrogatepass")
    if pepper is None:
        return hashlib.sha256(encoded).hexdigest()
    return hmac.new(pepper.encode(), encoded, hashlib.sha256).hexdigest()


def _with_secret(key: ApiKey, secret: str) -> NewKey:
    return NewKey(secret=secret, **{f.name: getattr(key, f.name) for f in fields(ApiKey)})


def list_accounts(connection: sa.Connection, now: datetime) -> list[Account]:
    """Within a transaction: every account, by name."""
    names = sorted(connection.execute(sa.select(accounts.c.account)).scalars())  # databases differ in how they sort
    found = (_find_account(connection, name, now) for name in names)
    return [account for account in found if account is not None]


def _find_account(connection: sa.Connection, account: str, now: datetime) -> Account | None:
    if not can_be_name(account):
        return None
    row = connection.execute(sa.select(accounts).where(accounts.c.account == account)).mappings().one_or_none()
    if row is None:
        return None
    plan = plan_versions.assigned_plan(connection, account, now)
    assert plan is not None
    address = tuple((row["address"] or "").splitlines())
    return Account(plan=plan, **{name: row[name] for name in row if name != "address"}, address=address)


def _cut_already(connection: sa.Connection, account: str) -> str | None:
    """What an account has that belongs to one of its periods."""
    found = connection.execute(sa.select(events.c.seq).where(events.c.account == account).limit(1)).first()
    if found is not None or has_archives(connection, account):
        return "usage"
    found = connection.execute(sa.select(closes.c.close).where(closes.c.account == account).limit(1)).first()
    return None if found is None else "closed periods"


def _address_text(address: tuple[str, ...]) -> str | None:
    if len(address) > 10:
        raise InvalidSetting("address", address, "at most 10 lines")
    return "\n".join(checks.text("address", line, 255) for line in address) or None
