"""What the request log does not keep: whatever a body looks like, no well-known secret, and nothing an app names."""

from __future__ import annotations

import base64
import json
import sqlite3
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metering import AsyncMeter, Meter, Redaction, TokenUsage
from metering.bodies import MAX_LOGGED_BYTES, bodies_of, masked_error
from metering.drain import Drain
from metering.errors import IdempotencyConflict, InvalidSetting
from metering.redaction import SECRETS
from tests.metering.loops import on_a_loop
from tests.servers import RedisServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

HIDDEN = "hunter2canary"
KEY = "tsk_" + "k" * 43
OWN_HEADER = Redaction(headers=("X-Session",))


def logged(body: Any, redact: Redaction = SECRETS) -> str:
    """A body as the request log keeps it."""
    kept = bodies_of(None, body, None, replayable=False, redact=redact).request
    assert kept is not None
    return kept


# No well-known secret, whatever the body

numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
values = st.none() | st.booleans() | numbers | st.text(max_size=8)
names = st.text(max_size=6)
structures = st.recursive(
    values, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=6
)
opaque = st.text("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", min_size=16, max_size=40)


def spelled(name: str) -> st.SearchStrategy[str]:
    """A name as people write it: in any case, with -, _ or a dot."""
    words = name.split(" ")
    plain = [f"{glue}".join(words) for glue in ("", "-", "_", ".")]
    return st.sampled_from([form for text in plain for form in (text, text.upper(), text.title())])


KEYS = [
    "password",
    "db password",
    "secret",
    "client secret",
    "api key",
    "openai api key",
    "access token",
    "refresh token",
    "private key",
    "aws secret access key",
    "authorization",
    "token",
    "id token",
    "session token",
    "db pwd",
    "pwd",
    "cookie",
]
HEADERS = ["authorization", "proxy authorization", "cookie", "set cookie", "x api key", "api key", "x goog api key"]
secret_keys = st.sampled_from(KEYS).flatmap(spelled)
secret_headers = st.sampled_from(HEADERS).flatmap(lambda name: spelled(name).filter(lambda text: " " not in text))
header_names = secret_headers.filter(
    lambda name: ("-" in name or "_" in name or name.lower() in HEADERS) and "." not in name
)


@st.composite
def known_shapes(draw: st.DrawFn) -> str:
    """A secret that is told by how it looks; what is after its beginning is drawn."""
    rest = draw(opaque)
    begins = ["sk-", "sk-ant-api03-", "tsk_", "Bearer ", "bearer  ", "ghp_", "github_pat_", "xoxb-", "xoxp-1-"]
    begins += ["sk_test_", "rk_live_", "gsk_", "xai-", "hf_", "r8_"]
    begin = draw(st.sampled_from([*begins, "eyJ", "-----BEGIN RSA PRIVATE KEY-----\n", "AKIA", "AIza"]))
    match begin:
        case "eyJ":
            return f"eyJhbGciOiJI{rest}.eyJzdWIi{rest}.{rest}"
        case "AKIA":
            return f"AKIA{rest.upper()}"
        case "AIza":
            return f"AIza{rest}{rest}"
        case _ if begin.startswith("-"):
            return f"{begin}{rest}\n{rest}\n-----END RSA PRIVATE KEY-----"
    return begin + rest


@st.composite
def named(draw: st.DrawFn) -> tuple[Any, str]:
    """Something that has a secret under a name, and the secret."""
    inner = draw(st.sampled_from([HIDDEN, {"deep": HIDDEN}, [HIDDEN, 1]]))
    headers = draw(st.sampled_from(["headers", "request_headers", "ResponseHeaders"]))
    name = draw(st.sampled_from(["password", "api_key", "client-secret", "accessToken", "Authorization"]))
    forms = ["{0}={1}", '"{0}": "{1}"', "{0}: {1}", "f({0}='{1}')", '\\"{0}\\":\\"{1}\\"', "{{b'{0}': b'{1}'}}"]
    form = draw(st.sampled_from([*forms, "{0}=u'{1}'", '{0} = rb"{1}"', "{{'name': '{0}', 'value': '{1}'}}"]))
    in_url = draw(
        st.sampled_from(["postgresql://u:{}@h/db", "redis://:{}@h:1", "https://h/?key={}", "/v1?a=b&key={}#c"])
    )
    header = draw(header_names)
    found: Any = draw(
        st.sampled_from(
            [
                {draw(secret_keys): inner},
                {draw(secret_keys): 7_141_592},
                {draw(secret_keys).encode(): inner},
                {headers: {header: inner}},
                [["host", "x"], (header, inner)],
                [(header.encode(), HIDDEN.encode()), (b"host", b"x")],
                str([(header.encode(), HIDDEN.encode()), (b"host", b"x")]),
                f"Headers({[('host', 'x'), (header, HIDDEN)]})",
                {headers: [{"name": "host", "value": "x"}, {"name": header, "value": inner}]},
                [{"key": header, "value": HIDDEN}],
                in_url.format(HIDDEN),
                f"a=b&{form.format(name, HIDDEN)}",
            ]
        )
    )
    return found, "7141592" if 7_141_592 in (found.values() if isinstance(found, dict) else ()) else HIDDEN


@st.composite
def shaped(draw: st.DrawFn) -> tuple[Any, str]:
    """Something that has a secret of a known shape in it, and what of it must not be kept."""
    shape = draw(known_shapes())
    hidden = shape.split()[-1] if shape.lower().startswith("bearer") else shape.splitlines()[-2:][0]
    return draw(st.sampled_from([shape, f"my key is {shape}, thanks", f"({shape})", {shape: 1}])), hidden


def in_texts(body: Any) -> Any:
    """A body with texts for bytes, which JSON does not have."""
    if isinstance(body, bytes):
        return body.decode()
    if isinstance(body, dict):
        return {in_texts(name): in_texts(item) for name, item in body.items()}
    return [in_texts(item) for item in body] if isinstance(body, list | tuple) else body


@st.composite
def bodies(draw: st.DrawFn) -> tuple[Any, str]:
    """A body, and what must not be kept of it."""
    body, hidden = draw(named() | shaped())
    for wrap in draw(st.lists(st.sampled_from(["list", "key", "json", "bytes", "beside"]), max_size=4)):
        match wrap:
            case "list":
                body = [draw(structures), body]
            case "key":
                body = {draw(names): draw(structures), "it": body}
            case "json":
                body = json.dumps(in_texts(body))
            case "bytes":
                body = json.dumps(in_texts(body), ensure_ascii=False).encode("utf-8", "replace")
            case "beside":
                body = {"a": draw(structures), "b": {"c": body}, "headers": {"host": "x"}}
    return body, hidden


@given(bodies())
def test_no_well_known_secret_is_kept(drawn: tuple[Any, str]) -> None:
    body, hidden = drawn
    kept = logged(body)
    assert hidden not in kept
    assert "[redacted]" in kept
    json.loads(kept)


letters = st.text("abcdf {}[]\"'\\:=\n/-_ü日🔑", max_size=20)
harmless = st.recursive(
    st.none() | st.booleans() | numbers | letters,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(letters, inner, max_size=4),
    max_leaves=20,
)


@given(harmless)
def test_nothing_else_is_taken(body: Any) -> None:
    text = bodies_of(None, body, None, replayable=False, redact=Redaction(secrets=False)).request
    if body is None:
        assert text is None
        return
    assert text is not None
    assert json.loads(text) == json.loads(json.dumps(body))
    assert logged(body) == text


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": "Which secretary has the key to the token machine?"}]},
        {"usage": {"input_tokens": 5, "output_tokens": 7}, "max_tokens": 9, "keywords": ["a"], "tokenizer": "o200k"},
        {"is_secret": False, "password": None, "risk": "risk-management-framework", "note": "a cookie: choc"},
        {"logprobs": [{"token": "Hello", "logprob": -0.5}], "pair": ["password", "email"], "name": "api_key"},
        {"tokens": 5, "session_tokens": 6, "valid_tokens": 7, "stop_token": "</s>", "total_tokens_details": {"a": 1}},
        {"text": "max_tokens=5, input_tokens: 6, tokens=7, 'tokens': 8; unexpected token: if; a monkey=1, donkey: 2"},
        {"text": "https://h:8080/a@b?monkey=1 and mailto:a@b.example, hf_one_of_many_models, xai-grok-code-fast-1"},
        {"name": "temperature", "value": 1, "key": "k"},
        {"text": '{ "spaced" :  [1.50, 1E5] }', "idempotency_key": "k-1"},
    ],
)
def test_what_only_sounds_like_a_secret_is_kept(body: Any) -> None:
    assert json.loads(logged(body)) == body


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("grant_type=password&password=hunter2&user=x", "grant_type=password&password=[redacted]&user=x"),
        ("Holder(user='u', api_keys='p \\' w')", "Holder(user='u', api_keys=[redacted])"),
        ('data: {"client_secret": "a\\"b", "n": 1', 'data: {"client_secret": [redacted], "n": 1'),
        ('{\\"api_key\\":\\"a b\\n\\", \\"n\\": 1', '{\\"api_key\\":[redacted], \\"n\\": 1'),
        ("Authorization: Bearer sk-0123456789abcdef\r\nHost: h", "Authorization: [redacted]\r\nHost: h"),
        ("GET /\nSet-Cookie: a=b; c=d\nHost: h", "GET /\nSet-Cookie: [redacted]\nHost: h"),
        ("İ: sk-0123456789abcdef!", "İ: [redacted]!"),
        ("tsk_0123456789abcdef,ghp_0123456789abcdef", "[redacted],[redacted]"),
        ("-----BEGIN PRIVATE KEY-----\nMIIE", "[redacted]"),
        ("401 for {b'api-key': b'SECRET', b'n': 1}", "401 for {b'api-key': [redacted], b'n': 1}"),
        ("login(password=u'a', pwd = f\"b\")", "login(password=[redacted], pwd = [redacted])"),
        ("{'secret': bytearray(b'a')}", "{'secret': [redacted])}"),
        ("[(b'x-api-key', b'a'), (b'host', b'h')]", "[(b'x-api-key', [redacted]), (b'host', b'h')]"),
        ("Headers([('cookie', 'a=b'), ('n', '1')])", "Headers([('cookie', [redacted]), ('n', '1')])"),
        ('[["Authorization", "Basic a"], 1', '[["Authorization", [redacted]], 1'),
        ("{'name': 'Cookie', 'value': 'a'}]", "{'name': 'Cookie', 'value': [redacted]}]"),
        ("{'name': 'DB_PASSWORD', 'value': 'a'}]", "{'name': 'DB_PASSWORD', 'value': [redacted]}]"),
        ("missing: 'password', 'email'", "missing: 'password', 'email'"),
        ("GET /?token=a&id_token=b&n=1", "GET /?token=[redacted]&id_token=[redacted]&n=1"),
        ("token: a\nn: 1", "token: [redacted]\nn: 1"),
        ("f(n=1, cookie='a', set_cookie=b'c')", "f(n=1, cookie=[redacted], set_cookie=[redacted])"),
        ("api.key=a", "api.key=[redacted]"),
        ("postgresql+psycopg://u:p@s?s@h:5432/db", "postgresql+psycopg://u:[redacted]@h:5432/db"),
        ("(https://h/v1/models?key=a-b_c&alt=sse)", "(https://h/v1/models?key=[redacted]&alt=sse)"),
        ("https://h/v1?alt=sse\\u0026key=a\\u0026n=1", "https://h/v1?alt=sse\\u0026key=[redacted]\\u0026n=1"),
    ],
)
def test_texts_are_read_as_people_would(text: str, kept: str) -> None:
    assert SECRETS.text(text) == kept
    assert json.loads(logged({"a": [f"{text}"]})) == {"a": [kept]}


def test_keys_of_several_secrets() -> None:
    assert json.loads(logged({"API_KEYS": ["a"], "passwords": {"b": 1}})) == {
        "API_KEYS": "[redacted]",
        "passwords": "[redacted]",
    }


@pytest.mark.parametrize("body", [{b"password": b"a", b"n": b"1"}, {"n": "1", b"password": {b"a": 1}}])
def test_keys_in_bytes_are_read_as_texts(body: Any) -> None:
    assert json.loads(logged(body)) == {"password": "[redacted]", "n": "1"}


def test_headers_listed_by_name_and_value() -> None:
    """As in HAR files."""
    listed = [{"name": name, "value": "a"} for name in ("Cookie", "Authorization", "X-Session", "Host")]
    kept = json.loads(logged({"headers": listed, "pairs": [{"Key": "Cookie", "Value": ["a"]}]}, OWN_HEADER))
    assert [each["value"] for each in kept["headers"]] == ["[redacted]"] * 3 + ["a"]
    assert [each["name"] for each in kept["headers"]] == [each["name"] for each in listed]
    assert kept["pairs"] == [{"Key": "Cookie", "Value": "[redacted]"}]


def test_a_text_of_many_beginnings_takes_no_time() -> None:
    """What is quadratic here would hold up an event loop for minutes."""
    for piece in (
        "-eyJ",
        "eyJaaaaaaaaaaaa-",
        'password="',
        "password=\\\\\\",
        "-----BEGIN PRIVATE KEY",
        "sk-",
        "bearer  ",
        "://a:",
        "://a:b@",
        "&key=",
        "token'",
        "'cookie', b",
        "api-key' , 'value",
        "password=b'",
    ):
        logged({"text": piece * (1_000_000 // len(piece))})


# What an app names


@pytest.mark.parametrize(
    ("path", "body", "kept"),
    [
        ("user.email", {"user": {"email": "x", "name": "y"}}, {"user": {"email": "[redacted]", "name": "y"}}),
        ("$.user.email", {"user": {"email": None}}, {"user": {"email": "[redacted]"}}),
        ("$.user", {"user": {"a": [1]}}, {"user": "[redacted]"}),
        (
            "$.messages[*].content",
            {"messages": [{"content": "a", "n": 1}, {"content": [2]}, {"n": 3}, 4]},
            {"messages": [{"content": "[redacted]", "n": 1}, {"content": "[redacted]"}, {"n": 3}, 4]},
        ),
        ("a[1]", {"a": [1, 2, 3]}, {"a": [1, "[redacted]", 3]}),
        ("a[9].b", {"a": [1, 2, 3]}, {"a": [1, 2, 3]}),
        ("[0].b", [{"b": 1}, {"b": 2}], [{"b": "[redacted]"}, {"b": 2}]),
        ("$[*][*]", [[1, 2], 3], [["[redacted]", "[redacted]"], 3]),
        (
            "users.*.name",
            {"users": {"u": {"name": 1}, "v": {"name": 2}}},
            {"users": {"u": {"name": "[redacted]"}, "v": {"name": "[redacted]"}}},
        ),
        ("a.b", {"a": ["b"], "b": 1}, {"a": ["b"], "b": 1}),
        ("first name", {"first name": "x"}, {"first name": "[redacted]"}),
        ("a", '{"a": 1, "b": 2}', '{"a":"[redacted]","b":2}'),
        ("a", b'{"a": 1, "b": 2}', '{"a":"[redacted]","b":2}'),
        ("a", "a", "a"),
    ],
)
def test_paths_name_places(path: str, body: Any, kept: Any) -> None:
    assert json.loads(logged(body, Redaction(paths=(path,)))) == kept


@pytest.mark.parametrize(
    "path",
    ["", "$", "$..a", "a..b", "a.", ".", "a[", "a[-1]", "a[1:2]", "a['b']", 'a["b"]', "a[?(@.b)]", "$a", "a[*", "a*"],
)
def test_other_paths_are_refused(path: str) -> None:
    with pytest.raises(InvalidSetting, match=r"redact\.paths: got .* expected a path such as"):
        Redaction(paths=(path,))


def test_a_pattern_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidSetting, match=r"redact\.patterns: got '\(', expected a regular expression"):
        Redaction(patterns=("(",))


@pytest.mark.parametrize("name", ["headers", "paths", "patterns"])
@pytest.mark.parametrize("given_as", ["abc", [1]])
def test_one_text_is_not_several(name: str, given_as: Any) -> None:
    with pytest.raises(InvalidSetting, match=rf"redact\.{name}: got"):
        Redaction(**{name: given_as})


def test_patterns_headers_and_secrets_add_up() -> None:
    redact = Redaction(headers=("X-Session",), patterns=(r"\b\d{4}-\d{4}\b", "(?i)acme", "z*"))
    body = {
        "text": "card 1234-5678 of ACME, sk-0123456789abcdef",
        "acme corp": 1,
        "headers": {"x-session": "s", "Host": "h"},
        "x-session": "only a header's name",
        "password": "p",
    }
    assert json.loads(logged(body, redact)) == {
        "text": "card [redacted] of [redacted], [redacted]",
        "[redacted] corp": 1,
        "headers": {"x-session": "[redacted]", "Host": "h"},
        "x-session": "only a header's name",
        "password": "[redacted]",
    }
    without = Redaction(patterns=("acme",), secrets=False)
    assert json.loads(logged({"password": "p acme", "k": "sk-0123456789abcdef"}, without)) == {
        "password": "p [redacted]",
        "k": "sk-0123456789abcdef",
    }


def test_errors_are_texts_too() -> None:
    shown = str({b"api-key": b"a", "max_tokens": 5})
    assert masked_error(ValueError(f"401 for {shown}"), None, SECRETS) == (
        "ValueError: 401 for {b'api-key': [redacted], 'max_tokens': 5}"
    )
    assert masked_error(ValueError("Incorrect API key provided: sk-0123456789abcdef."), KEY, SECRETS) == (
        "ValueError: Incorrect API key provided: [redacted]."
    )


def test_what_is_cut_was_redacted_before() -> None:
    body = {"text": "sk-0123456789abcdef " * 10_000}
    kept = json.loads(logged(body))
    assert (kept["cut"], "sk-" in kept["start"], "[redacted]" in kept["start"]) == (True, False, True)
    assert len(json.dumps(kept)) < MAX_LOGGED_BYTES < kept["bytes"]


# In a meter


class Broken(Redaction):
    """One that fails on every text."""

    def body(self, text: str) -> str:
        raise RuntimeError(text)

    def text(self, text: str) -> str:
        raise RuntimeError(text)


def test_a_body_that_cannot_be_redacted_is_not_kept_and_the_call_goes_well(open_meter: Callable[..., Meter]) -> None:
    meter = open_meter(redact=Broken())
    secret = meter.keys.create("acme", plan="pro").secret
    for _ in range(2):
        decision = meter.consume(
            secret, line="a", idempotency_key="k", request={"q": HIDDEN}, response={"a": HIDDEN}, error=HIDDEN
        )
        assert decision.allowed
    assert decision.response == {"a": HIDDEN}
    [entry] = meter.log("acme")
    why = "not kept: it could not be redacted (RuntimeError)"
    assert (entry.request, entry.response, entry.error) == (
        {"kept": False, "why": why},
        {"kept": False, "why": why},
        why,
    )


def test_a_body_nested_too_deep_is_no_error() -> None:
    deep: Any = HIDDEN
    for _ in range(100_000):
        deep = [deep]
    for body in (
        deep,
        "[" * 100_000,
        '{"a":' * 300 + '{"password": "' + HIDDEN + '"}' + "}" * 300,
        "[" * 600 + "]" * 600,
    ):
        assert HIDDEN not in logged(body)


def test_the_log_is_redacted_and_neither_the_replay_nor_the_fingerprint(open_meter: Callable[..., Meter]) -> None:
    meter = open_meter()
    secret = meter.keys.create("acme", plan="pro").secret
    said: dict[str, Any] = {"line": "a", "idempotency_key": "k", "response": {"access_token": HIDDEN}}
    meter.consume(secret, request={"password": "one"}, **said)
    again = meter.consume(secret, request={"password": "one"}, **said)
    assert (again.replayed, again.response) == (True, {"access_token": HIDDEN})
    with pytest.raises(IdempotencyConflict):
        meter.consume(secret, request={"password": "another"}, **said)
    [entry] = meter.log("acme")
    assert (entry.request, entry.response) == ({"password": "[redacted]"}, {"access_token": "[redacted]"})


def test_holds_are_redacted_too(open_meter: Callable[..., Meter]) -> None:
    meter = open_meter(redact=Redaction(paths=("q",)))
    secret = meter.keys.create("acme", plan="pro").secret
    with meter.reserve(secret, line="a", estimate=TokenUsage(), request={"q": HIDDEN}) as hold:
        kept = hold.keeping(hold.real_cost(TokenUsage()), response={"q": HIDDEN}, reply={"q": HIDDEN}).bodies
        hold.settle(TokenUsage(), response={"q": HIDDEN})
    with pytest.raises(ValueError, match="token"), meter.reserve(secret, line="a", request={"q": HIDDEN}):
        raise ValueError(f"access_token={HIDDEN}")
    released, settled = meter.log("acme")
    assert (settled.request, settled.response) == ({"q": "[redacted]"}, {"q": "[redacted]"})
    assert (kept.request, kept.response, kept.replay) == ('{"q":"[redacted]"}', '{"q":"[redacted]"}', None)
    assert (released.request, released.error) == ({"q": "[redacted]"}, "ValueError: access_token=[redacted]")


@on_a_loop
async def test_an_async_meter_takes_it_too(ledger_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METERING_LEDGER_URL", ledger_url)
    with Meter.from_env(redact=Redaction(paths=("q",))) as meter:
        secret = meter.keys.create("acme", plan="pro").secret
        meter.consume(secret, line="a", request={"q": HIDDEN})
    async with AsyncMeter.from_env(redact=Redaction(paths=("q",))) as asynchronous:
        await asynchronous.consume(secret, line="a", request={"q": HIDDEN})
        async with asynchronous.reserve(secret, line="a", request={"q": HIDDEN}) as hold:
            await hold.settle(response={"q": HIDDEN})
        assert [entry.request for entry in await asynchronous.log("acme")] == [{"q": "[redacted]"}] * 3
    for meter_of in (Meter, AsyncMeter):
        with pytest.raises(InvalidSetting, match="redact: got 'dict', expected a Redaction"):
            meter_of(ledger_url, redact={"paths": ["q"]})  # type: ignore[arg-type]


# On the way


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another writer holds the ledger."""
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    yield
    other.execute("ROLLBACK")
    other.close()


def spooled(tmp_path: Path) -> bytes:
    """What lies in the files of the spool: the last word of each line, which is base64."""
    files = [file for file in (tmp_path / "spool").rglob("*") if file.is_file()]
    lines = b"\n".join(file.read_bytes() for file in files).splitlines()
    return b"".join(base64.b64decode(line.split()[-1]) for line in lines if len(line.split()) > 3)


def test_the_spool_has_it_redacted(open_meter: Callable[..., Meter], tmp_path: Path) -> None:
    meter = open_meter(timeout_s=0.1, spool=tmp_path / "spool")
    secret = meter.keys.create("acme", plan="pro").secret
    hold = meter.reserve(secret, line="a", request={"password": HIDDEN})
    with locked(meter.ledger.path):
        assert hold.settle(response={"api_key": HIDDEN}).pending
        found = spooled(tmp_path)
    assert b"[redacted]" in found
    assert HIDDEN.encode() not in found
    meter.flush()
    assert meter.log("acme")[0].response == {"api_key": "[redacted]"}


def test_what_goes_by_the_spool_beside_redis_is_redacted(ledger_url: str, tmp_path: Path) -> None:
    with RedisServer() as server, Meter(ledger_url, quota_url=server.url, spool=tmp_path / "spool") as meter:
        secret = meter.keys.create("acme", plan="pro").secret
        assert meter.consume(secret, line="a", request={"password": HIDDEN}, response={"secret": HIDDEN}).allowed
        found = spooled(tmp_path)
        meter.flush()
        Drain(meter.ledger, meter._redis.link).run()  # type: ignore[union-attr]
        [entry] = meter.log("acme")
    assert (entry.request, entry.response) == ({"password": "[redacted]"}, {"secret": "[redacted]"})
    assert b"[redacted]" in found
    assert HIDDEN.encode() not in found
