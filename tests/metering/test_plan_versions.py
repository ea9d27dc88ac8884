"""Plan versions in the ledger: which is in force when, and what cannot be changed any more."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from metering.errors import Conflict
from metering.ledger import plan_versions
from metering.plans import Plan

if TYPE_CHECKING:
    from metering import Meter


@pytest.fixture
def ledger_url(either_url: str) -> str:
    return either_url


def plan(fee: str) -> Plan:
    return Plan.from_dict("p", {"retention_days": 1, "base_fee": fee})


def apply(meter: Meter, fee: str, **options: Any) -> list[int]:
    with meter.ledger.write() as connection:
        written = plan_versions.apply(connection, [plan(fee)], actor="test", **options)
    return [version.version for version in written]


def fee_at(meter: Meter, at: Any) -> str:
    with meter.ledger.read() as connection:
        version = plan_versions.in_force(connection, "acme", at)
    assert version is not None
    return str(version.plan.base_fee)


def test_the_first_version_holds_since_ever_and_a_later_one_from_now(meter: Meter, clock: Any) -> None:
    assert apply(meter, "1", now=clock.now) == [1]
    meter.accounts.create("acme", plan="p")
    clock.advance(days=1)
    assert apply(meter, "2", now=clock.now) == [2]
    assert apply(meter, "2", now=clock.now) == []
    assert fee_at(meter, clock.now - timedelta(days=400)) == "1"
    assert fee_at(meter, clock.now) == "2"


def test_a_pending_version_does_not_hide_what_is_in_force(meter: Meter, clock: Any) -> None:
    apply(meter, "1", now=clock.now)
    meter.accounts.create("acme", plan="p")
    assert apply(meter, "2", now=clock.now, effective_from=clock.now + timedelta(days=10_000)) == [2]
    assert fee_at(meter, clock.now) == "1"
    assert apply(meter, "2", now=clock.now) == [3]
    assert fee_at(meter, clock.now) == "2"


def test_recorded_usage_keeps_its_version(meter: Meter, clock: Any) -> None:
    apply(meter, "1", now=clock.now)
    meter.accounts.create("acme", plan="p")
    meter.record(account="acme", line="a", occurred_at=clock.now - timedelta(days=2))
    with pytest.raises(Conflict, match=r"plan 'p' has 1 events since .*, recorded under an earlier version"):
        apply(meter, "2", now=clock.now, effective_from=clock.now - timedelta(days=3))
    assert apply(meter, "2", now=clock.now, effective_from=clock.now - timedelta(days=1)) == [2]
