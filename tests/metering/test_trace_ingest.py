"""Files of spans into the ledger: each span once, none of their texts, and the rest kept when one is refused."""

from __future__ import annotations

import gzip
import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metering.errors import InvalidFile, InvalidSetting, InvalidUsage
from metering.ledger.schema import spans
from metering.traces import importing, keeping, otlp, read_span, sum_trace_tokens
from metering.traces.importing import SpanImporter
from tests.metering.span_rows import ON_SQLITE, USED, contents, numbers

if TYPE_CHECKING:
    from collections.abc import Callable

    from metering.meter import Meter
    from tests.conftest import Clock

SECRET = "the patient said"


@pytest.fixture
def ledger_url(either_url: str) -> str:
    return either_url


def attribute(name: str, value: Any) -> dict[str, Any]:
    kind = "intValue" if isinstance(value, int) else "stringValue"
    return {"key": name, "value": {kind: str(value)}}


def otlp_span(number: int, parent: int | None = None, trace: int = 1, /, **attributes: Any) -> dict[str, Any]:
    return {
        "traceId": f"{trace:032X}",
        "spanId": f"{number:016x}",
        "parentSpanId": "" if parent is None else f"{parent:016x}",
        "name": f"span {number}",
        "kind": 3,
        "startTimeUnixNano": "1700000000123456789",
        "endTimeUnixNano": "1700000001000000000",
        "attributes": [attribute(name.replace("__", "."), value) for name, value in attributes.items()],
        "events": [{"name": "prompt", "attributes": [attribute("gen_ai.prompt", SECRET)]}],
    }


def chat(number: int, parent: int | None = None, trace: int = 1, /, **said: Any) -> dict[str, Any]:
    made = otlp_span(number, parent, trace, **said)
    texts = {"gen_ai.input.messages": SECRET, "gen_ai.response.model": "gpt-4.1", "gen_ai.provider.name": "openai"}
    made["attributes"] += [attribute(name, value) for name, value in (USED | texts).items()]
    return made


def document(*made: dict[str, Any], **resource: Any) -> dict[str, Any]:
    said = [attribute(name.replace("__", "."), value) for name, value in resource.items()]
    return {
        "resourceSpans": [
            {
                "resource": {"attributes": said},
                "scopeSpans": [{"scope": {"name": "openai"}, "spans": list(made), "schemaUrl": "x"}],
            }
        ]
    }


@pytest.fixture
def load(meter: Meter, clock: Clock) -> Callable[..., list[dict[str, Any]]]:
    """Imports texts or documents, each as a file; what the reports count."""

    def run(*files: Any, **options: Any) -> list[dict[str, Any]]:
        with SpanImporter(meter.ledger, clock=clock, **options) as importer:
            for number, file in enumerate(files):
                path = Path(f"{number}.json")
                text = file if isinstance(file, str | bytes) else json.dumps(file)
                path.write_bytes(text if isinstance(text, bytes) else text.encode())
                importer.run(path, rejects=Path(f"rejects/{number}.csv"))
        names = ("spans", "inserted", "known", "unneeded", "rejected")
        reports = [{name: getattr(report, name) for name in names} for report in importer.reports]
        for report in reports:
            assert report["spans"] == sum(report[name] for name in names[1:])
        return [{name: count for name, count in report.items() if count} for report in reports]

    return run


# What is kept


def test_a_span_as_it_lies_in_the_ledger(meter: Meter, load: Any, clock: Clock) -> None:
    said = chat(2, 1, gen_ai__usage__cache_read__input_tokens=4, gen_ai__usage__total_tokens=99)
    load(document(said, tallystick__account="acme", tallystick__run_id="run-7"))
    with meter.ledger.read() as connection:
        [row] = connection.execute(sa.select(*spans.c)).mappings()
    assert {name: value for name, value in row.items() if value not in (0, None) and name != "seq"} == {
        "trace_id": f"{1:032x}",
        "span_id": f"{2:016x}",
        "parent_span_id": f"{1:016x}",
        "run_id": "run-7",
        "account": "acme",
        "name": "span 2",
        "convention": "opentelemetry",
        "input_tokens": 10,
        "cache_read_tokens": 4,
        "output_tokens": 5,
        "provider": "openai",
        "model": "gpt-4.1",
        "started_at": row["started_at"],
        "ended_at": row["ended_at"],
        "recorded_at": clock.now,
        "flags": "mismatched_total",
    }
    assert str(row["started_at"]) == "2023-11-14 22:13:20.123456+00:00"
    assert SECRET not in str(contents(meter, *spans.c.keys()))


@pytest.mark.parametrize(
    ("said", "run_id"),
    [
        ({"session.id": "s", "gen_ai.conversation.id": "c", "tallystick.run_id": "r"}, "r"),
        ({"session.id": "s", "gen_ai.conversation.id": "c"}, "c"),
        ({"session.id": "s"}, "s"),
        ({}, "t"),
    ],
)
def test_which_run_a_span_is_of(said: dict[str, str], run_id: str) -> None:
    span = {"trace_id": "t", "span_id": "a", "attributes": said}
    assert keeping.kept_span(span).run_id == run_id
    assert keeping.kept_span(span, run_id="given").run_id == "given"


def test_the_sum_over_the_ledger_is_the_sum_over_the_spans(meter: Meter, load: Any) -> None:
    made = [otlp_span(1), chat(2, 1), otlp_span(3, 2), otlp_span(4, 3), chat(5, 4), chat(6, 4), otlp_span(7, 1)]
    load(document(*made))
    assert numbers(meter) == {1, 2, 3, 4, 5, 6}
    with meter.ledger.read() as connection:
        rows = list(connection.execute(sa.select(*spans.c)).mappings())
    kept = [
        {
            **{name: row[name] for name in ("trace_id", "span_id", "parent_span_id")},
            "attributes": {"gen_ai.usage.input_tokens": row["input_tokens"]} if row["convention"] else {},
        }
        for row in rows
    ]
    assert sum_trace_tokens(kept).input_tokens == sum_trace_tokens(made).input_tokens == 20


# Files


def test_the_same_file_twice_changes_nothing(meter: Meter, load: Any) -> None:
    file = document(otlp_span(1), chat(2, 1), otlp_span(3, 1), chat(2, 1))
    assert load(file) == [{"spans": 4, "inserted": 2, "known": 1, "unneeded": 1}]
    before = contents(meter, *spans.c.keys())
    assert load(file) == [{"spans": 4, "known": 3, "unneeded": 1}]
    assert contents(meter, *spans.c.keys()) == before


def test_what_is_above_is_kept_wherever_it_was_read(meter: Meter, load: Any) -> None:
    assert load(document(otlp_span(1), otlp_span(9)), document(otlp_span(2, 1)), document(chat(3, 2))) == [
        {"spans": 2, "inserted": 1, "unneeded": 1},
        {"spans": 1, "inserted": 1},
        {"spans": 1, "inserted": 1},
    ]
    load(document(chat(13, 12)))
    assert load(document(otlp_span(11), otlp_span(12, 11), otlp_span(12, 11))) == [
        {"spans": 3, "inserted": 2, "unneeded": 1}
    ]
    assert numbers(meter) == {1, 2, 3, 11, 12, 13}
    load(document(otlp_span(21, 22), otlp_span(22, 21), chat(23, 22)))
    assert {21, 22, 23} <= numbers(meter)


def test_an_interrupted_import_is_finished_by_the_next(
    meter: Meter, load: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importing, "SPANS_PER_COMMIT", 3)
    file = document(otlp_span(1), chat(2, 1), chat(3, 1), chat(4, 1), chat(5, 1))

    def interrupt(done: float) -> None:
        raise KeyboardInterrupt

    Path("0.json").write_text(json.dumps(file))
    with pytest.raises(KeyboardInterrupt), SpanImporter(meter.ledger, clock=clock) as importer:
        importer.run(Path("0.json"), rejects=Path("r"), progress=interrupt)
    assert numbers(meter) == {2, 3}
    assert load(file) == [{"spans": 5, "inserted": 3, "known": 2}]
    assert numbers(meter) == {1, 2, 3, 4, 5}


@ON_SQLITE
@pytest.mark.parametrize("form", ["lines", "compact", "indented", "gzipped lines", "gzipped", "two in one", "bom"])
def test_every_form_of_a_file(meter: Meter, load: Any, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otlp, "PIECE", 7)
    monkeypatch.setattr(importing, "SPANS_PER_COMMIT", 2)
    docs = [document(chat(1), chat(2)), document(chat(3, name='ünïcode \u2028 \\ " }]')), document()]
    lines = "\r\n".join(json.dumps(doc, ensure_ascii=False) for doc in docs) + "\n\n"
    merged = {"other": [1, {}], "resourceSpans": [part for doc in docs for part in doc["resourceSpans"]]}
    texts: dict[str, str | bytes] = {
        "lines": lines,
        "compact": json.dumps(merged),
        "indented": json.dumps(merged, indent=1, ensure_ascii=False),
        "gzipped lines": gzip.compress(lines.encode()),
        "gzipped": gzip.compress(json.dumps(merged, indent=2).encode()),
        "two in one": json.dumps(docs[0], indent=1) + json.dumps(docs[1], indent=1),
        "bom": b"\xef\xbb\xbf" + lines.encode(),
    }
    assert load(texts[form]) == [{"spans": 3, "inserted": 3}]
    assert numbers(meter) == {1, 2, 3}


@ON_SQLITE
def test_a_resource_may_stand_after_its_spans(meter: Meter, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = document(chat(1), chat(2), chat(3), tallystick__account="acme")
    (part,) = made["resourceSpans"]
    made["resourceSpans"] = [dict(reversed(part.items()))]
    assert load(made) == [{"spans": 3, "inserted": 3}]
    assert contents(meter, "account") == [("acme",)] * 3
    monkeypatch.setattr(otlp, "MAX_EARLY", 2)
    with pytest.raises(InvalidFile, match="a resource after more than 2 of its spans"):
        load(json.dumps(made, indent=1))


def test_a_document_is_never_in_memory_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otlp, "PIECE", 512)
    monkeypatch.setattr(otlp, "MAX_VALUE", 8_192)
    path = Path("big.json")
    path.write_text(json.dumps(document(*(chat(n) for n in range(1, 500)))))
    held = []
    more = otlp._Text._read_more

    def read_more(text: Any) -> bool:
        held.append(len(text._text))
        return more(text)

    monkeypatch.setattr(otlp._Text, "_read_more", read_more)
    with otlp.open_otlp(path) as found:
        assert len([item.span["spanId"] for item in found]) == 499
    assert max(held) < 8_192 < path.stat().st_size / 40


def test_what_is_refused_is_listed_and_the_rest_is_kept(meter: Meter, load: Any) -> None:
    good = document(chat(1))
    nameless = document(otlp_span(2) | {"traceId": ""}, 5, chat(1, 9), chat(3))  # type: ignore[arg-type]
    lines = [json.dumps(good), "{broken", json.dumps(nameless), '{"resourceMetrics": []}', json.dumps(good)[:-10]]
    assert load("\n".join(lines)) == [{"spans": 9, "inserted": 2, "known": 1, "rejected": 6}]
    rejects = Path("rejects/0.csv").read_text()
    for said in (
        "line 2: is not JSON",
        "trace_id: got None, expected a string",
        "span: got 'int'",
        "the same was recorded before with other values",
        "line 4: a document without resourceSpans",
        "line 5: ends where",
    ):
        assert said in rejects
    assert SECRET not in rejects
    assert load(good) == [{"spans": 1, "known": 1}]
    assert not Path("rejects/0.csv").exists()


@ON_SQLITE
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (json.dumps(document(chat(1), chat(2)), indent=1)[:-30], "after 2 spans; the spans before it were read"),
        (json.dumps(document(chat(1)), indent=1) + "]", r"expected '\{', not '\]', after 1 spans"),
        (gzip.compress(json.dumps(document(chat(1))).encode())[:-20], "breaks off after 0 spans"),
        (b"\x1f\x8b nothing", "breaks off after 0 spans"),
        (b'{"resourceSpans":\n"\xff"}', "breaks off after 0 spans"),
        ("[" * 100_000, "expected '{', not '\\['"),
        ('{"a": \n' + "[" * 100_000, "nested too deeply"),
        ('{"resourceSpans": 5\n}', "expected '\\[', not '5'"),
        ("5", "expected '{', not '5'"),
    ],
)
def test_a_file_that_is_none(meter: Meter, load: Any, text: Any, problem: str) -> None:
    with pytest.raises(InvalidFile, match=problem):
        load(text)
    assert len(numbers(meter)) == problem.count("after 2") * 2 + problem.count("after 1")


@ON_SQLITE
def test_an_empty_file_has_no_spans(load: Any) -> None:
    assert load("", "\n", {"resourceSpans": []}, {"resourceSpans": None}) == [{}, {}, {}, {}]


BYTES = json.dumps(document(chat(1), otlp_span(2, 1), chat(3, 2)), indent=1).encode()
LINES = json.dumps(document(chat(1))).encode() + b"\n" + json.dumps(document(chat(2))).encode()


@given(
    st.sampled_from([BYTES, LINES, gzip.compress(BYTES, mtime=0)]),
    st.lists(st.tuples(st.integers(0, 2_000), st.binary(max_size=3), st.integers(0, 9)), max_size=4),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_read_or_refused(tmp_path: Path, whole: bytes, damages: list[tuple[int, bytes, int]]) -> None:
    for position, put, taken in damages:
        whole = whole[:position] + put + whole[position + taken :]
    path = tmp_path / "fuzzed"
    path.write_bytes(whole)
    try:
        with otlp.open_otlp(path) as found:
            for item in found:
                with suppress(InvalidUsage):
                    read_span(item.span)
    except InvalidFile:
        pass


def test_the_command(
    meter: Meter, ledger_url: str, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METERING_LEDGER_URL", ledger_url)
    Path("a.jsonl").write_text(json.dumps(document(otlp_span(1), chat(2, 1))) + "\n{")
    Path("b.json.gz").write_bytes(gzip.compress(json.dumps(document(chat(3, 1)), indent=1).encode()))
    ran = command("import-spans", "a.jsonl", "b.json.gz", "--account", "acme", "--rejects", "out", "--json")
    assert ran.status == 3
    assert [(report["inserted"], report["rejected"]) for report in ran.json] == [(2, 1), (1, 0)]
    assert Path(ran.json[0]["rejects_file"]).read_text().count("line 2: ") == 1
    assert set(contents(meter, "account")) == {("acme",)}
    assert command("import-spans", "b.json.gz").status == 0
    assert "cannot be read" in command("import-spans", "none.json").err
    assert "--account" in command("import-spans", "b.json.gz", "--account", "\n").err


@ON_SQLITE
def test_a_file_is_not_its_own_rejects(load: Any, meter: Meter, clock: Clock) -> None:
    Path("x").write_text("")
    with pytest.raises(InvalidSetting, match="--rejects"), SpanImporter(meter.ledger, clock=clock) as importer:
        importer.run(Path("x"), rejects=Path("x"))
