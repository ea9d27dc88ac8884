"""A status, any that a probe may make, through JSON and back; and what is no status."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from metering import errors
from metering.errors import MeteringError, ProbeFailed, UnexpectedAnswer, UnknownProvider
from metering.providers.limits import LimitWindow
from metering.providers.probes import MAX_MODELS, ProviderStatus
from metering.providers.registry import LIMIT_RULES

FAILURES = sorted(
    (kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ProbeFailed)),
    key=lambda kind: kind.__name__,
)
TEXT = st.text(max_size=20)
NUMBER = st.none() | st.integers(0, 2**53)
MONEY = st.none() | st.decimals(0, 10**15, allow_nan=False)
SHARE = st.none() | st.floats(0, 1e9)
TIME = st.datetimes(timezones=st.just(UTC))
WINDOW = st.one_of(
    st.builds(
        LimitWindow,
        limit=number,
        remaining=number,
        reset_at=st.none() | TIME,
        used=number,
        percent_used=SHARE,
        reset_in_ms=NUMBER,
    )
    for number in (NUMBER, MONEY)
)


@st.composite
def statuses(draw: st.DrawFn) -> ProviderStatus:
    provider = draw(TEXT)
    failed = st.builds(
        lambda kind, problem, status: kind(provider, problem, status=status),
        *(st.sampled_from(FAILURES), TEXT, st.none() | st.integers(100, 999)),
    )
    given_ = st.fixed_dictionaries(
        {
            **dict.fromkeys(("reachable", "waiting_helps"), st.none() | st.booleans()),
            "error": st.none() | failed | st.just(UnknownProvider(provider, list(LIMIT_RULES))),
            "windows": st.dictionaries(TEXT, WINDOW, max_size=3),
            "retry_after_s": SHARE,
            "rate_limited": st.booleans(),
            **dict.fromkeys(("warnings", "models"), st.lists(TEXT, max_size=4).map(tuple)),
            "sample_model": st.none() | TEXT,
            **{f"sample_{what}": NUMBER for what in ("input_tokens", "output_tokens", "latency_ms")},
        }
    )
    return ProviderStatus(provider=provider, account_key=draw(TEXT), checked_at=draw(TIME), **draw(given_))


def parts(status: ProviderStatus) -> dict[str, Any]:
    """All of it, with an error by its kind and what it carries."""
    error = status.error
    said = {name: getattr(status, name) for name in ProviderStatus.__dataclass_fields__}
    return {**said, "error": error and (type(error), str(error), vars(error))}


@given(statuses())
def test_a_status_is_the_same_after_json(status: ProviderStatus) -> None:
    told = msgspec.json.decode(msgspec.json.encode(status.to_dict(models=MAX_MODELS)))
    back = ProviderStatus.from_dict(told)
    assert parts(back) == parts(status)
    for name, window in status.windows.items():
        assert type(back.windows[name].limit) is type(window.limit)
    assert [type(back.warnings), type(back.models), back.checked_at.tzinfo] == [tuple, tuple, UTC]


def test_every_model_is_kept_where_all_are_asked_for() -> None:
    models = tuple(f"m{number}" for number in range(MAX_MODELS))
    status = ProviderStatus(provider="openai", account_key="acme", checked_at=datetime(2026, 3, 12, tzinfo=UTC))
    whole = ProviderStatus.from_dict(status.to_dict() | {"models": list(models)})
    assert ProviderStatus.from_dict(whole.to_dict(models=MAX_MODELS)).models == models
    assert ProviderStatus.from_dict(whole.to_dict()).models == models[:20]


GOOD = ProviderStatus(
    provider="openai",
    account_key="acme",
    checked_at=datetime(2026, 3, 12, tzinfo=UTC),
    error=UnexpectedAnswer("openai", "answered 500", status=500),
    windows={"requests": LimitWindow(limit=1, reset_at=datetime(2026, 3, 12, tzinfo=UTC))},
).to_dict()


@pytest.mark.parametrize(
    "wrong",
    [
        {"checked_at": "2026-03-12T00:00:00"},
        {"checked_at": "2026-03-12T00:00:00+01:00"},
        {"checked_at": 7},
        {"windows": {"requests": {"reset_at": "2026-03-12T00:00:00"}}},
        {"windows": {"requests": {"limit": []}}},
        {"windows": []},
        {"error": {"type": "KeyboardInterrupt", "message": "no"}},
        {"error": {"type": "MeteringError", "message": "no"}},
        {"error": {"type": "annotations", "message": "no"}},
        {"error": {"type": "ProbeTimeout"}},
        {"error": "no"},
        {"provider": None},
        {"models": [7]},
    ],
)
def test_what_is_no_status_is_refused(wrong: dict[str, Any]) -> None:
    assert isinstance(ProviderStatus.from_dict(GOOD).error, MeteringError)
    with pytest.raises(ValueError, match=r"."):
        ProviderStatus.from_dict({**GOOD, **wrong})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(sorted(GOOD)) | TEXT, inner, max_size=4)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(sorted(GOOD)), JSON))
@example({"checked_at": "0001-01-01T00:00:00+23:59"})
def test_nothing_but_a_value_error_is_raised(changed: dict[str, Any]) -> None:
    with suppress(ValueError):
        ProviderStatus.from_dict({**GOOD, **changed})
