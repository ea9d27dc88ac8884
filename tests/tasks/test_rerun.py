"""Running any step again changes nothing, and what is derived can be thrown away and proved."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from metering.errors import StoreUnavailable
from tasks.rebuild import rebuild_warehouse
from tasks.verify import invoice_differences, rollup_differences
from tests.tasks.place import NO_OTHERS, PERIOD, Place, event, month_of_usage

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.servers import PostgresServer

EVENTS = "SELECT * FROM usage_events ORDER BY seq"


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def billed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A month that was billed once, the same on both; tests copy it."""
    home = tmp_path_factory.mktemp("billed")
    if request.param == "sqlite":
        shutil.copy(request.getfixturevalue("empty_ledger"), home / "ledger.db")
        url = f"sqlite:///{home / 'ledger.db'}"
    else:
        server: PostgresServer = request.getfixturevalue("postgres")
        url = server.database(like=request.getfixturevalue("empty_postgres"))
    place = Place.at(home / "home", url)
    month_of_usage(place, events=400)
    problems = place.cycle()
    assert [account for account, _ in problems] == ["account-1"]  # bills provider cost, and has models without a price
    assert len(place.invoices()) == 5
    return place


@pytest.fixture
def place(request: pytest.FixtureRequest, billed: Place, tmp_path: Path) -> Iterator[Place]:
    shutil.copytree(billed.home, tmp_path / "home")
    if billed.url is None:
        yield Place(tmp_path / "home")
    else:
        server: PostgresServer = request.getfixturevalue("postgres")
        url = server.database(like=billed.url)
        yield Place(tmp_path / "home", url)
        server.drop(url)


def rebuild(place: Place) -> dict[str, int]:
    return rebuild_warehouse.fn(place.ledger_url, place.warehouse)


def differences(place: Place) -> tuple[list[str], list[str]]:
    return (
        rollup_differences(place.ledger_url, place.warehouse, PERIOD),
        invoice_differences(place.ledger_url, place.out, PERIOD),
    )


def test_again_is_the_same(place: Place) -> None:
    files, rows = place.files(), place.warehouse_rows(EVENTS)
    assert {name.rpartition(".")[2] for name in files} == {"json", "csv", "html", "lease"}
    costs = place.ledger_rows("SELECT * FROM event_costs ORDER BY seq")
    place.cycle()
    assert place.files() == files
    assert place.warehouse_rows(EVENTS) == rows
    assert place.ledger_rows("SELECT * FROM event_costs ORDER BY seq") == costs
    assert differences(place) == ([], [])


@pytest.mark.parametrize("lost", [True, False])
def test_a_rebuilt_warehouse_gives_the_same_bytes(place: Place, lost: bool) -> None:
    files, rows = place.files(), place.warehouse_rows(EVENTS)
    if lost:
        place.warehouse.unlink()
        shutil.rmtree(place.out)
    else:
        place.tamper("DELETE FROM usage_events; UPDATE usage_15m SET requests = 7")
    # What a killed rebuild left behind.
    place.warehouse.with_name("warehouse.duckdb.rebuilding").write_bytes(b"half")
    place.warehouse.with_name("warehouse.duckdb.rebuilding.wal").write_bytes(b"half")
    assert rebuild(place) == {"loaded": 400, "watermark": place.newest(), **NO_OTHERS}
    place.bill()
    assert place.files() == files
    assert place.warehouse_rows(EVENTS) == rows
    left = {path.name for path in place.home.iterdir()} - {"ledger.db"}
    assert left == {"out", "warehouse.duckdb", "warehouse.duckdb.lease"}
    assert place.load() == {"loaded": 0, "watermark": place.newest(), **NO_OTHERS}


def test_rebuilds_and_loads_at_once_take_turns(place: Place) -> None:
    rows = place.warehouse_rows(EVENTS)
    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(rebuild, place), pool.submit(place.load), pool.submit(rebuild, place)]
        answers = [future.result() for future in running]
    assert [answer["loaded"] for answer in answers] == [400, 0, 400]
    assert place.warehouse_rows(EVENTS) == rows


def test_a_rebuild_that_fails_leaves_the_warehouse_as_it_was(place: Place) -> None:
    before = place.warehouse.read_bytes()
    with pytest.raises(StoreUnavailable, match=r"not-there\.db"):
        rebuild_warehouse.fn(f"sqlite:///{place.home}/not-there.db", place.warehouse)
    assert place.warehouse.read_bytes() == before


def test_a_tampered_rollup_is_found(place: Place) -> None:
    place.tamper("UPDATE usage_15m SET output_tokens = output_tokens + 1 WHERE account = 'account-0'")
    (found,) = differences(place)[0]
    assert found.startswith("account-0: the ledger has ")


def test_a_tampered_cost_is_found(place: Place) -> None:
    place.tamper("UPDATE usage_15m SET cost = cost + 0.000000000001 WHERE account = 'account-1'")
    assert len(differences(place)[0]) == 1


@pytest.mark.parametrize("kind", ["json", "csv", "html"])
def test_a_changed_missing_or_added_file_is_found(place: Place, kind: str) -> None:
    folder = place.out / PERIOD / "invoices"
    first, second = sorted(folder.glob(f"*.{kind}"))[:2]
    content = bytearray(first.read_bytes())
    content[len(content) // 2] ^= 1
    first.write_bytes(bytes(content))
    second.unlink()
    shutil.copy(first, folder / f"more-2023-11.{kind}")
    assert differences(place)[1] == [
        f"{second.name}: is missing",
        f"more-2023-11.{kind}: bills nothing that is in the ledger",
        f"{first.name}: differs from what the ledger comes to",
    ]


def test_usage_that_no_job_has_seen_is_found(place: Place) -> None:
    place.add(event("account-0"))
    rollup, invoices = differences(place)
    assert [line.partition(":")[0] for line in rollup] == ["account-0"]
    assert [line.partition(":")[0] for line in invoices] == [
        f"account-0-2023-11.{kind}" for kind in ("csv", "html", "json")
    ]
    place.cycle()
    assert differences(place) == ([], [])


def test_a_period_without_files_has_every_invoice_missing(place: Place) -> None:
    shutil.rmtree(place.out)
    assert len(differences(place)[1]) == 15
