"""Bills stand whatever prices do, until a recost changes them: an act of its own, kept with all that it replaced."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest
from genai_prices import data_snapshot
from genai_prices.types import ClauseEquals, ModelInfo, ModelPrice

from metering.events import TokenUsage
from metering.ledger import Ledger
from tasks import costs
from tasks import recost as recosting
from tasks.errors import JobError, WarehouseError
from tasks.rebuild import rebuild_warehouse
from tasks.recost import Act, recost_period
from tasks.verify import invoice_differences, rollup_differences
from tests.tasks.place import NOVEMBER, PERIOD, Place, event

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PLANS = """
[plans.resale]
retention_days = 1
rates = [{ line = "*", type = "cost_plus", markup_percent = 50 }]

[plans.flagged]
retention_days = 1
unknown_price = "zero_and_flag"
rates = [{ line = "*", type = "cost_plus", markup_percent = 50 }]

[plans.named]
retention_days = 1
unknown_price = "openai:gpt-4.1"
rates = [{ line = "*", type = "cost_plus", markup_percent = 50 }]
"""
MILLION = TokenUsage(input_tokens=1_000_000)
MADE_AT = datetime(2023, 12, 5, tzinfo=UTC)
ACT = Act(period=PERIOD, actor="ann", reason="new prices", made_at=MADE_AT)
BOOKED = "SELECT seq, cost, price_version FROM event_costs ORDER BY seq"


@pytest.fixture
def ledger_url(either_url: str) -> str:
    return either_url


@pytest.fixture
def upgrade(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Installs other price data: gpt-4.1 at so many USD per million in, and a price for the model `mystery`."""

    def install(version: str, gpt: str, mystery: str = "7") -> None:
        providers = [
            replace(provider, models=[priced("mystery", mystery), priced("gpt-4.1", gpt)])
            for provider in data_snapshot._bundled_snapshot().providers
            if provider.id == "openai"
        ]
        data_snapshot.set_custom_snapshot(data_snapshot.DataSnapshot(providers=providers, from_auto_update=False))
        monkeypatch.setattr(costs, "price_version", lambda: version)

    monkeypatch.setattr(costs, "price_version", lambda: "v1")
    yield install
    data_snapshot.set_custom_snapshot(None)


def priced(model: str, usd: str) -> ModelInfo:
    return ModelInfo(id=model, match=ClauseEquals(model), prices=ModelPrice(input_mtok=Decimal(usd)))


def recost(place: Place, act: Act = ACT, *, dry_run: bool = False) -> list[str]:
    return [str(change) for change in recost_period.fn(place.ledger_url, place.warehouse, act, dry_run=dry_run)]


def rebuild(place: Place) -> None:
    rebuild_warehouse.fn(place.ledger_url, place.warehouse)


def booked(place: Place) -> list[tuple[Any, ...]]:
    return [(seq, None if cost is None else Decimal(cost), version) for seq, cost, version in place.ledger_rows(BOOKED)]


def test_new_price_data_changes_no_bill_already_costed(place: Place, upgrade: Callable[..., None]) -> None:
    place.plans(PLANS)
    for plan in ("resale", "flagged", "named"):
        place.account(plan, plan)
        place.add(event(plan, usage=MILLION), event(plan, usage=MILLION))
    place.add(event("flagged", model="mystery", usage=MILLION), event("named", model="mystery", usage=MILLION))
    place.cycle()
    files, before = place.files(), booked(place)
    assert place.invoices()["resale"].total == Decimal("6.00")
    assert place.invoices()["flagged"].total == Decimal("6.00")
    assert place.invoices()["named"].total == Decimal("9.00")

    upgrade("v2", "3")
    place.cycle()
    rebuild(place)
    place.bill()
    assert place.files() == files
    assert booked(place) == before

    place.add(event("resale", usage=MILLION))
    place.cycle()
    assert booked(place) == [*before, (9, Decimal(3), "v2")]
    assert place.invoices()["resale"].total == Decimal("10.50")

    said = [
        "flagged: 4 -> 13 USD, 3 events costed anew, requests without a price: 1 -> 0",
        "named: 6 -> 13 USD, 3 events costed anew",
        "resale: 7 -> 9 USD, 2 events costed anew",
    ]
    assert recost(place, dry_run=True) == said
    assert booked(place) == [*before, (9, Decimal(3), "v2")]
    assert place.ledger_rows("SELECT * FROM recosts") == []
    assert recost(place) == said
    rebuild(place)
    place.bill()
    totals = {name: invoice.total for name, invoice in place.invoices().items()}
    assert totals == {"resale": Decimal("13.50"), "flagged": Decimal("19.50"), "named": Decimal("19.50")}
    assert rollup_differences(place.ledger_url, place.warehouse, PERIOD) == []
    assert invoice_differences(place.ledger_url, place.out, PERIOD) == []


def test_a_recost_is_kept_with_what_it_replaced(
    place: Place, upgrade: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "EVENTS_PER_COMMIT", 2)
    place.account("acme")
    december = event(at=datetime(2023, 12, 16, tzinfo=UTC), usage=MILLION)
    place.add(*(event(usage=MILLION) for _ in range(3)), december, event(model="mystery", usage=MILLION))
    place.cost()
    before = place.ledger_rows("SELECT * FROM event_costs ORDER BY seq")
    upgrade("v2", "3")
    recost(place)
    after = booked(place)
    assert after == [
        *((seq, Decimal(3), "v2") for seq in (1, 2, 3)),
        (4, Decimal(2), "v1"),
        (5, Decimal(7), "v2"),
    ]
    kept = place.ledger_rows("SELECT recost, seq, cost, price_version, costed_at FROM replaced_costs ORDER BY seq")
    assert kept == [(1, *row) for row in before if row[0] != 4]
    (act,) = place.ledger_rows("SELECT actor, reason, period, price_version, ended FROM recosts")
    assert act == ("ann", "new prices", PERIOD, "v2", True)
    (entry,) = place.ledger_rows("SELECT actor, action, subject FROM admin_log WHERE action = 'costs.recost'")
    assert entry == ("ann", "costs.recost", PERIOD)

    assert recost(place) == []
    assert booked(place) == after
    assert len(place.ledger_rows("SELECT * FROM recosts")) == 1
    upgrade("v1", "2")
    recost(place, replace(ACT, reason="as it was"))
    assert [(seq, cost, version) for seq, cost, version in booked(place) if seq < 4] == [
        (seq, Decimal(2), "v1") for seq in (1, 2, 3)
    ]
    assert len(place.ledger_rows("SELECT * FROM replaced_costs")) == 8


@pytest.mark.parametrize("costed_between", [True, False])
def test_a_reversal_takes_back_the_new_cost(
    place: Place, upgrade: Callable[..., None], monkeypatch: pytest.MonkeyPatch, costed_between: bool
) -> None:
    monkeypatch.setattr(costs, "EVENTS_PER_COMMIT", 1)
    place.plans(PLANS)
    place.account("acme", "flagged")
    wrong, unknown = event(usage=MILLION), event(model="mystery", usage=MILLION)
    place.add(wrong, unknown, event(model="enigma", usage=MILLION))
    place.cost()
    with place.meter() as meter:
        meter.correct(wrong.event_id, usage=TokenUsage(input_tokens=500_000), reason="recounted")
        meter.correct(unknown.event_id, billable=False, reason="a test call")
    if costed_between:
        place.cost()
    upgrade("v2", "3")
    recost(place)
    if not costed_between:
        place.cost()
    assert [(cost, version) for _, cost, version in booked(place)] == [
        (Decimal(3), "v2"),
        (Decimal(7), "v2"),
        (None, "v2"),
        (Decimal(-3), "v2"),
        (Decimal("1.5"), "v2"),
        (Decimal(-7), "v2"),
        (Decimal(7), "v2"),
    ]
    rebuild(place)
    place.bill()
    invoice = place.invoices()["acme"]
    assert (invoice.provider_cost, invoice.unpriced_requests, invoice.requests) == (Decimal("1.5"), 1, 2)


def test_a_reversal_that_is_booked_while_costs_change_takes_back_the_new_one(
    place: Place, upgrade: Callable[..., None]
) -> None:
    place.account("acme")
    wrong = event(usage=MILLION)
    place.add(wrong)
    place.cost()
    with place.meter() as meter:
        meter.correct(wrong.event_id, billable=False, reason="a test call")
    ledger = Ledger(place.ledger_url)
    slow = costs._next_costs(ledger)
    upgrade("v2", "3")
    recost(place)
    costs._book(ledger, slow, MADE_AT)
    ledger.close()
    assert [cost for _, cost, _ in booked(place)][:2] == [3, -3]


class Killed(BaseException):
    """What a kill leaves in a process that has to go on."""


def half(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recost the first two events, and no more."""
    really, left = recosting._replace, [1]

    def once(*arguments: Any) -> Any:
        if not left:
            raise Killed
        left.pop()
        return really(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(costs, "EVENTS_PER_COMMIT", 2)
        patch.setattr(recosting, "_replace", once)
        with pytest.raises(Killed):
            recost(place)


def test_the_same_again_goes_on_with_one_that_was_killed(
    place: Place, upgrade: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    place.account("acme")
    place.add(*(event(usage=MILLION) for _ in range(5)))
    place.cycle()
    upgrade("v2", "3")
    half(place, monkeypatch)
    assert [cost for _, cost, _ in booked(place)] == [3, 3, 2, 2, 2]
    for job in (place.load, place.invoice, lambda: rebuild(place)):
        with pytest.raises(WarehouseError, match=r"has not ended.*flows recost --period 2023-11 --reason 'new prices'"):
            job()
    with pytest.raises(JobError, match="recost 1 of 2023-11 has not ended"):
        recost(place, replace(ACT, period="2023-12"))
    assert recost(place, dry_run=True) == ["acme: 10 -> 15 USD, 5 events costed anew"]
    assert recost(place, replace(ACT, made_at=datetime(2024, 1, 1, tzinfo=UTC))) == [
        "acme: 10 -> 15 USD, 5 events costed anew"
    ]
    assert place.ledger_rows("SELECT recost, seq FROM replaced_costs ORDER BY seq") == [(1, seq) for seq in range(1, 6)]
    assert [bool(ended) for (ended,) in place.ledger_rows("SELECT ended FROM recosts")] == [True]


def test_another_recost_of_the_period_takes_the_place_of_one_that_was_killed(
    place: Place, upgrade: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    place.account("acme")
    place.add(*(event(usage=MILLION) for _ in range(5)))
    place.cost()
    upgrade("v2", "3")
    half(place, monkeypatch)
    upgrade("v3", "4")
    assert recost(place) == ["acme: 12 -> 20 USD, 5 events costed anew"]
    assert place.ledger_rows("SELECT recost, count(*) FROM replaced_costs GROUP BY recost ORDER BY recost") == [
        (1, 2),
        (2, 5),
    ]
    rebuild(place)
    assert place.warehouse_rows("SELECT recost FROM loaded_recost") == [(2,)]


def test_a_recost_that_another_one_overtakes_stops(
    place: Place, upgrade: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    place.account("acme")
    place.add(event(usage=MILLION))
    place.cost()
    upgrade("v2", "3")
    really, left = recosting._replace, [1]

    def overtaken(ledger: Ledger, *arguments: Any) -> Any:
        if left:
            left.pop()
            recosting._recost(ledger, replace(ACT, actor="bob"), dry_run=False)
        return really(ledger, *arguments)

    monkeypatch.setattr(recosting, "_replace", overtaken)
    with pytest.raises(JobError, match="recost 1 has begun meanwhile"):
        recost(place)
    assert place.ledger_rows("SELECT actor FROM recosts") == [("bob",)]


def test_a_warehouse_of_before_a_recost_is_not_loaded_and_not_billed(
    place: Place, upgrade: Callable[..., None]
) -> None:
    place.account("acme")
    place.add(event(usage=MILLION))
    place.cycle()
    files = place.files()
    upgrade("v2", "3")
    recost(place)
    for job in (place.load, place.invoice):
        with pytest.raises(WarehouseError, match=r"newest recost is 1, .* after recost 0.*python -m flows rebuild"):
            job()
    assert place.files() == files
    rebuild(place)
    place.add(event(usage=MILLION))
    place.cycle()
    assert place.invoices()["acme"].provider_cost == 6


def test_a_warehouse_that_is_begun_after_a_recost_is_as_new(place: Place, upgrade: Callable[..., None]) -> None:
    place.account("acme")
    place.add(event(at=NOVEMBER, usage=MILLION))
    place.cost()
    upgrade("v2", "3")
    recost(place)
    assert place.load()["loaded"] == 1
    assert place.load()["loaded"] == 0
    assert place.invoice() == []


def test_a_period_without_events_is_no_act(place: Place) -> None:
    assert recost(place, replace(ACT, period="2024-01")) == []
    assert place.ledger_rows("SELECT * FROM recosts") == []
