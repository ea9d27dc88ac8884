"""Accounts and keys: two lookalikes never mix, and every change is in the admin log."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from metering.accounts import key_digest
from metering.errors import (
    AccountConflict,
    Conflict,
    InvalidEvent,
    InvalidSetting,
    RevokedKey,
    UnknownAccount,
    UnknownKey,
)
from metering.ledger import admin_log

if TYPE_CHECKING:
    from collections.abc import Callable

    from metering import Meter

ADOPTED = "sk-live-0123456789abcdef"


@pytest.fixture
def ledger_url(either_url: str) -> str:
    return either_url


def actions(meter: Meter) -> list[tuple[str, str, str]]:
    with meter.ledger.read() as connection:
        entries = admin_log.entries(connection, limit=100)
    return [(entry.actor, entry.action, entry.subject) for entry in reversed(entries)]


def test_a_key_makes_its_account(meter: Meter, clock: Any) -> None:
    key = meter.keys.create("acme", plan="pro", label="ci")
    assert (key.account, key.plan, key.label, key.created_at) == ("acme", "pro", "ci", clock.now)
    assert key.secret.startswith("tsk_")
    assert (key.prefix, key.last_four) == ("tsk_", key.secret[-4:])
    account = meter.accounts.get("acme")
    assert (account.time_zone, account.anchor_day, account.active_from) == ("UTC", 1, clock.now)
    assert actions(meter) == [
        ("app", "plan.apply", "pro"),
        ("app", "account.create", "acme"),
        ("app", "key.create", key.key_id),
    ]


def test_an_account_keeps_its_plan(meter: Meter) -> None:
    meter.keys.create("acme", plan="pro")
    assert meter.keys.create("acme").plan == "pro"
    assert meter.keys.create("acme", plan="pro").plan == "pro"
    with pytest.raises(
        AccountConflict, match="account 'acme' has plan 'pro', not 'free'; change it explicitly"
    ) as caught:
        meter.keys.create("acme", plan="free")
    assert (caught.value.field, caught.value.recorded, caught.value.asked) == ("plan", "pro", "free")
    with pytest.raises(Conflict, match="account 'acme' exists already, on plan 'pro'"):
        meter.accounts.create("acme", plan="pro")
    with pytest.raises(InvalidSetting, match="plan: got None, expected a plan, because account 'new' is new"):
        meter.keys.create("new")
    assert len(meter.keys.list("acme")) == 3
    assert [account.account for account in meter.accounts.list()] == ["acme"]


@pytest.mark.parametrize(
    "bad",
    [
        {"account": ""},
        {"account": "x" * 256},
        {"account": "new\nline"},
        {"account": 5},
        {"time_zone": "Mars/Olympus"},
        {"time_zone": "localtime"},
        {"anchor_day": 0},
        {"anchor_day": 32},
        {"anchor_day": True},
        {"name": ""},
        {"address": ("x",) * 11},
        {"address": ("two\nlines",)},
    ],
)
def test_an_account_that_cannot_be_is_not_made(meter: Meter, bad: dict[str, Any]) -> None:
    [field] = bad
    with pytest.raises((InvalidEvent, InvalidSetting)) as caught:
        meter.accounts.create(**{"account": "acme", "plan": "pro", **bad})
    assert caught.value.field == field
    assert meter.accounts.list() == []
    assert actions(meter) == []


def test_an_account_can_be_changed_until_there_is_usage(meter: Meter) -> None:
    meter.accounts.create("acme", plan="pro", name="Acme", address=("1 Road", "Town"))
    changed = meter.accounts.update(
        "acme", name="Acme Ltd", time_zone="Asia/Kolkata", anchor_day=15, address=("2 Road",)
    )
    assert (changed.name, changed.time_zone, changed.anchor_day) == ("Acme Ltd", "Asia/Kolkata", 15)
    assert changed.address == ("2 Road",)
    with meter.ledger.read() as connection:
        noted = admin_log.entries(connection, limit=1)[0]
    assert (noted.action, noted.subject, noted.details) == (
        "account.update",
        "acme",
        {"changed": ["address", "anchor_day", "name", "time_zone"], "anchor_day": 15, "time_zone": "Asia/Kolkata"},
    ), "what may have to be erased is not in a log that never is"
    meter.record(account="acme", line="a")
    for change in ({"time_zone": "UTC"}, {"anchor_day": 1}):
        with pytest.raises(Conflict, match="has usage: its time zone and anchor day cut its periods and stay"):
            meter.accounts.update("acme", **change)  # type: ignore[arg-type]
    assert meter.accounts.update("acme", address=()).address == ()
    with pytest.raises(UnknownAccount):
        meter.accounts.update("nobody", name="x")


def test_a_plan_changes_from_now_on(meter: Meter, clock: Any) -> None:
    meter.accounts.create("acme", plan="free")
    clock.advance(days=1)
    assert meter.accounts.change_plan("acme", "pro").plan == "pro"
    assert meter.accounts.change_plan("acme", "pro").plan == "pro"
    assert actions(meter)[-1] == ("app", "account.change_plan", "acme")
    clock.advance(days=-1)
    assert meter.accounts.get("acme").plan == "free"


def test_plans_may_change_twice_within_one_tick(meter: Meter, clock: Any) -> None:
    meter.accounts.create("acme", plan="free")
    for plan in ("pro", "premium", "free", "pro"):
        assert meter.accounts.change_plan("acme", plan).plan == plan
    assert [action for _, action, _ in actions(meter)].count("account.change_plan") == 4


def test_an_adopted_key_is_adopted_once(meter: Meter) -> None:
    key = meter.keys.adopt(ADOPTED, "acme", plan="pro")
    assert (key.prefix, key.last_four) == ("sk-l", "cdef")
    assert meter.keys.adopt(ADOPTED, "acme", plan="free") == key
    assert meter.consume(ADOPTED, line="a").key_id == key.key_id
    meter.accounts.create("other", plan="pro")
    with pytest.raises(Conflict, match=f"API key {key.key_id} was adopted before, for another account"):
        meter.keys.adopt(ADOPTED, "other")
    assert len(meter.keys.list()) == 1


@pytest.mark.parametrize(
    "secret", ["x" * 15, "x" * 513, "with a tab\t0123456789", "surrogate \udcff 0123456789", None, 5]
)
def test_a_secret_that_cannot_be_is_not_shown(meter: Meter, secret: Any) -> None:
    with pytest.raises(InvalidSetting, match=r"secret: got '\(not shown\)', expected 16 to 512 printable characters"):
        meter.keys.adopt(secret, "acme", plan="pro")


def test_revoked_is_found_and_not_let_in(meter: Meter, clock: Any) -> None:
    key = meter.keys.create("acme", plan="pro")
    revoked = meter.keys.revoke(key.key_id)
    assert revoked.revoked_at == clock.now
    clock.advance(days=1)
    assert meter.keys.revoke(key.key_id) == revoked
    assert meter.keys.lookup(key.secret) == revoked
    with pytest.raises(RevokedKey, match=f"API key {key.key_id} of account 'acme' is no longer valid"):
        meter.authenticate(key.secret)
    for missing in (lambda: meter.keys.revoke("key_none"), lambda: meter.keys.rotate("key_none")):
        with pytest.raises(UnknownKey, match="no API key has the id 'key_none'"):
            missing()
    with pytest.raises(UnknownKey, match="the API key presented is not known"):
        meter.authenticate(key.secret[:-1])


def test_a_rotated_key_works_until_its_grace_is_over(meter: Meter, clock: Any) -> None:
    old = meter.keys.create("acme", plan="pro", label="ci")
    new = meter.keys.rotate(old.key_id, grace=timedelta(hours=1))
    assert (new.label, new.account, new.secret != old.secret) == ("ci", "acme", True)
    rotated = meter.authenticate(old.secret)
    assert (rotated.rotated_to, rotated.expires_at) == (new.key_id, clock.now + timedelta(hours=1))
    with pytest.raises(RevokedKey):
        meter.keys.rotate(old.key_id)
    clock.advance(hours=1)
    with pytest.raises(RevokedKey):
        meter.authenticate(old.secret)
    assert meter.authenticate(new.secret).key_id == new.key_id
    with pytest.raises(InvalidSetting, match="grace"):
        meter.keys.rotate(new.key_id, grace=timedelta(seconds=-1))


def test_last_use_is_kept_to_the_minute(meter: Meter, clock: Any) -> None:
    key = meter.keys.create("acme", plan="pro")
    assert meter.keys.lookup(key.secret).last_used_at is None
    first = clock.now
    for _ in range(3):
        meter.consume(key.secret, line="a")
        clock.advance(seconds=20)
    assert meter.keys.lookup(key.secret).last_used_at == first
    meter.consume(key.secret, line="a")
    assert meter.keys.lookup(key.secret).last_used_at == first + timedelta(minutes=1)


def test_a_pepper_makes_other_digests(open_meter: Callable[..., Meter]) -> None:
    plain, peppered = open_meter(), open_meter(key_pepper="salt and more")
    key = plain.keys.create("acme", plan="pro")
    with pytest.raises(UnknownKey):
        peppered.authenticate(key.secret)
    assert peppered.authenticate(peppered.keys.create("acme").secret).account == "acme"
    assert key_digest("x", None) == "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    assert key_digest("x", "p") != key_digest("x", "q") != key_digest("x", None)


def test_an_actor_is_named_in_the_log(open_meter: Callable[..., Meter]) -> None:
    open_meter(actor="support").accounts.create("acme", plan="pro", active_from=datetime(2026, 1, 1, tzinfo=UTC))
    assert {actor for actor, _, _ in actions(open_meter())} == {"support"}
