"""What a provider is asked to learn its limits, who asks, and what came of it (pure)."""

from __future__ import annotations

import re
from collections.abc import Mapping  # noqa: TC003  msgspec reads the annotations of a status
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from metering import errors
from metering.errors import InvalidSetting, MeteringError, ProbeFailed, ProviderLimited, UnknownProvider
from metering.events import MAX_NAME
from metering.providers.limits import LimitWindow  # noqa: TC001  as above

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "Credential",
    "ProbeRule",
    "ProviderStatus",
    "Sample",
    "free_questions",
    "is_key",
    "model_names",
    "url_of",
]

MAX_MODELS = 1_000
MODELS_SHOWN = 20
MAX_URL = 1_000
PROJECT = re.compile(r"[A-Za-z0-9_-]{1,100}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Credential:
    """Who asks a provider. Raises `InvalidSetting` for what cannot be, without showing keys, base URLs and projects."""

    id: str
    """The name it goes by in statuses and logs; not secret."""
    provider: str
    key: str | None = field(default=None, repr=False)
    admin_key: str | None = field(default=None, repr=False)
    """Asks for the limits of an organization, or of a project, where the provider tells them to nobody else."""
    project: str | None = None
    """OpenAI's id of the key's project, whose limits `admin_key` asks for."""
    base_url: str | None = None
    """Where the provider's API is instead: https, or http on the loopback and on `allowed_hosts`."""
    allowed_hosts: tuple[str, ...] = ()
    """Hosts of `base_url` that may be asked without TLS, and at private and link-local addresses."""
    paid_probes_per_day: int = 0
    """How often a UTC day a call that costs may be made, where the model list says no limits. 0: never."""
    warnings: tuple[str, ...] = ()
    """What is wrong with where it comes from, such as a variable that holds no key; each status says it."""

    def __post_init__(self) -> None:
        for name in (self.id, self.provider):
            if not _is_text(name, MAX_NAME):
                raise InvalidSetting(
                    "credential", name, f"an id and a provider of 1 to {MAX_NAME} printable characters"
                )
        for name, key in (("key", self.key), ("admin_key", self.admin_key)):
            if key is not None and not is_key(key):
                raise InvalidSetting(name, "(not shown)", "a key: ASCII without blanks")
        if self.project is not None and not (isinstance(self.project, str) and PROJECT.fullmatch(self.project)):
            raise InvalidSetting("project", "(not shown)", "the id of a project, such as proj_abc")
        # A password or a key in it would be shown with it, and is not what authorizes.
        if self.base_url is not None and not (_is_text(self.base_url, MAX_URL) and not set("@?#") & set(self.base_url)):
            raise InvalidSetting(
                "base_url", "(not shown)", "scheme, host, port and path, such as https://llm.example/v1"
            )
        hosts: object = self.allowed_hosts
        if not isinstance(hosts, tuple | list) or not all(_is_text(host, MAX_NAME) for host in hosts):
            raise InvalidSetting("allowed_hosts", hosts, "a tuple of hosts, such as ('llm.internal',)")
        object.__setattr__(self, "allowed_hosts", tuple(host.lower() for host in hosts))
        paid = self.paid_probes_per_day
        if type(paid) is not int or paid < 0:
            raise InvalidSetting("paid_probes_per_day", paid, "a whole number, 0 or more")


def is_key(key: object) -> bool:
    """Whether a header can hold it."""
    return isinstance(key, str) and key.isascii() and key.isprintable() and " " not in key


def _is_text(value: object, longest: int) -> bool:
    return isinstance(value, str) and value.isprintable() and 1 <= len(value) <= longest


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderStatus:
    """What one probe found."""

    provider: str
    account_key: str
    """The credential's id."""
    checked_at: datetime
    """Aware, in UTC."""
    reachable: bool | None = None
    """Whether an HTTP answer came in time; None where none was asked for."""
    error: MeteringError | None = None
    windows: Mapping[str, LimitWindow] = field(default_factory=dict)
    retry_after_s: float | None = None
    rate_limited: bool = False
    waiting_helps: bool | None = None
    """As in `Limits`."""
    warnings: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    """The provider's first page of them, at most 1,000."""
    sample_model: str | None = None
    """The model of the call that cost; None where none was made."""
    sample_input_tokens: int | None = None
    sample_output_tokens: int | None = None
    sample_latency_ms: int | None = None

    @property
    def failed(self) -> bool:
        """Whether it could not be asked. A 429 is an answer: it was asked, and said its limits."""
        return self.error is not None and not isinstance(self.error, ProviderLimited)

    def to_dict(self, *, models: int = MODELS_SHOWN) -> dict[str, Any]:
        """As JSON has it: times and money as text, the error as type, message and HTTP status, some models and the
        count of all.

        `models` is how many at most; `MAX_MODELS` of them are all there can be, and then `from_dict` is the inverse.
        """
        return {
            "provider": self.provider,
            "account_key": self.account_key,
            "checked_at": self.checked_at.isoformat(),
            "reachable": self.reachable,
            "error": None if self.error is None else _error_dict(self.error),
            "windows": {
                name: {part: _as_json(value) for part, value in asdict(window).items()}
                for name, window in self.windows.items()
            },
            "retry_after_s": self.retry_after_s,
            "rate_limited": self.rate_limited,
            "waiting_helps": self.waiting_helps,
            "warnings": list(self.warnings),
            "models": list(self.models[:models]),
            "model_count": len(self.models),
            "sample_model": self.sample_model,
            "sample_input_tokens": self.sample_input_tokens,
            "sample_output_tokens": self.sample_output_tokens,
            "sample_latency_ms": self.sample_latency_ms,
        }

    @classmethod
    def from_dict(cls, said: Mapping[str, Any]) -> ProviderStatus:
        """What `to_dict` made, with the models that it kept. Raises `ValueError` for anything else."""
        status = msgspec.convert(said, cls, dec_hook=partial(_error_from, said.get("provider")))
        moments = [status.checked_at, *(window.reset_at for window in status.windows.values())]
        if any(moment is not None and moment.utcoffset() != timedelta(0) for moment in moments):
            raise ValueError("times in UTC")
        return status


def _error_dict(error: MeteringError) -> dict[str, Any]:
    return {"type": type(error).__name__, "message": str(error), "status": getattr(error, "status", None)}


def _error_from(provider: object, _: type, said: Any) -> MeteringError:
    """Raises `ValueError` for what is no error of a status."""
    named = msgspec.convert(said, _Error)
    kind = getattr(errors, named.type, None)
    if kind is UnknownProvider:
        return UnknownProvider(provider, named.message.rpartition("; known: ")[2].split(", "))
    if isinstance(kind, type) and issubclass(kind, ProbeFailed) and isinstance(provider, str):
        return kind(provider, named.message.removeprefix(f"{provider}: "), status=named.status)
    raise ValueError("an error of a probe")


class _Error(msgspec.Struct):
    type: str
    message: str
    status: int | None = None


def _as_json(value: Any) -> Any:
    if isinstance(value, Decimal):
        return str(value)
    return value.isoformat() if isinstance(value, datetime) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A call that costs: a POST of one token."""

    model: str
    path: str
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ProbeRule:
    """How a provider is asked."""

    url: str
    """Where its API is, unless it is said otherwise. Empty where every account has its own, so that it must be said."""
    headers: Callable[[str], Mapping[str, str]]
    """What goes with each question; the argument is the key."""
    models_path: str
    """What is asked first: the model list, or what tells more of the key."""
    models_in: tuple[str, str] | None
    """Where an answer has its models, and where each has its name. An empty place: the answer is their list. None: it
    has none."""
    sample: Callable[[Sequence[str]], Sample | None] = lambda _models: None
    """The call that costs least, of those that the listed models allow."""
    key_path: str | None = None
    """What else the key may ask for free. The answer's body is read by the provider's `LimitRule`."""
    admin_path: str | None = None
    """The same with an admin key; `{project}` stands for the credential's project."""
    needs_key: bool = True
    key_variable: str | None = None
    """The environment variable in which the provider's own SDK looks for the key."""
    url_variable: str | None = None
    """The one in which it looks for the base URL; Ollama's may leave out scheme and port."""
    latency_ns: str | None = None
    """Where the sample's answer says how long it took."""


def free_questions(rule: ProbeRule, credential: Credential) -> list[tuple[str, str]]:
    """Paths that tell a credential's limits besides the first, and the key that each is asked with."""
    asked = []
    if rule.key_path is not None:
        asked.append((rule.key_path, credential.key or ""))
    path, project = rule.admin_path, credential.project
    if path is not None and credential.admin_key and (project or "{project}" not in path):
        asked.append((path.format(project=project), credential.admin_key))
    return asked


def url_of(base: str, path: str) -> str:
    """A path below a base URL, which may have the path's beginning: `.../openai/v1` for `/openai/v1/models`."""
    steps = path.split("/")
    for end in range(len(steps) - 1, 1, -1):
        beginning = "/".join(steps[:end])
        rest = base.removesuffix(beginning)
        if rest != base and not rest.endswith("/"):
            return rest + path
    return base + path


def model_names(rule: ProbeRule, answer: object) -> tuple[str, ...]:
    """The names of the models of an answer. Raises `ValueError`, saying what was expected."""
    if rule.models_in is None:
        return ()
    place, name = rule.models_in
    listed: Any = answer.get(place) if place and isinstance(answer, dict) else None if place else answer
    if type(listed) is not list:
        raise ValueError(f"a JSON object with the list {place}" if place else "a list")
    names = [model.get(name) if isinstance(model, dict) else None for model in listed[:MAX_MODELS]]
    if not all(isinstance(each, str) and each.isprintable() and len(each) <= MAX_NAME for each in names):
        raise ValueError(f"models that each have a text {name}")
    return tuple(str(each) for each in names)
