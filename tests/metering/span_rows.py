"""What the tests of kept spans share: the counts they say, and what the ledger has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from metering.ledger.schema import spans

if TYPE_CHECKING:
    from metering.meter import Meter

ON_SQLITE = pytest.mark.parametrize("either_url", ["sqlite"], indirect=True)
"""Of tests to which the kind of ledger is nothing."""

USED = {"gen_ai.usage.input_tokens": 10, "gen_ai.usage.output_tokens": 5}


def contents(meter: Meter, *columns: str) -> list[tuple[Any, ...]]:
    query = sa.select(*(spans.c[name] for name in columns)).order_by(spans.c.seq)
    with meter.ledger.read() as connection:
        return [tuple(row) for row in connection.execute(query)]


def numbers(meter: Meter) -> set[int]:
    return {int(span_id, 16) for (span_id,) in contents(meter, "span_id")}
