"""A large request log loses what is over while calls are admitted and logged: all of it, and no call is refused.

`python -m benchmarks.retention` says how long these waited.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.retention import measured
from metering.clock import utc_now
from metering.ledger import Ledger
from metering.ledger.retention import Kept, due, rules
from tests.faults.killing import ROUNDS

ROWS = 10_000 * ROUNDS
MOST_MIB = 32
"""By so much memory may grow, however many rows there are."""


@pytest.mark.parametrize("url", ["sqlite_url", "postgres_url"])
def test_what_is_over_goes_beside_admissions(request: pytest.FixtureRequest, url: str) -> None:
    ledger_url = request.getfixturevalue(url)
    found: dict[str, Any] = measured(ledger_url, ROWS, before_s=0)
    gone = found["dropped_with_partitions"] + found["deleted_by_row"]
    # The log began 45 days ago: half of it is kept for 7 days, and three tenths for 30.
    assert abs(gone / ROWS - (0.5 * 38 / 45 + 0.3 * 15 / 45)) < 0.01
    assert found["memory_grown_mib"] < MOST_MIB
    ledger = Ledger(ledger_url)
    with ledger.read() as connection:
        left = connection.exec_driver_sql("SELECT count(*) FROM request_log WHERE account <> 'live'").scalar_one()
        goes, _ = due(connection, rules(utc_now(), Kept())[0])
        calls = connection.exec_driver_sql("SELECT count(*) FROM request_log WHERE account = 'live'").scalar_one()
        billed = connection.exec_driver_sql("SELECT count(*) FROM events").scalar_one()
    ledger.close()
    assert left == ROWS - gone
    assert goes.total() < ROWS / 1_000  # what came to its end since
    # All that were admitted, and the first one, which asked for no log.
    said = found["admissions_ms"]
    assert billed == calls + 1 == said["before"]["calls"] + said["beside"]["calls"] + 1
