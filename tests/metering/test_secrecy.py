"""No API key, issued or adopted, in the database, the log, a repr or an exception, however it is spelled."""

from __future__ import annotations

import logging
import traceback
from typing import TYPE_CHECKING, Any

import pytest

from metering import TokenUsage
from metering.bodies import bodies_of, masked_error
from metering.errors import InvalidEvent, InvalidSetting, MeteringError
from metering.redaction import SECRETS

if TYPE_CHECKING:
    from metering import Meter

PLAIN = "sk-live-0123456789abcdef"
ADOPTED = [
    PLAIN,
    'quotes"and\'apostrophes" inside',
    "back\\slashes\\and\\\\more\\n",
    "ünïcödé-schlüssel-日本語-🔑",
    "everything\"\\ün'ï/cödé+=%20&🔑",
    "base64+/looking==0123456789abcdef==",
    "x" * 200,
]


def spellings(secret: str) -> list[str]:
    """The secret and what a reader would recognise it from: its longest piece without anything to escape."""
    pieces = "".join(character if character.isascii() and character.isalnum() else " " for character in secret).split()
    return [secret, max(pieces, key=len)]


class Holder:
    """An object of the app that shows the key in its repr."""

    def __init__(self, secret: str) -> None:
        self.secret = secret

    def __repr__(self) -> str:
        return f"Holder({self.secret!r})"


def bodies_with(secret: str) -> list[Any]:
    return [
        secret,
        {"authorization": f"Bearer {secret}"},
        {secret: [secret, {"deep": secret}]},
        Holder(secret),
        {"holder": Holder(secret)},
        {("not", "json"): secret},
        [repr(secret), ascii(secret), repr({"k": secret})],
    ]


@pytest.fixture(params=["issued", *ADOPTED])
def secret(request: pytest.FixtureRequest, meter: Meter) -> str:
    if request.param == "issued":
        return meter.keys.create("acme", plan="pro").secret
    meter.keys.adopt(request.param, "acme", plan="pro")
    return str(request.param)


def assert_hidden(secret: str, text: str, *, what: object) -> None:
    for spelling in spellings(secret):
        assert spelling not in text, what


def test_no_key_in_the_database(meter: Meter, secret: str) -> None:
    for number, body in enumerate(bodies_with(secret)):
        error = ValueError(f"request with {secret} failed", secret)
        key = f"k{number}"
        decision = meter.consume(
            secret, line="a", request=body, response=body, error=error, idempotency_key=key, fingerprint=key
        )
        assert decision.allowed
        meter.consume(secret, line="a", request=body, error=repr(secret))
        with meter.reserve(secret, line="a", estimate=TokenUsage(), request=body) as hold:
            hold.settle(TokenUsage(), response=body)
        with pytest.raises(RuntimeError), meter.reserve(secret, line="a", request=body):
            raise RuntimeError(f"key {secret} was refused upstream: {secret!r}")
    key_id = meter.authenticate(secret).key_id
    meter.keys.rotate(key_id)
    meter.keys.revoke(key_id)
    assert "[API key]" in repr(meter.log("acme"))
    for file in meter.ledger.path.parent.glob("ledger.db*"):
        assert_hidden(secret, file.read_bytes().decode("utf-8", "replace"), what=file.name)


PLAIN_FIELDS = ("operation", "provider", "model", "service_tier", "run_id", "request_id", "session_id")


def test_a_key_in_a_field_that_is_kept_in_plain_is_refused(meter: Meter, secret: str) -> None:
    given: list[dict[str, Any]] = [{name: f"x{secret}"} for name in PLAIN_FIELDS]
    given += [
        {"line": secret},
        {"line": f"{secret}\n"},
        {"idempotency_key": secret},
        {"fingerprint": secret},
        {"attributes": {"header": f"Bearer {secret}"}},
        {"attributes": {secret: 1}},
        {"attributes": {"x": object(), "y": secret}},
        {"operation": secret * 30},
        {"quantity": secret},
        {"usage": secret},
    ]
    for fields in given:
        [(name, _)] = fields.items()
        for call in (meter.consume, meter.reserve):
            if call == meter.reserve and name == "usage":
                continue
            with pytest.raises(InvalidEvent) as caught:
                call(secret, **{"line": "a", **fields})
            assert (caught.value.field, caught.value.value) == (name, "(not shown)")
            told = "".join(traceback.format_exception(caught.value)) + repr(caught.value) + str(caught.value)
            assert_hidden(secret, told, what=fields.keys())
    hold = meter.reserve(secret, line="a")
    for name in ("provider", "model", "service_tier", "usage", "quantity"):
        with pytest.raises(InvalidEvent) as caught:
            hold.settle(**{name: secret})
        assert_hidden(secret, "".join(traceback.format_exception(caught.value)), what=name)
    with meter.ledger.read() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM events").scalar_one() == 0


def test_no_key_in_reprs_logs_and_exceptions(meter: Meter, secret: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    shown: list[object] = [meter, meter.keys, meter.accounts, meter.authenticate(secret), meter.keys.list()]
    shown.append(meter.consume(secret, line="a", idempotency_key="k"))
    with meter.reserve(secret, line="a") as hold:
        shown += [hold, hold.decision, hold.settle()]
    meter.keys.revoke(meter.authenticate(secret).key_id)
    for refused in (secret, secret + "?", secret[:-1] + "\x00"):
        for call in (meter.authenticate, lambda key: meter.consume(key, line="a"), meter.keys.lookup):
            try:
                shown.append(call(refused))
            except MeteringError as exc:
                shown += [exc, str(exc), exc.args, "".join(traceback.format_exception(exc))]
    assert len(shown) > 30
    shown += [record.getMessage() for record in caplog.records]
    assert_hidden(secret, repr(shown), what="shown")


def test_a_new_key_shows_its_secret_only_where_asked(meter: Meter) -> None:
    key = meter.keys.create("acme", plan="pro")
    assert key.secret not in repr(key)
    assert key.secret not in str(key)


@pytest.mark.parametrize("field", ["account", "plan", "label"])
def test_a_key_is_no_name(meter: Meter, field: str) -> None:
    with pytest.raises(InvalidEvent, match=rf"{field}: got '\(not shown\)'"):
        meter.keys.adopt(PLAIN, **{"account": "acme", "plan": "pro", field: f"the key {PLAIN}"})
    with pytest.raises(InvalidSetting) as caught:
        meter.keys.adopt("too-short", "acme", plan="pro")
    assert "too-short" not in str(caught.value)
    assert meter.accounts.list() == []


def test_a_mask_takes_nothing_else(meter: Meter) -> None:
    bodies = bodies_of(PLAIN, {"q": f"my {PLAIN} key", "n": 1.5, "u": "ü"}, None, replayable=True, redact=SECRETS)
    assert bodies.request == '{"q":"my [API key] key","n":1.5,"u":"ü"}'
    assert (bodies.response, bodies.replay) == (None, None)
    assert masked_error(f"no {PLAIN}.", PLAIN, SECRETS) == "no [API key]."
    assert masked_error(None, PLAIN, SECRETS) is None
    assert masked_error(KeyError("x"), None, SECRETS) == "KeyError: 'x'"


def test_a_key_inside_bytes_is_masked(meter: Meter) -> None:
    key = meter.keys.create("bytes", plan="pro")
    body = f'{{"q": "{key.secret}"}}'.encode()
    meter.consume(key.secret, line="a", request=body, response={"nested": [body]})
    [entry] = meter.log("bytes")
    assert entry.request == '{"q": "[API key]"}'
    assert entry.response == {"nested": ['{"q": "[API key]"}']}
