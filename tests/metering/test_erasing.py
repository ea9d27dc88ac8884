"""Erasing an account: what goes, what stays and why, and that a legal hold forbids it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from metering.erasing import erase
from metering.errors import Conflict, RevokedKey, UnknownAccount
from metering.ledger import admin_log
from metering.ledger.schema import accounts, api_keys, events, replays, request_log
from metering.legal_holds import place_hold, release_hold

if TYPE_CHECKING:
    from metering import Meter

PERSONAL = "ann@example.org"


@pytest.fixture
def ledger_url(either_url: str) -> str:
    return either_url


@pytest.fixture
def secret(meter: Meter) -> str:
    """A key of `acme`, whose rows say something personal wherever an app can; `other` has the same."""
    kept = ""
    for name in ("other", "acme"):
        meter.accounts.create(name, plan="pro", name=PERSONAL, address=(PERSONAL, "Town"))
        secret = meter.keys.create(name, label=PERSONAL).secret
        for number in range(5):
            meter.consume(
                secret,
                line="a",
                request={"from": PERSONAL},
                response={"to": PERSONAL},
                error=PERSONAL,
                session_id=PERSONAL,
                attributes={"who": PERSONAL},
                run_id="run-1",
                request_id="request-1",
                idempotency_key=f"k{number}",
            )
        meter.reserve(secret, line="a", request={"from": PERSONAL}).release(error=PERSONAL)
        kept = secret
    return kept


def rows_with(meter: Meter, text: str, account: str) -> dict[str, int]:
    """How many rows of an account have a text in them, by table."""
    found = {}
    for table in (accounts, api_keys, events, request_log):
        with meter.ledger.read() as connection:
            rows = connection.execute(sa.select(table).where(table.c.account == account)).all()
        found[table.name] = sum(text in repr(row) for row in rows)
    with meter.ledger.read() as connection:
        query = sa.select(replays).join(events, events.c.event_id == replays.c.event_id)
        found["replays"] = len(connection.execute(query.where(events.c.account == account)).all())
    return found


EVERYTHING = {"accounts": 1, "api_keys": 1, "events": 5, "request_log": 6, "replays": 5}
NOTHING = dict.fromkeys(EVERYTHING, 0)


def test_what_is_personal_goes_and_what_is_billed_stays(meter: Meter, secret: str, clock: Any) -> None:
    assert rows_with(meter, PERSONAL, "acme") == EVERYTHING
    [before] = meter.usage("acme")
    foreseen = erase(meter.ledger, "acme", actor="ann", now=clock.now, dry_run=True)
    assert rows_with(meter, PERSONAL, "acme") == EVERYTHING
    found = erase(meter.ledger, "acme", actor="ann", now=clock.now)
    assert found == foreseen
    assert {(part.what, part.rows, part.becomes) for part in found.gone} == {
        ("keys", 1, "revoked"),
        ("labels of keys", 1, "emptied"),
        ("name and address", 1, "emptied"),
        ("request log", 6, "deleted"),
        ("answers kept for retries", 5, "deleted"),
        ("session, attributes and error of billed calls", 5, "emptied"),
    }
    assert rows_with(meter, PERSONAL, "acme") == NOTHING
    assert rows_with(meter, PERSONAL, "other") == EVERYTHING
    assert meter.usage("acme") == [before]
    with meter.ledger.read() as connection:
        kept = connection.execute(sa.select(events).where(events.c.account == "acme")).mappings().all()
    assert {(row["run_id"], row["request_id"], row["requests"]) for row in kept} == {("run-1", "request-1", 1)}
    with pytest.raises(RevokedKey):
        meter.consume(secret, line="a")


def test_what_stays_says_under_which_rule(meter: Meter, secret: str, clock: Any) -> None:
    found = erase(meter.ledger, "acme", actor="ann", now=clock.now, dry_run=True)
    stays = {part.what: part.rows for part in found.stays}
    assert stays == {"billed events, with the ids of calls and runs": 5, "entries of the admin log": 1, "account": 1}
    assert all(part.rule and part.becomes == "stays" for part in found.stays)


def test_erasing_twice_is_once(meter: Meter, secret: str, clock: Any) -> None:
    erase(meter.ledger, "acme", actor="ann", now=clock.now)

    def noted() -> list[tuple[str, dict[str, Any]]]:
        with meter.ledger.read() as connection:
            entries = admin_log.entries(connection, limit=100)
        return [(entry.actor, entry.details) for entry in entries if entry.action == "account.erase"]

    [(actor, details)] = noted()
    assert (actor, details["rows"]["request log"]) == ("ann", 6)
    assert PERSONAL not in repr(details)
    again = erase(meter.ledger, "acme", actor="ann", now=clock.now)
    assert again.gone == ()
    assert len(noted()) == 1


def test_what_was_begun_is_finished(meter: Meter, secret: str, clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from metering import erasing

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(erasing, "sweep", stop)
        with pytest.raises(KeyboardInterrupt):
            erase(meter.ledger, "acme", actor="ann", now=clock.now)
    assert rows_with(meter, PERSONAL, "acme") == {**EVERYTHING, "accounts": 0, "api_keys": 0}
    found = erase(meter.ledger, "acme", actor="ann", now=clock.now)
    assert "keys" not in {part.what for part in found.gone}
    assert rows_with(meter, PERSONAL, "acme") == NOTHING


def test_nothing_is_erased_under_legal_hold(meter: Meter, secret: str, clock: Any) -> None:
    place_hold(meter.ledger, "acme", reason="case", actor="counsel", now=clock.now)
    for dry_run in (True, False):
        with pytest.raises(Conflict, match="account 'acme' is on legal hold: nothing of it may be erased"):
            erase(meter.ledger, "acme", actor="ann", now=clock.now, dry_run=dry_run)
    assert rows_with(meter, PERSONAL, "acme") == EVERYTHING
    assert meter.consume(secret, line="a").allowed
    release_hold(meter.ledger, "acme", actor="counsel", now=clock.now)
    erase(meter.ledger, "acme", actor="ann", now=clock.now)
    assert rows_with(meter, PERSONAL, "acme") == NOTHING


def test_an_account_that_is_not_known_is_said(meter: Meter, clock: Any) -> None:
    with pytest.raises(UnknownAccount):
        erase(meter.ledger, "nobody", actor="ann", now=clock.now)
