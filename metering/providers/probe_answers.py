"""What is made of a provider's answer to a probe (pure)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import msgspec

from metering.checks import MAX_TOKENS
from metering.errors import InvalidUsage, KeyRefused, ProbeFailed, ProbeTimeout, ProviderLimited, UnexpectedAnswer
from metering.payloads import usage_of
from metering.providers.observing import parse_limits
from metering.providers.probes import model_names

if TYPE_CHECKING:
    from datetime import datetime

    from metering.providers.probes import ProbeRule, ProviderStatus, Sample

__all__ = ["Answer", "with_answer", "with_free_answer", "with_models", "with_sample"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer of a provider."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    problem: str | None
    """Why the body is not whole."""
    broke_off: bool = False
    """Whether that is for the connection."""
    timed_out: bool = False
    """Whether it is for the time it took."""
    latency_ms: int


def with_answer(status: ProviderStatus, answer: Answer, now: datetime) -> ProviderStatus:
    """The limits of an answer, and what its status says."""
    name, code = status.provider, answer.status
    limits = parse_limits(name, answer.headers, now=now, status=code, body=answer.body or None)
    error: ProbeFailed | None = None
    if code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        error = KeyRefused(name, f"invalid key: answered {code}", status=code)
    elif code == HTTPStatus.TOO_MANY_REQUESTS:
        error = ProviderLimited(name, "answered 429: a rate limit is reached", status=code)
    elif code != HTTPStatus.OK:
        redirects = ", a redirect, which is not followed" if 300 <= code < 400 else ""
        error = UnexpectedAnswer(name, f"answered {code}{redirects}", status=code)
    return replace(
        status,
        reachable=True,
        error=error,
        windows=limits.windows,
        retry_after_s=limits.retry_after_s,
        rate_limited=limits.rate_limited,
        waiting_helps=limits.waiting_helps,
        warnings=(*status.warnings, *limits.warnings),
    )


def with_free_answer(status: ProviderStatus, path: str, answer: Answer, now: datetime) -> ProviderStatus:
    """The windows of an answer to a further question, where none of the same name is known. It is never an error."""
    if answer.status != HTTPStatus.OK or answer.problem is not None:
        problem = f"answered {answer.status}" if answer.problem is None else f"its answer {answer.problem}"
        return replace(status, warnings=(*status.warnings, f"{path}: {problem}"))
    limits = parse_limits(status.provider, answer.headers, now=now, status=answer.status, body=answer.body)
    warnings = limits.warnings or (() if limits.windows else (f"{path}: its answer has no limits",))
    return replace(status, windows={**limits.windows, **status.windows}, warnings=(*status.warnings, *warnings))


def with_models(status: ProviderStatus, rule: ProbeRule, answer: Answer) -> ProviderStatus:
    """The models of an answer, where it has them, or that it cannot be read."""
    try:
        return replace(status, models=model_names(rule, _json(answer)))
    except ValueError as expected:
        return replace(status, error=_unread(status.provider, rule.models_path, answer, expected))


def with_sample(status: ProviderStatus, rule: ProbeRule, sample: Sample, answer: Answer) -> ProviderStatus:
    """What the call that costs told: tokens and latency."""
    status = replace(status, sample_model=sample.model, sample_latency_ms=answer.latency_ms)
    if status.error is not None:
        return status
    try:
        said: Any = _json(answer)
    except ValueError as expected:
        return replace(status, error=_unread(status.provider, sample.path, answer, expected))
    took = said.get(rule.latency_ns) if rule.latency_ns and isinstance(said, dict) else None
    if type(took) is int and 0 <= took <= MAX_TOKENS:
        status = replace(status, sample_latency_ms=took // 1_000_000)
    elif took is not None:
        warning = f"{sample.path}: its {rule.latency_ns} cannot be read"
        status = replace(status, warnings=(*status.warnings, warning))
    try:
        usage = usage_of(said, status.provider)
    except InvalidUsage:
        return replace(status, warnings=(*status.warnings, f"{sample.path}: its usage cannot be read"))
    return replace(status, sample_input_tokens=usage.input_tokens, sample_output_tokens=usage.output_tokens)


def _unread(provider: str, path: str, answer: Answer, expected: ValueError) -> ProbeFailed:
    if answer.timed_out:
        return ProbeTimeout(provider, f"the answer of {path} {answer.problem}", status=answer.status)
    return UnexpectedAnswer(provider, f"{path} answered something else than {expected}", status=answer.status)


def _json(answer: Answer) -> object:
    """Raises `ValueError`, saying what was expected."""
    if answer.problem is None:
        try:
            return msgspec.json.decode(answer.body)
        except (msgspec.DecodeError, RecursionError, UnicodeError):
            raise ValueError("JSON") from None
    raise ValueError(f"JSON (it {answer.problem})")
