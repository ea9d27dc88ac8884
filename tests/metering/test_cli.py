"""The command line: what each command does, says and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from metering import Meter, TokenUsage
from metering.console import _cell
from metering.errors import RevokedKey
from metering.ledger import SCHEMA
from metering.ledger.schema import counters

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.servers import PostgresServer

PLANS = """
[plans.team]
retention_days = 30
limits = [{ metric = "requests", per = "month", max = 5 }]
"""
SECRET = "sk-issued-elsewhere-1234"


@pytest.fixture
def app(ledger_url: str, tallystick: Any) -> Any:
    """A meter beside the command line, on the same ledger and the machine's clock."""
    with Meter(ledger_url) as meter:
        yield meter


def test_the_first_day(command: Callable[..., Any]) -> None:
    refused = command("usage", "acme")
    assert (refused.status, refused.out) == (1, "")
    assert refused.err == "error: ledger .tallystick/ledger.db: cannot be opened; `tallystick init` creates it\n"
    assert command("init").out == (
        "ledger .tallystick/ledger.db created\nplans built in: free, pro, premium, enterprise\n"
    )
    assert command("init").out == "ledger .tallystick/ledger.db is there already\n"
    assert command("doctor").status == 0
    assert command("migrate").out == f"ledger .tallystick/ledger.db is at schema {SCHEMA}\n"


def test_init_takes_the_plans_of_the_file(command: Callable[..., Any]) -> None:
    Path("plans.toml").write_text(PLANS)
    assert command("init").out.endswith("plans from plans.toml\n")
    assert command("accounts", "create", "acme", "--plan", "team").status == 0


def test_init_with_a_malformed_file_makes_no_ledger(command: Callable[..., Any]) -> None:
    Path("plans.toml").write_text("[plans.team]\nlimits = 3\n")
    answer = command("init")
    assert (answer.status, answer.out) == (1, "")
    assert "(line " in answer.err
    Path("plans.toml").write_text(PLANS)
    assert command("init").out.endswith("plans from plans.toml\n")


def test_migrate_makes_no_ledger_where_there_is_none(command: Callable[..., Any], monkeypatch: Any) -> None:
    monkeypatch.setenv("METERING_HOME", "elsewhere")
    assert command("migrate").status == 1
    assert not Path("elsewhere").exists()


def test_migrate_writes_the_plans_of_a_new_ledger_on_a_server(
    command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, postgres: PostgresServer
) -> None:
    url = postgres.database()
    monkeypatch.setenv("METERING_LEDGER_URL", url)
    Path("plans.toml").write_text(PLANS)
    assert command("doctor").status == 1
    assert command("migrate").status == 0
    assert command("accounts", "create", "acme", "--plan", "team").status == 0
    postgres.drop(url)


def test_plans_are_applied_once_and_listed(tallystick: Any) -> None:
    Path("mine.toml").write_text(PLANS)
    assert tallystick("plans", "apply", "mine.toml").out == "plan team: version 1 from 1970-01-01 00:00Z\n"
    assert tallystick("plans", "apply", "mine.toml").out.startswith("nothing to do")
    Path("mine.toml").write_text(PLANS.replace("max = 5", "max = 6"))
    applied = tallystick("plans", "apply", "mine.toml", "--effective-from", "2024-02-01T00:00+13:00")
    assert applied.out == "plan team: version 2 from 2024-01-31 11:00Z\n"
    listed = tallystick("plans", "list", "--json").json
    assert [(plan["plan"], plan["version"]) for plan in listed][:2] == [("team", 1), ("team", 2)]
    assert listed[1]["limits"] == ["6 requests per month"]
    assert {plan["plan"] for plan in listed[2:]} == {"free", "pro", "premium", "enterprise"}


def test_plans_that_cannot_be_applied_are_refused(tallystick: Any) -> None:
    answer = tallystick("plans", "apply", "mine.toml")
    assert answer.err.startswith("error: plans: got 'mine.toml', expected a readable file")
    Path("mine.toml").write_text(PLANS + 'rates = [{ metric = "spend" }]\n')
    answer = tallystick("plans", "apply", "mine.toml")
    assert (answer.status, answer.err.count("\n")) == (1, 1)
    assert "plans.team.rates[0]" in answer.err
    assert all(plan["version"] == "built in" for plan in tallystick("plans", "list", "--json").json)


def test_accounts_are_created_listed_moved_and_updated(tallystick: Any) -> None:
    create = ("accounts", "create", "acme", "--plan", "free", "--time-zone", "Asia/Kolkata", "--anchor-day", "15")
    (created,) = tallystick(*create, "--name", "Acme", "--address", "1 Road", "--address", "Pune", "--json").json
    assert (created["plan"], created["address"], created["anchor_day"]) == ("free", ["1 Road", "Pune"], 15)
    assert tallystick("accounts", "create", "acme", "--plan", "pro").err == (
        "error: account 'acme' exists already, on plan 'free'\n"
    )
    assert tallystick("accounts", "change-plan", "acme", "--plan", "pro").out == "account acme is on plan pro\n"
    (updated,) = tallystick("accounts", "update", "acme", "--name", "Acme Ltd", "--json").json
    assert (updated["name"], updated["address"], updated["time_zone"]) == (
        "Acme Ltd",
        ["1 Road", "Pune"],
        "Asia/Kolkata",
    )
    assert tallystick("accounts", "list", "--json").json == [{**updated, "plan": "pro"}]
    assert "Acme Ltd" in tallystick("accounts", "list").out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("accounts", "create", "acme", "--plan", "gold"), "plan 'gold' is not known; known plans: "),
        (("accounts", "create", "acme", "--plan", "pro", "--time-zone", "Mars"), "time_zone: got 'Mars', expected "),
        (("accounts", "create", "acme", "--plan", "pro", "--anchor-day", "32"), "anchor_day: got 32, expected "),
        (("accounts", "create", "", "--plan", "pro"), "account: got '', expected 1 to 255 characters"),
        (("accounts", "change-plan", "nobody", "--plan", "pro"), "account 'nobody' is not known: create it with "),
        (("accounts", "update", "nobody"), "account 'nobody' is not known"),
        (("keys", "create", "nobody"), "plan: got None, expected a plan, because account 'nobody' is new"),
        (("keys", "revoke", "key_0"), "no API key has the id 'key_0'"),
        (("keys", "rotate", "key_0"), "no API key has the id 'key_0'"),
        (("keys", "rotate", "key_0", "--grace-hours", "nan"), "--grace-hours: got nan, expected 0 to 8784 hours"),
        (("keys", "rotate", "key_0", "--grace-hours", "-1"), "--grace-hours: got -1.0, expected 0 to 8784 hours"),
        (("usage", "nobody"), "account 'nobody' is not known"),
        (("usage", "acme", "--by", "colour"), "by: got 'colour', expected one of line, model, "),
        (("usage", "acme", "--start", "soon"), "--start: got 'soon', expected a time such as 2023-11-01 or "),
        (("usage", "acme", "--end", "0001-01-01T00:00+14:00"), "--end: got '0001-01-01T00:00+14:00', expected a time"),
        (("quota", "nobody"), "account 'nobody' is not known"),
        (("log",), "account: got None, expected an account or a key_id"),
        (("log", "acme", "--limit", "0"), "--limit: got 0, expected 1 to 10000"),
        (("log", "--admin", "--limit", "-1"), "--limit: got -1, expected 1 to 10000"),
        (("log", "acme", "--admin"), "--admin: got True, expected no account, key or time beside it"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(tallystick: Any, arguments: tuple[str, ...], expected: str) -> None:
    answer = tallystick(*arguments)
    assert (answer.status, answer.out, answer.err.count("\n")) == (1, "", 1)
    assert answer.err.startswith(f"error: {expected}")


def test_a_secret_is_shown_once_and_nowhere_else(tallystick: Any, ledger_url: str, app: Meter) -> None:
    (created,) = tallystick("keys", "create", "acme", "--plan", "pro", "--label", "ci", "--json").json
    assert app.authenticate(created["secret"]).key_id == created["key_id"]
    shown = tallystick("keys", "rotate", created["key_id"], "--grace-hours", "1")
    assert shown.out.count("tsk_") == 1
    rotated = next(word for word in shown.out.split() if word.startswith("tsk_"))
    adopted = tallystick("keys", "adopt", "acme", "--json", stdin=SECRET + "\n")
    assert SECRET not in adopted.out
    app.consume(SECRET, line="chat", request={"prompt": f"my key is {SECRET}"}, error=f"bad key {SECRET}")
    secrets = [created["secret"], rotated, SECRET]
    for arguments in (
        ("keys", "list", "--json"),
        ("keys", "list", "acme"),
        ("accounts", "list", "--json"),
        ("log", "acme", "--json"),
        ("log", "--admin", "--json"),
        ("usage", "acme", "--json"),
        ("doctor", "--json"),
        ("keys", "adopt", "acme"),
    ):
        answer = tallystick(*arguments, stdin=SECRET)
        assert answer.status == 0
        assert not any(secret in answer.out + answer.err for secret in secrets)
    app.close()
    database = Path(ledger_url.removeprefix("sqlite:///"))
    kept = b"".join(path.read_bytes() for path in database.parent.glob(f"{database.name}*"))
    assert not any(secret.encode() in kept for secret in secrets)


def test_keys_are_adopted_listed_rotated_and_revoked(tallystick: Any, app: Meter) -> None:
    (adopted,) = tallystick("keys", "adopt", "acme", "--plan", "pro", "--json", stdin=SECRET + "\r\n").json
    assert tallystick("keys", "adopt", "acme", "--plan", "free", "--json", stdin=SECRET).json == [adopted]
    assert app.authenticate(SECRET).key_id == adopted["key_id"]
    (rotated,) = tallystick("keys", "rotate", adopted["key_id"], "--json").json
    assert [key["key_id"] for key in tallystick("keys", "list", "acme", "--json").json] == [
        adopted["key_id"],
        rotated["key_id"],
    ]
    assert tallystick("keys", "list", "nobody", "--json").json == []
    assert tallystick("keys", "revoke", rotated["key_id"]).out == f"key {rotated['key_id']} is revoked\n"
    assert tallystick("keys", "rotate", rotated["key_id"]).err == (
        f"error: API key {rotated['key_id']} of account 'acme' is no longer valid\n"
    )


@pytest.mark.parametrize("secret", ["", "\n", "short\n", "x" * 513])
def test_a_secret_that_is_none_is_refused_and_not_repeated(tallystick: Any, secret: str) -> None:
    answer = tallystick("keys", "adopt", "acme", "--plan", "pro", stdin=secret)
    assert answer.err.startswith("error: secret: got '(not shown)', expected 16 to 512 ")
    assert tallystick("accounts", "list", "--json").json == []


def test_usage_is_totalled_cut_and_grouped(tallystick: Any) -> None:
    rows = ["occurred_at,account,line,input_tokens,quantity"]
    rows += [f"2023-11-{day:02d}T23:30:00Z,acme,{line},{day},0.1" for day in (1, 2, 3) for line in ("a", "b")]
    Path("usage.csv").write_text("\n".join(rows))
    tallystick("import", "usage.csv", "--plan", "pro")
    (total,) = tallystick("usage", "acme", "--json").json
    assert (total["requests"], total["input_tokens"], total["quantity"]) == (6, 12, "0.6")
    cut = tallystick(
        "usage", "acme", "--start", "2023-11-02", "--end", "2023-11-04T12:30+13:00", "--by", "line", "--json"
    )
    assert [(part["group"], part["requests"], part["input_tokens"]) for part in cut.json] == [("a", 1, 2), ("b", 1, 2)]
    by_day = tallystick("usage", "acme", "--by", "day").out
    assert all(day in by_day for day in ("2023-11-01", "2023-11-02", "2023-11-03"))


def test_quota_shows_where_limits_stand(tallystick: Any, app: Meter) -> None:
    secret = app.keys.create("acme", plan="free").secret
    for _ in range(3):
        app.consume(secret, line="chat")
    (limit,) = tallystick("quota", "acme", "--json").json
    assert (limit["used"], limit["max"], limit["remaining"]) == (3, 1_000, 997)
    assert datetime.fromisoformat(limit["reset_at"]).day == 1
    assert "997" in tallystick("quota", "acme").out


def test_the_log_is_cut_by_account_key_time_and_number(tallystick: Any, app: Meter) -> None:
    first, second = (app.keys.create("acme", plan="pro") for _ in range(2))
    before = datetime.now(UTC).isoformat()
    for number in range(3):
        app.consume(first.secret, line="chat", request={"number": number}, latency_ms=number, error="late")
    app.consume(second.secret, line="chat", request={"number": 3})
    app.consume(app.keys.create("zeta", plan="pro").secret, line="chat", request={"number": 4})

    def numbers(*arguments: str) -> list[int]:
        return [entry["request"]["number"] for entry in tallystick("log", *arguments, "--json").json]

    assert numbers("acme") == [3, 2, 1, 0]
    assert numbers("acme", "--limit", "2") == [3, 2]
    assert numbers("--key-id", first.key_id) == [2, 1, 0]
    assert numbers("acme", "--key-id", second.key_id) == [3]
    assert numbers("acme", "--start", before) == [3, 2, 1, 0]
    assert numbers("acme", "--end", before) == []
    newest = tallystick("log", "--key-id", first.key_id, "--json").json[0]
    assert (newest["error"], newest["latency_ms"], newest["account"]) == ("late", 2, "acme")
    assert "late" in tallystick("log", "acme").out


def test_the_admin_log_says_who_changed_what(tallystick: Any) -> None:
    (key,) = tallystick("keys", "create", "acme", "--plan", "pro", "--json").json
    tallystick("accounts", "change-plan", "acme", "--plan", "free")
    tallystick("keys", "revoke", key["key_id"])
    entries = tallystick("log", "--admin", "--json").json
    assert [(entry["action"], entry["subject"]) for entry in entries][:2] == [
        ("key.revoke", key["key_id"]),
        ("account.change_plan", "acme"),
    ]
    assert entries[1]["details"]["after"] == "free"
    assert all(entry["actor"] for entry in entries)
    assert len(tallystick("log", "--admin", "--limit", "1", "--json").json) == 1


def test_verify_says_which_counter_differs(tallystick: Any, app: Meter) -> None:
    secret = app.keys.create("acme", plan="pro").secret
    app.consume(secret, line="chat", usage=TokenUsage(input_tokens=5))
    assert tallystick("verify").out == "1 counters, 0 differ from the ledger\n"
    assert tallystick("verify", "--json").json == []
    with app.ledger.write() as connection:
        connection.execute(counters.update().values(used=7))
    answer = tallystick("verify", "--json")
    (wrong,) = answer.json
    assert answer.status == 1
    assert (wrong["account"], wrong["metric"], wrong["kept"], wrong["counted"]) == ("acme", "requests", "7", "1")
    assert wrong["window_start"].endswith("-01T00:00:00Z")
    shown = tallystick("verify")
    assert (shown.status, "acme" in shown.out, shown.out.endswith("1 counters, 1 differ from the ledger\n")) == (
        1,
        True,
        True,
    )
    doctor = tallystick("doctor", "--json")
    assert (doctor.status, [finding["what"] for finding in doctor.json if not finding["ok"]]) == (1, ["counters"])


def test_what_people_write_is_shown_as_they_wrote_it(tallystick: Any) -> None:
    for account in ("[red]", "[/x]"):
        tallystick("accounts", "create", account, "--plan", "pro", "--name", "[bold]a[/bold]")
    out = tallystick("accounts", "list").out
    assert all(text in out for text in ("[red]", "[/x]", "[bold]a[/bold]"))


def test_cells_are_for_people() -> None:
    at = datetime(2023, 11, 16, 18, 17, 3, tzinfo=UTC)
    values = [None, at, 1_234_567, True, ["a", "b"], [], "1e3"]
    assert list(map(_cell, values)) == ["-", "2023-11-16 18:17:03Z", "1,234,567", "True", "a\nb", "-", "1e3"]


def test_help_is_light() -> None:
    """What is imported, and not the time it takes: a busy machine must not decide."""
    for arguments in ([], ["import"], ["keys", "rotate"]):
        script = (
            "import sys\nfrom metering.cli import main\n"
            f"sys.argv = ['tallystick', *{arguments!r}, '--help']\n"
            "try:\n    main()\nexcept SystemExit as ended:\n    assert not ended.code\n"
            "import json; print(json.dumps(sorted(sys.modules)), file=sys.stderr)"
        )
        ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
        heavy = {"sqlalchemy", "alembic", "pyarrow", "msgspec", "rich.markdown", "rich.console", "metering.meter"}
        assert heavy.isdisjoint(json.loads(ran.stderr))
        assert ran.stdout.startswith("Usage: tallystick")


def test_legal_holds(command: Callable[..., Any], app: Meter) -> None:
    app.accounts.create("acme", plan="pro")
    assert command("accounts", "hold", "acme", "--reason", "case 4711").out.startswith(
        "account acme is on legal hold since "
    )
    again = command("accounts", "hold", "acme", "--reason", "again")
    assert (again.status, again.out) == (1, "")
    assert again.err.startswith("error: account 'acme' is on hold since ")
    assert command("accounts", "release", "acme").out.startswith("account acme is released; it was on legal hold since")
    assert command("accounts", "release", "acme").err == "error: account 'acme' is not on hold\n"
    [hold] = json.loads(command("accounts", "holds", "--json").out)
    assert (hold["account"], hold["reason"], hold["released_by"]) == ("acme", "case 4711", hold["placed_by"])


def test_erasing_asks_first(command: Callable[..., Any], app: Meter) -> None:
    secret = app.keys.create("acme", plan="pro", label="Ann").secret
    app.consume(secret, line="a", request="hello")
    shown = command("erase", "acme", "--dry-run").out
    assert "request log" in shown
    assert "kept as evidence of the bills" in shown
    assert app.authenticate(secret)
    refused = command("erase", "acme")
    assert refused.status == 1
    assert app.authenticate(secret)
    assert command("erase", "acme", "--yes").out.endswith("account acme is erased, but for what stays\n")
    with pytest.raises(RevokedKey):
        app.authenticate(secret)
    assert app.log("acme") == []
    parts = json.loads(command("erase", "acme", "--json").out)
    assert {part["becomes"] for part in parts} == {"stays"}
