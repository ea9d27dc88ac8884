"""`tallystick trace`: one key, and all that became of it."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
import sqlalchemy as sa

from metering import Meter, TokenUsage
from metering.admission.redis.keys import shard_key, shard_of
from metering.billing.invoices import UsageSum, build_invoice
from metering.events import derive_event_id
from metering.ledger import plan_versions
from metering.ledger.schema import event_costs, events
from metering.windows import period_of_month
from tasks.bills import invoice_files
from tests.servers import RedisServer

if TYPE_CHECKING:
    from collections.abc import Iterator

PLANS = """
[plans.team]
retention_days = 30
limits = [{ metric = "requests", per = "month", max = 500 }]
rates = [
  { line = "*", metric = "input_tokens", type = "per_unit", unit_amount = "2.50", per = 1_000_000 },
  { line = "*", metric = "output_tokens", type = "per_unit", unit_amount = "10.00", per = 1_000_000 },
]
"""
USAGE = TokenUsage(input_tokens=812, output_tokens=120)
ACME = shard_of("acme")


@pytest.fixture
def app(ledger_url: str, tallystick: Any) -> Iterator[Meter]:
    Path("plans.toml").write_text(PLANS)
    assert tallystick("plans", "apply").status == 0
    with Meter(ledger_url) as meter:
        yield meter


@pytest.fixture
def secret(app: Meter) -> str:
    return app.keys.create("acme", plan="team", label="ci").secret


def one(tallystick: Any, *arguments: object) -> Any:
    """The only history there is."""
    [history] = tallystick("trace", *arguments, "--json").json
    return history


def test_a_call_and_its_correction(tallystick: Any, app: Meter, secret: str) -> None:
    told = {"request": {"q": "secret question"}, "response": {"a": 1}}
    call = app.consume(secret, line="chat", usage=USAGE, idempotency_key="req-1", model="m", provider="p", **told)
    app.consume(secret, line="chat", usage=USAGE, idempotency_key="req-2")
    corrected = app.correct(call.event_id, usage=TokenUsage(input_tokens=800), reason="recounted")
    history = one(tallystick, "req-1")
    assert (history["account"], history["line"], history["idempotency_key"]) == ("acme", "chat", "req-1")
    assert [(row["became"], row["event_id"], row["requests"]) for row in history["events"]] == [
        ("usage", str(call.event_id), 1),
        ("reversal", str(corrected.reversal), -1),
        ("replacement", str(corrected.replacement), 1),
    ]
    first, back, instead = history["events"]
    assert (first["plan"], first["version"], first["counted"], first["key_id"]) == ("team", 1, True, call.key_id)
    assert first["tokens"] == {"input_tokens": 812, "output_tokens": 120}
    assert back["tokens"] == {"input_tokens": -812, "output_tokens": -120}
    assert (instead["tokens"], instead["reason"]) == ({"input_tokens": 800}, "recounted")
    [logged] = history["log"]
    assert (logged["event_id"], logged["has_request"], logged["has_response"]) == (str(call.event_id), True, True)
    [key] = history["keys"]
    assert (key["key_id"], key["ends"], key["label"]) == (call.key_id, secret[-4:], "ci")
    assert (history["holds"], history["undrained"], history["dead_letters"], history["reuses"]) == ([], [], [], [])
    by_id = [one(tallystick, named) for named in (call.event_id, corrected.reversal, corrected.replacement)]
    assert by_id == [history] * 3
    shown = tallystick("trace", "req-1")
    assert shown.status == 0
    assert all(word in shown.out for word in ("admitted", "reversal", "replacement", "recounted", "has request and"))
    assert "secret question" not in shown.out
    assert secret not in shown.out


def test_a_hold_in_each_of_its_states(tallystick: Any, app: Meter, secret: str) -> None:
    hold = app.reserve(secret, line="chat", estimate=USAGE, idempotency_key="req-1", request={"q": 1})
    [held] = one(tallystick, "req-1")["holds"]
    assert (held["state"], held["where"], held["reserved"]["output_tokens"]) == ("open", "ledger", "120")
    assert "open, until " in tallystick("trace", "req-1").out
    hold.release()
    history = one(tallystick, "req-1", "--account", "acme", "--line", "chat")
    assert ([held["state"] for held in history["holds"]], history["events"], history["bills"]) == (["released"], [], [])
    assert [(row["hold_id"], row["has_request"]) for row in history["log"]] == [(held["hold_id"], True)]
    app.reserve(secret, line="chat", estimate=USAGE, idempotency_key="req-1").settle(TokenUsage(input_tokens=5))
    history = one(tallystick, "req-1")
    assert [held["state"] for held in history["holds"]] == ["released", "settled"]
    [event] = history["events"]
    assert history["holds"][1]["settled_event_id"] == event["event_id"]


def test_a_call_without_a_key_is_found_by_its_id(tallystick: Any, app: Meter, secret: str) -> None:
    hold = app.reserve(secret, line="chat", estimate=USAGE)
    history = one(tallystick, hold.decision.event_id)
    assert (history["idempotency_key"], [held["state"] for held in history["holds"]]) == (None, ["open"])
    hold.settle(USAGE)
    call = app.consume(secret, line="chat", usage=USAGE)
    for event_id in (hold.decision.event_id, call.event_id):
        history = one(tallystick, event_id.hex)
        assert [row["event_id"] for row in history["events"]] == [str(event_id)]


def test_one_key_on_two_accounts_and_lines_and_twice_on_one(tallystick: Any, app: Meter, secret: str) -> None:
    other = app.keys.create("zeta", plan="team").secret
    for key, line in ((secret, "chat"), (secret, "vision"), (other, "chat")):
        app.consume(key, line=line, usage=USAGE, idempotency_key="req-1")
    app.record(account="acme", line="chat", quantity=2, idempotency_key="req-1")
    found = tallystick("trace", "req-1", "--json").json
    assert [(history["account"], history["line"]) for history in found] == [
        ("acme", "chat"),
        ("acme", "vision"),
        ("zeta", "chat"),
    ]
    assert [row["became"] for row in found[0]["events"]] == ["usage", "signal"]
    assert one(tallystick, "req-1", "--account", "zeta") == found[2]
    assert one(tallystick, "req-1", "--line", "vision") == found[1]
    assert one(tallystick, "req-1", "--account", "acme", "--line", "chat") == found[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ("req-1",),
        (str(uuid4()),),
        ("call", "--line", "vision"),
        ("call", "--account", "zeta", "--line", "chat"),
        ("\0",),
    ],
)
def test_nothing_is_known_of_it(tallystick: Any, app: Meter, secret: str, arguments: tuple[str, ...]) -> None:
    app.consume(secret, line="chat", usage=USAGE, idempotency_key="call")
    for more in ((), ("--json",)):
        answer = tallystick("trace", *arguments, *more)
        assert (answer.status, answer.out, answer.err.count("\n")) == (1, "", 1)
        assert answer.err.startswith(f"error: nothing is known of {arguments[0]!r} in the ledger, as an idempotency")


def cost_everything(app: Meter, at: datetime) -> None:
    """As `aggregate-usage` does, at a price of 1 USD each."""
    with app.ledger.write() as connection:
        known = sa.select(event_costs.c.seq)
        for row in connection.execute(sa.select(events).where(events.c.seq.not_in(known))).all():
            row_cost = {"seq": row.seq, "cost": Decimal(row.requests), "price_version": "test", "costed_at": at}
            connection.execute(event_costs.insert(), row_cost)


def draft(app: Meter, period: str, at: datetime) -> Path:
    """A draft of all of acme's usage, as `bill-period` writes it."""
    window = period_of_month(period, time_zone="UTC", anchor_day=1)
    [total] = app.usage("acme")
    with app.ledger.read() as connection:
        [version] = plan_versions.versions(connection, "team")
    usage = UsageSum(
        plan_version=version.plan_version,
        line="chat",
        provider=None,
        model=None,
        service_tier=None,
        requests=total.requests,
        quantity=total.quantity,
        input_tokens=total.input_tokens,
        output_tokens=total.output_tokens,
        cost=Decimal(total.requests),
    )
    invoice = build_invoice(
        account="acme",
        name=None,
        address=(),
        plans={version.plan_version: version.plan},
        plan_version=version.plan_version,
        period=period,
        period_start=window.start,
        period_end=window.end,
        time_zone="UTC",
        usage=[usage],
        active_from=None,
    )
    folder = Path(".tallystick/out") / period / "invoices"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "zeta.json").write_text('{"reference": "zeta"}')
    for name, content in invoice_files(invoice).items():
        (folder / name).write_bytes(content)
        os.utime(folder / name, (at.timestamp(), at.timestamp()))
    return folder / f"acme-{period}.json"


def test_how_far_it_has_come_to_the_invoice(tallystick: Any, app: Meter, secret: str) -> None:
    call = app.consume(secret, line="chat", usage=USAGE, idempotency_key="req-1")
    app.consume(secret, line="chat", usage=TokenUsage(input_tokens=1_000_000), idempotency_key="req-2")
    now = datetime.now(UTC)

    def bill() -> Any:
        [found] = one(tallystick, "req-1")["bills"]
        return found

    fresh = bill()
    period = fresh["period"]
    version = one(tallystick, "req-1")["events"][0]["plan_version"]
    assert [(item["item_id"], item["metric"], item["quantity"]) for item in fresh["items"]] == [
        (f"v{version}/rates/0", "input_tokens", "812"),
        (f"v{version}/rates/1", "output_tokens", "120"),
    ]
    assert (fresh["document"], fresh["says"]) == (
        None,
        "not billed yet: `python -m flows aggregate-usage` has not seen all of it",
    )
    cost_everything(app, now)
    assert bill()["says"].startswith("not billed yet: there is no draft in .tallystick/out/")
    file = draft(app, period, now + timedelta(seconds=1))
    billed = bill()
    assert billed["says"] == f"in acme-{period} (draft)"
    assert (billed["document"]["file"], billed["document"]["total"]) == (str(file), "2.50 USD")
    assert billed["document"]["items"][0] == f"v{version}/rates/0: 1000812 for 2.50 USD"
    shown = tallystick("trace", "req-1").out
    assert f"item v{version}/rates/0: 812 of " in shown
    assert "1 USD, test" in shown

    app.correct(call.event_id, billable=False, reason="a test call")
    assert bill()["says"].startswith("not billed yet: ")
    cost_everything(app, now + timedelta(seconds=2))
    assert bill()["says"].startswith("not billed as it stands: the draft is older")
    draft(app, period, now + timedelta(seconds=3))
    gone = bill()
    assert (gone["items"], gone["says"]) == ([], f"in acme-{period} (draft): it was taken back, and adds nothing")


def test_what_is_not_billed_says_so(tallystick: Any, app: Meter, secret: str) -> None:
    app.record(account="acme", line="chat", quantity=1, caller_type="internal", idempotency_key="job")
    [bill] = one(tallystick, "job")["bills"]
    assert (bill["items"], bill["says"]) == ([], "nothing is billed for it: no event of it is billable")
    assert "not billed (internal)" in tallystick("trace", "job").out


def test_on_redis(tallystick: Any, app: Meter, ledger_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hold, then an event in the stream, then what the drain makes of it, of a key used again, and of poison."""
    with (
        RedisServer() as server,
        server.client() as client,
        Meter(ledger_url, quota_url=server.url, quota_timeout_s=5, spool=Path(".tallystick/spool")) as meter,
    ):
        monkeypatch.setenv("METERING_QUOTA_URL", server.url)
        secret = meter.keys.create("acme", plan="team").secret
        named = ("req-1", "--account", "acme", "--line", "chat")
        hold = meter.reserve(secret, line="chat", estimate=USAGE, idempotency_key="req-1")
        [held] = one(tallystick, *named)["holds"]
        assert (held["where"], held["state"], held["reserved"]["input_tokens"]) == ("redis", "open", "812")
        nothing = tallystick("trace", "req-1")
        assert (nothing.status, nothing.err.count("\n")) == (1, 1)
        assert nothing.err.endswith("an open hold there is found with its account and line\n")

        hold.settle(USAGE)
        waiting = one(tallystick, "req-1")
        [entry] = waiting["undrained"]
        assert (entry["kind"], entry["account"], waiting["events"], waiting["bills"]) == ("event", "acme", [], [])
        assert one(tallystick, entry["event_id"]) == waiting
        assert "waits in Redis" in tallystick("trace", "req-1").out

        tallystick("drain")
        drained = one(tallystick, "req-1")
        [event] = drained["events"]
        assert (event["position"], drained["undrained"]) == (entry["position"], [])
        assert [held["state"] for held in drained["holds"]] == ["settled"]
        assert one(tallystick, event["event_id"]) == drained

        client.delete(shard_key(ACME, f"id:{derive_event_id('usage', 'acme', 'chat', 'req-1').hex}"))
        again = meter.consume(secret, line="chat", usage=USAGE, idempotency_key="req-1", request={"another": "one"})
        assert again.allowed
        [(_, fields)] = client.xrange(shard_key(ACME, "events"))
        number = client.hincrby(shard_key(ACME, "shard"), "seq", 1)
        header = fields[b"h"].replace(b",%d," % (number - 1), b",%d," % number, 1)
        client.xadd(shard_key(ACME, "events"), {b"h": header, b"e": b"?"})
        tallystick("drain")
        history = one(tallystick, "req-1")
        assert [row["became"] for row in history["events"]] == ["usage", "key used again"]
        [reuse] = history["reuses"]
        assert reuse["billed_as"] == history["events"][1]["event_id"]
        [letter] = history["dead_letters"]
        assert letter["resolved_at"] is None
        shown = tallystick("trace", "req-1").out
        assert all(text in shown for text in ("another request: billed too", "dead letter 1"))
        assert one(tallystick, reuse["billed_as"]) == history


def test_a_redis_that_is_away_is_said(
    tallystick: Any, app: Meter, secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    app.consume(secret, line="chat", usage=USAGE, idempotency_key="req-1")
    monkeypatch.setenv("METERING_QUOTA_URL", "redis://127.0.0.1:1")
    answer = tallystick("trace", "req-1")
    assert (answer.status, answer.out, answer.err.count("\n")) == (1, "", 1)
    assert answer.err.startswith("error: Redis ")
