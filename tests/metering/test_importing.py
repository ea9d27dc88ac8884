"""Imports: every row once, however often, under whatever name and in whatever order it comes."""

from __future__ import annotations

import csv
import tracemalloc
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from metering import importing
from metering.admission.verify import check_counters
from metering.errors import InvalidSetting
from metering.importing import Importer
from metering.ledger import plan_versions
from metering.ledger.schema import counters, events
from metering.plans import parse_plans

if TYPE_CHECKING:
    from collections.abc import Callable

    from metering.meter import Meter

TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens"
MAPPED = ("--map", "occurred_at=TIMESTAMP,input_tokens=ContextTokens", "--map", "output_tokens=GeneratedTokens")
AS_ACME = (*MAPPED, "--account", "acme", "--line", "chat")


def trace(name: str, rows: list[tuple[str, int, int]], header: str = TRACE) -> Path:
    """A file shaped like a production trace: times with seven digits and no zone, two counts."""
    path = Path(name)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header.split(","))
        writer.writerows(rows)
    return path


def row(second: int, read: int = 100, generated: int = 10) -> tuple[str, int, int]:
    return f"2023-11-16 18:{second // 60:02d}:{second % 60:02d}.9799600", read, generated


@pytest.fixture
def load(tallystick: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """Import one file for `acme`; its report."""
    tallystick("accounts", "create", "acme", "--plan", "pro")

    def run(path: Path, *options: str) -> dict[str, Any]:
        answer = tallystick("import", path, *(options if "--map" in options else (*AS_ACME, *options)), "--json")
        (report,) = answer.json
        assert answer.status == (3 if report["rejected"] else 0)
        assert report["rows"] == report["inserted"] + report["known"] + report["rejected"]
        return {**report, "new": (report["inserted"], report["known"], report["rejected"])}

    return run


@pytest.fixture
def used(tallystick: Callable[..., Any]) -> Callable[..., tuple[int, int, int]]:
    """Requests, input and output tokens of an account."""

    def run(account: str = "acme") -> tuple[int, int, int]:
        (total,) = tallystick("usage", account, "--json").json
        return total["requests"], total["input_tokens"], total["output_tokens"]

    return run


def rejects_of(report: dict[str, Any]) -> list[tuple[int, str]]:
    with Path(report["rejects_file"]).open(newline="") as file:
        return [(int(row["row"]), row["reason"]) for row in csv.DictReader(file)]


def test_a_file_is_imported_once_however_often(load: Any, used: Any) -> None:
    path = trace("code.csv", [row(second, 100 + second, second) for second in range(20)])
    expected = (20, 2_000 + 190, 190)
    assert load(path)["new"] == (20, 0, 0)
    assert used() == expected
    assert load(path)["new"] == (0, 20, 0)
    assert used() == expected


def test_equal_rows_of_one_file_are_events_of_their_own(load: Any, used: Any) -> None:
    path = trace("code.csv", [row(1), row(2), row(1), row(1)])
    assert load(path)["new"] == (4, 0, 0)
    assert load(path)["new"] == (0, 4, 0)
    assert used() == (4, 400, 40)


def test_a_longer_export_in_another_order_adds_only_what_is_new(load: Any, used: Any) -> None:
    load(trace("code.csv", [row(1), row(2), row(2), row(3)]))
    longer = [row(9), row(3), row(2), row(0), row(2), row(1), row(2)]
    assert load(trace("code.csv", longer))["new"] == (3, 4, 0)
    assert used() == (7, 700, 70)


def test_another_export_of_the_same_columns_elsewhere_in_the_file_adds_nothing(load: Any) -> None:
    load(trace("code.csv", [row(1), row(2)]))
    turned = [(generated, at, "eu", read) for at, read, generated in (row(1), row(2))]
    path = trace("code.csv", turned, "GeneratedTokens,TIMESTAMP,region,ContextTokens")
    assert load(path)["new"] == (0, 2, 0)


def test_the_source_keeps_equal_rows_of_two_systems_apart(load: Any, used: Any) -> None:
    Path("east").mkdir()
    Path("west").mkdir()
    assert load(trace("east/usage.csv", [row(1)]))["source"] == "usage"
    assert load(trace("west/usage.csv", [row(1)]))["new"] == (0, 1, 0)
    assert load(Path("west/usage.csv"), "--source", "west")["new"] == (1, 0, 0)
    assert load(trace("other.csv", [row(1)]))["new"] == (1, 0, 0)
    assert load(Path("other.csv"), "--source", "usage")["new"] == (0, 1, 0)
    assert used()[0] == 3


def test_one_file_for_two_accounts_or_lines_is_two_usages(load: Any, used: Any) -> None:
    path = trace("code.csv", [row(1)])
    for account, line in (("acme", "chat"), ("acme", "search"), ("zeta", "chat")):
        given = (*MAPPED, "--account", account, "--line", line, "--plan", "free")
        assert load(path, *given)["new"] == (1, 0, 0)
        assert load(path, *given)["new"] == (0, 1, 0)
    assert (used("acme")[0], used("zeta")[0]) == (2, 1)


def test_the_same_rows_with_another_model_are_refused_not_doubled(load: Any, used: Any) -> None:
    path = trace("code.csv", [row(1)])
    load(path)
    report = load(path, "--model", "gpt-4.1", "--provider", "openai")
    assert report["new"] == (0, 0, 1)
    assert rejects_of(report) == [(1, "row: the same was imported before with other values")]
    assert used()[0] == 1


KEYED = (*AS_ACME, "--map", "idempotency_key=id")


def keyed(name: str, *rows: tuple[str, str, int, int]) -> Path:
    return trace(name, list(rows), f"id,{TRACE}")  # type: ignore[arg-type]


def test_a_key_is_the_identity_in_files_of_any_name_and_form(load: Any, used: Any) -> None:
    assert load(keyed("monday.csv", ("k1", *row(1)), ("k2", *row(1))), *KEYED)["new"] == (2, 0, 0)
    assert load(keyed("all.csv", ("k3", *row(3)), ("k2", *row(1)), ("k1", *row(1))), *KEYED)["new"] == (1, 2, 0)
    other_form = '{"id": "k1", "TIMESTAMP": "2023-11-16T18:00:01.97996Z", "ContextTokens": 100, "GeneratedTokens": 10}'
    Path("all.jsonl").write_text(other_form)
    assert load(Path("all.jsonl"), *KEYED)["new"] == (0, 1, 0)
    assert used() == (3, 300, 30)


def test_one_key_twice_in_a_file_is_one_event(load: Any, used: Any) -> None:
    assert load(keyed("a.csv", ("k1", *row(1)), ("k1", *row(1))), *KEYED)["new"] == (1, 1, 0)
    assert used()[0] == 1


def test_one_key_with_other_values_is_refused_with_the_reason(load: Any, used: Any) -> None:
    report = load(keyed("a.csv", ("k1", *row(1)), ("k1", *row(1, read=101)), ("k2", *row(2))), *KEYED)
    assert report["new"] == (2, 0, 1)
    assert rejects_of(report) == [(2, "idempotency_key: 'k1' was imported before with other values")]
    assert load(keyed("b.csv", ("k2", *row(9))), *KEYED)["new"] == (0, 0, 1)
    assert used() == (2, 200, 20)


def test_a_key_belongs_to_its_account_and_line(load: Any) -> None:
    path = keyed("a.csv", ("k1", *row(1)))
    assert load(path, *KEYED)["new"] == (1, 0, 0)
    assert load(path, *MAPPED, "--map", "idempotency_key=id", "--account", "acme", "--line", "x")["new"] == (1, 0, 0)


def test_bad_rows_are_set_aside_with_number_and_reason(load: Any, used: Any) -> None:
    path = trace("code.csv", [row(1), ("soon", 1, 1), row(2), row(3, read=-1), row(4, read=2**53 + 1), ("", 1, 1)])
    with path.open("a") as file:
        file.write("2023-11-16,1\n\n2023-11-16,true,1\n2023-11-16,nan,1\n2023-11-16,1,inf\n2023-11-16,5,5\n")
    report = load(path)
    assert report["new"] == (3, 0, 8)
    assert [(number, reason.partition(", expected")[0]) for number, reason in rejects_of(report)] == [
        (2, "occurred_at: got 'soon'"),
        (4, "input_tokens: got -1"),
        (5, "input_tokens: got 9007199254740993"),
        (6, "occurred_at: got None"),
        (7, "the row has 2 columns, the header 3"),
        (8, "input_tokens: got 'true'"),
        (9, "input_tokens: got 'nan'"),
        (10, "output_tokens: got 'inf'"),
    ]
    assert used() == (3, 205, 25)


def test_the_rejects_file_goes_when_nothing_is_refused_any_more(load: Any) -> None:
    refused = Path(load(trace("code.csv", [row(1), row(2, read=-1)]))["rejects_file"])
    refused.with_name(refused.name + ".partial").write_text("of a killed import")
    report = load(trace("code.csv", [row(1), row(2)]))
    assert (report["new"], report["rejects_file"]) == ((1, 1, 0), None)
    assert list(refused.parent.iterdir()) == []


def test_files_of_one_name_have_rejects_of_their_own(load: Any) -> None:
    for folder in ("east", "west"):
        Path(folder).mkdir()
        trace(f"{folder}/usage.csv", [row(1, read=-1)])
    east, west = (Path(load(Path(f"{folder}/usage.csv"))["rejects_file"]) for folder in ("east", "west"))
    assert east != west
    assert east.exists()


def test_rejects_that_cannot_be_written_are_an_error(tallystick: Any, load: Any) -> None:
    Path("file").touch()
    assert load(trace("fine.csv", [row(1)]), "--rejects", "file")["new"] == (1, 0, 0)
    answer = tallystick("import", trace("bad.csv", [row(1, read=-1)]), *AS_ACME, "--rejects", "file")
    assert answer.status == 1
    assert "refused rows cannot be written here" in answer.err


def test_the_file_itself_is_no_place_for_rejects(meter: Meter) -> None:
    path = trace("code.csv", [row(1)])
    with pytest.raises(InvalidSetting, match="--rejects"):
        importer(meter, account="acme").run(path, rejects=Path("code.csv"))
    assert path.exists()


def importer(meter: Meter, **constants: str) -> Importer:
    return Importer(
        meter.ledger,
        meter.accounts,
        mapping={"occurred_at": "TIMESTAMP", "input_tokens": "ContextTokens", "output_tokens": "GeneratedTokens"},
        constants={"line": "chat", **constants},
        clock=lambda: datetime(2026, 3, 12, tzinfo=UTC),
    )


def test_imports_ask_no_limit_and_move_no_counter(meter: Meter, clock: Any) -> None:
    secret = meter.keys.create("acme", plan="free").secret
    meter.consume(secret, line="chat")
    now = clock.now.replace(tzinfo=None)
    path = trace("code.csv", [(f"{now + timedelta(seconds=second)}", 1, 1) for second in range(1_100)])
    report = importer(meter, account="acme").run(path, rejects=Path("rejects.csv"))
    assert (report.inserted, report.rejects_file) == (1_100, None)
    assert [(status.used, status.max) for status in meter.quota("acme")] == [(1, 1_000)]
    with meter.ledger.read() as connection:
        assert [row.used for row in connection.execute(sa.select(counters))] == [1]
    assert all(check.agrees for check in check_counters(meter.ledger))
    assert meter.consume(secret, line="chat").allowed


def test_each_event_has_the_plan_version_in_force_when_it_occurred(meter: Meter) -> None:
    change = datetime(2023, 11, 16, 18, 1, tzinfo=UTC)
    for maximum in (5, 6):
        text = f'[plans.x]\nretention_days = 7\nlimits = [{{ metric = "requests", per = "month", max = {maximum} }}]\n'
        with meter.ledger.write() as connection:
            plan_versions.apply(connection, parse_plans(text).values(), now=change, actor="test", effective_from=change)
    meter.accounts.create("acme", plan="x")
    path = trace("code.csv", [row(61), row(59), row(0), (f"{change:%Y-%m-%d %H:%M:%S}", 1, 1)])
    importer(meter, account="acme").run(path, rejects=Path("rejects.csv"))
    with meter.ledger.read() as connection:
        versions = {version.plan_version: version.version for version in plan_versions.versions(connection)}
        found = connection.execute(sa.select(events.c.plan_version).order_by(events.c.occurred_at)).scalars()
        assert [versions[number] for number in found] == [1, 1, 2, 2]


def test_memory_does_not_grow_with_the_file(meter: Meter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "ROWS_PER_COMMIT", 200)
    peaks = []
    for count in (1_000, 4_000):
        path = trace(f"{count}.csv", [(*row(second % 3_600)[:2], second) for second in range(count)])
        tracemalloc.start()
        importer(meter, account="acme", plan="pro").run(path, rejects=Path("rejects.csv"))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] < 20_000_000


def test_progress_rises_to_the_end(meter: Meter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "ROWS_PER_COMMIT", 10)
    seen: list[float] = []
    path = trace("code.csv", [row(second) for second in range(35)])
    importer(meter, account="acme", plan="pro").run(path, rejects=Path("rejects.csv"), progress=seen.append)
    assert seen == sorted(set(seen))
    assert (len(seen), seen[-1]) == (4, 1.0)
