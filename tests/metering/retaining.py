"""A run of retention as the job does it, and what is left then."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from metering.ledger import log_partitions
from metering.ledger.retention import Kept, rules, shrink, sweep
from metering.ledger.schema import request_log

if TYPE_CHECKING:
    from metering import Meter


def logged(meter: Meter) -> Counter[str]:
    with meter.ledger.read() as connection:
        query = sa.select(request_log.c.account, sa.func.count()).group_by(request_log.c.account)
        return Counter(dict(connection.execute(query).all()))


def run(meter: Meter, clock: Any, **kept: int) -> dict[str, Counter[str | None]]:
    """A whole run, as the job does it."""
    gone = {}
    if meter.ledger.dialect == "postgresql":
        log_partitions.make_ahead(meter.ledger, clock.now)
    for rule in rules(clock.now, Kept(**kept)):
        swept = sweep(meter.ledger, rule, rest=lambda _: None).gone
        if rule.table is request_log and meter.ledger.dialect == "postgresql":
            swept.update(log_partitions.drop_past(meter.ledger, clock.now))
        gone[rule.table.name] = swept
    shrink(meter.ledger, rest=lambda _: None)
    return gone


def call(meter: Meter, secret: str, **said: Any) -> None:
    assert meter.consume(secret, line="a", request={"q": 1}, response={"a": 2}, **said).allowed
