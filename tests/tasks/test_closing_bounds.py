"""What may not be changed once a period is closed, on either database, and a period that nobody can have meant."""

from __future__ import annotations

from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from metering.errors import Conflict
from metering.ledger import Ledger, plan_versions
from metering.meter import Meter
from metering.plans import parse_plans
from tests.tasks.place import NOVEMBER, PERIOD, Place, event

if TYPE_CHECKING:
    from metering.accounts import Account

PLANS = """
[plans.fee]
retention_days = 30
base_fee = "31.00"
minimum = "40.00"

[plans.other]
retention_days = 30
"""
DECEMBER = datetime(2023, 12, 20, tzinfo=UTC)


@pytest.fixture
def ledger_url(either_url: str) -> str:
    return either_url


@pytest.fixture
def fees(place: Place) -> Place:
    place.plans(PLANS)
    return place


def update(place: Place, account: str, **changes: Any) -> Account:
    with Meter(place.ledger_url, clock=lambda: DECEMBER) as meter:
        return meter.accounts.update(account, **changes)


def test_no_day_is_billed_twice_because_the_periods_are_cut_anew(fees: Place) -> None:
    fees.account("acme", "fee", anchor_day=30)
    fees.account("zeta", "fee", anchor_day=30)
    fees.aggregate()
    assert fees.close_loaded(PERIOD, at=datetime(2024, 1, 2, tzinfo=UTC)).accounts == 2
    fees.account("later", "fee", anchor_day=30)
    for change in ({"anchor_day": 1}, {"time_zone": "Asia/Kolkata"}):
        with pytest.raises(Conflict, match="'acme' has closed periods: its time zone and anchor day cut its periods"):
            update(fees, "acme", **change)
    assert update(fees, "acme", name="Acme Ltd").anchor_day == 30
    assert update(fees, "later", anchor_day=1).anchor_day == 1


def apply(place: Place, text: str, since: datetime) -> int:
    with closing(Ledger(place.ledger_url)) as ledger, ledger.write() as connection:
        plans = parse_plans(text).values()
        return len(plan_versions.apply(connection, plans, now=DECEMBER, actor="test", effective_from=since))


def test_a_plan_version_does_not_begin_within_a_closed_period(fees: Place) -> None:
    fees.account("acme", "fee")
    fees.account("zeta", "other")
    assert fees.close().accounts == 2
    end = datetime(2023, 12, 1, tzinfo=UTC)
    dearer = PLANS.replace("31.00", "62.00")
    for since in (datetime(2023, 11, 1, tzinfo=UTC), end - timedelta(microseconds=1), datetime(2013, 1, 1, tzinfo=UTC)):
        with pytest.raises(Conflict, match=r"'fee' has account 'acme', whose period 2023-11 is closed.*2023-12-01T00"):
            apply(fees, dearer, since)
    assert apply(fees, dearer, end) == 1


def test_a_plan_nobody_was_on_in_a_closed_period_may_begin_there(fees: Place) -> None:
    fees.account("acme", "fee")
    assert fees.close().accounts == 1
    with Meter(fees.ledger_url, clock=lambda: DECEMBER) as meter:
        meter.accounts.change_plan("acme", "other")
    other = "[plans.other]\nretention_days = 31"
    assert apply(fees, other, NOVEMBER - timedelta(days=1)) == 1


def test_a_period_before_the_account_was_created_is_not_billed(fees: Place) -> None:
    """A typo would bill it any period: nobody said since when it is active."""
    fees.account("acme", "fee")
    for override in (None, "any"):
        closed = fees.close("2013-11", override=override)
        assert (closed.accounts, closed.numbers, closed.refused, closed.came_later) == (0, (), (), 1)
    assert fees.close().accounts == 1


def test_a_period_with_usage_is_no_mistake(fees: Place) -> None:
    fees.account("acme", "fee")
    fees.add(event(at=NOVEMBER - timedelta(days=40)))
    assert fees.close("2023-10").accounts == 1
