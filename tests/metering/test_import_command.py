"""`tallystick import`: its options, what it says, and what it refuses before a row is written."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from metering import importing
from metering.ledger import Ledger
from metering.ledger.schema import accounts, events

if TYPE_CHECKING:
    from collections.abc import Callable

FILE = "at,who,what,in,out,llm\n2023-11-16 18:17:03.9799600,acme,chat,100,10,gpt\n"
MAPPED = "occurred_at=at,account=who,line=what,input_tokens=in"


@pytest.fixture
def usage() -> Path:
    path = Path("usage.csv")
    path.write_text(FILE)
    return path


@pytest.fixture
def contents(ledger_url: str) -> Callable[[], list[tuple[Any, ...]]]:
    """What is in the ledger: account, line, provider, model and tokens of every event."""

    def read() -> list[tuple[Any, ...]]:
        ledger = Ledger(ledger_url)
        columns = ("account", "line", "provider", "model", "input_tokens", "output_tokens")
        with ledger.read() as connection:
            found = [tuple(row) for row in connection.execute(sa.select(*(events.c[name] for name in columns)))]
        ledger.close()
        return found

    return read


@pytest.mark.parametrize(
    "mapped",
    [
        ("--map", f"{MAPPED},output_tokens=out"),
        ("--map", MAPPED, "--map", "output_tokens=out"),
        ("--map", f" occurred_at = at ,{MAPPED}", "--map", "output_tokens=out"),
    ],
)
def test_columns_are_mapped_in_one_list_or_many(
    tallystick: Any, usage: Path, contents: Any, mapped: tuple[str, ...]
) -> None:
    answer = tallystick("import", usage, *mapped, "--plan", "pro", "--json")
    assert (answer.status, answer.json[0]["inserted"], answer.json[0]["accounts_created"]) == (0, 1, ["acme"])
    assert contents() == [("acme", "chat", None, None, 100, 10)]


def test_constants_give_what_the_file_lacks(tallystick: Any, usage: Path, contents: Any) -> None:
    constants = (
        "--account",
        "zeta",
        "--line",
        "search",
        "--provider",
        "openai",
        "--model",
        "gpt-4.1",
        "--plan",
        "free",
    )
    assert tallystick("import", usage, "--map", "occurred_at=at", *constants).status == 0
    assert contents() == [("zeta", "search", "openai", "gpt-4.1", 0, 0)]
    assert tallystick("accounts", "list", "--json").json[0]["plan"] == "free"


@pytest.mark.parametrize("as_json", [(), ("--json",)])
def test_times_without_a_zone_are_said_to_be_utc(tallystick: Any, usage: Path, as_json: tuple[str, ...]) -> None:
    answer = tallystick("import", usage, "--map", MAPPED, "--plan", "pro", *as_json)
    assert answer.err == "times without a zone were read as UTC\n"
    assert "zoneless_times" in answer.out
    usage.write_text(FILE.replace("9799600", "9799600Z"))
    answer = tallystick("import", usage, "--map", MAPPED, *as_json)
    assert answer.err == ""


COLUMNS = "at, who, what, in, out, llm"
REFUSED = {
    "a column that is not there": (
        ["--map", f"{MAPPED},output_tokens=outt"],
        f"--map: got 'output_tokens=outt', expected a column of the file: {COLUMNS}",
    ),
    "no time": (
        ["--account", "a", "--line", "l"],
        f"occurred_at: got None, expected --map occurred_at=COLUMN, with a column of the file: {COLUMNS}",
    ),
    "no account": (
        ["--map", "occurred_at=at", "--line", "l"],
        "account: got None, expected --account NAME or --map account=COLUMN, with a column of the file",
    ),
    "an unknown field": (["--map", "tokens=in"], "--map: got 'tokens', expected one of account, plan, line, "),
    "no column": (["--map", "occurred_at"], "--map: got 'occurred_at', expected FIELD=COLUMN"),
    "nothing": (["--map", f"{MAPPED},"], "--map: got '', expected FIELD=COLUMN"),
    "two columns": (
        ["--map", f"{MAPPED},input_tokens=out"],
        "--map: got 'input_tokens=out', expected one column for input_tokens, which is mapped already",
    ),
    "column and constant": (
        ["--map", MAPPED, "--line", "l"],
        "--map: got 'line', expected either a column or a constant for line, not both",
    ),
    "an empty constant": (["--map", "occurred_at=at", "--account", ""], "--account: got '', expected 1 to 255"),
    "a long line": (
        ["--map", "occurred_at=at", "--account", "a", "--line", "l" * 65],
        f"--line: got '{'l' * 65}', expected 1 to 64 characters (got 65)",
    ),
    "a source that is none": (["--map", MAPPED, "--source", "a\nb"], "--source: got 'a\\nb', expected printable"),
    "an unknown plan": (["--map", MAPPED, "--plan", "gold"], "plan 'gold' is not known; known plans: enterprise, free"),
}


@pytest.mark.parametrize("options", REFUSED)
def test_what_is_asked_wrongly_is_refused_before_a_row_is_written(
    tallystick: Any, usage: Path, contents: Any, options: str
) -> None:
    given, expected = REFUSED[options]
    answer = tallystick("import", usage, *given)
    assert (answer.status, answer.out, answer.err.count("\n")) == (1, "", 1)
    assert answer.err.startswith(f"error: {expected}")
    assert contents() == []
    assert tallystick("accounts", "list", "--json").json == []


def test_a_misspelt_column_of_json_lines_is_refused_too(tallystick: Any, contents: Any) -> None:
    row = {"at": "2023-11-16", "who": "acme", "what": "chat", "in": 5}
    Path("usage.jsonl").write_text(json.dumps(row))
    answer = tallystick("import", "usage.jsonl", "--map", f"{MAPPED}x", "--plan", "pro")
    assert answer.err == "error: --map: got 'input_tokens=inx', expected a column of the file: at, who, what, in\n"
    assert contents() == []


def test_an_account_that_is_not_known_needs_a_plan(tallystick: Any, usage: Path, contents: Any) -> None:
    answer = tallystick("import", usage, "--map", MAPPED, "--json")
    assert answer.status == 3
    reason = "account: 'acme' is not known; --plan NAME creates it"
    assert f"1,{reason}," in Path(answer.json[0]["rejects_file"]).read_text()
    assert (contents(), tallystick("accounts", "list", "--json").json) == ([], [])
    assert tallystick("import", usage, "--map", MAPPED, "--plan", "pro").status == 0
    assert len(contents()) == 1


def test_an_unknown_plan_in_a_row_refuses_that_row_alone(tallystick: Any, contents: Any) -> None:
    rows = [
        "occurred_at,account,line,plan",
        "2023-11-16,a,chat,pro",
        "2023-11-16,b,chat,gold",
        "2023-11-16,c,chat,free",
    ]
    Path("usage.csv").write_text("\n".join(rows))
    answer = tallystick("import", "usage.csv", "--json")
    assert (answer.status, answer.json[0]["accounts_created"]) == (3, ["a", "c"])
    assert "2,\"plan 'gold' is not known; known plans:" in Path(answer.json[0]["rejects_file"]).read_text()
    assert [row[0] for row in contents()] == ["a", "c"]
    assert [account["account"] for account in tallystick("accounts", "list", "--json").json] == ["a", "c"]


def test_what_was_imported_is_said_also_when_a_later_file_fails(tallystick: Any, usage: Path, contents: Any) -> None:
    answer = tallystick("import", usage, "missing.csv", "--map", MAPPED, "--plan", "pro", "--json")
    assert (answer.status, [report["source"] for report in answer.json]) == (1, ["usage"])
    assert answer.err.endswith("error: missing.csv: cannot be read: No such file or directory\n")
    assert len(contents()) == 1


def test_a_batch_that_fails_leaves_nothing_of_itself(
    tallystick: Any, contents: Any, ledger_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importing, "ROWS_PER_COMMIT", 2)
    Path("usage.csv").write_text(
        "occurred_at,account,line,input_tokens\n" + "".join(f"2023-11-16,acme,chat,{count}\n" for count in range(1, 7))
    )
    ledger = Ledger(ledger_url)
    with ledger.write() as connection:
        connection.exec_driver_sql(
            "CREATE TRIGGER full BEFORE INSERT ON events WHEN NEW.input_tokens = 4 BEGIN SELECT raise(ABORT, 'no'); END"
        )
    answer = tallystick("import", "usage.csv", "--plan", "pro")
    assert answer.status == 1
    assert [row[4] for row in contents()] == [1, 2]
    with ledger.write() as connection:
        connection.exec_driver_sql("DROP TRIGGER full")
    ledger.close()
    assert tallystick("import", "usage.csv", "--json").json[0]["inserted"] == 4
    assert [row[4] for row in contents()] == [1, 2, 3, 4, 5, 6]


def test_the_progress_bar_is_for_terminals(usage: Path, ledger_url: str, contents: Any) -> None:
    """On a terminal a bar, which leaves standard output to the report; elsewhere nothing."""
    Path("[red].csv").write_text(FILE)
    script = [sys.executable, "-m", "metering.cli", "import", "[red].csv", "--map", MAPPED, "--plan", "pro", "--json"]
    environment = {**os.environ, "METERING_LEDGER_URL": ledger_url, "TERM": "xterm", "COLUMNS": "100"}
    ours, theirs = pty.openpty()
    shown = subprocess.run(script, env=environment, stdout=subprocess.PIPE, stderr=theirs, check=True, timeout=60)
    os.close(theirs)
    bar = os.read(ours, 100_000).decode()
    os.close(ours)
    assert "[red].csv" in bar
    assert "100%" in bar
    assert json.loads(shown.stdout)[0]["inserted"] == 1
    again = subprocess.run(script, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert (json.loads(again.stdout)[0]["known"], again.stderr) == (1, "times without a zone were read as UTC\n")


def test_a_newer_schema_is_refused(tallystick: Any, usage: Path, ledger_url: str) -> None:
    ledger = Ledger(ledger_url)
    with ledger.write() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    ledger.close()
    answer = tallystick("import", usage, "--map", MAPPED, "--plan", "pro")
    assert (answer.status, answer.out) == (1, "")
    assert "schema 9999 is newer than" in answer.err


@pytest.mark.parametrize("content", [None, b"", b"noise" * 2_000])
def test_a_ledger_that_cannot_be_read_is_refused(
    command: Any, usage: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    monkeypatch.setenv("METERING_LEDGER_URL", "sqlite:///mine.db")
    if content is not None:
        Path("mine.db").write_bytes(content)
    answer = command("import", usage, "--map", MAPPED, "--plan", "pro")
    assert (answer.status, answer.out, answer.err.count("\n")) == (1, "", 1)
    assert answer.err.startswith("error: ledger mine.db: ")


def test_many_new_accounts_at_once(tallystick: Any, ledger_url: str) -> None:
    rows = [f"2023-11-16,account-{number:03d},chat" for number in range(300)]
    Path("usage.csv").write_text("\n".join(["occurred_at,account,line", *rows]))
    created = tallystick("import", "usage.csv", "--plan", "pro", "--json").json[0]["accounts_created"]
    assert created == [f"account-{number:03d}" for number in range(300)]
    ledger = Ledger(ledger_url)
    with ledger.read() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(accounts)).scalar() == 300
    ledger.close()
