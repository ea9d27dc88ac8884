"""Every error Tallystick raises, in one tree.

MeteringError
├── InvalidEvent            a fact that cannot be billed as given (also a ValueError)
│   └── InvalidUsage        token counts that cannot be
├── InvalidSetting          a setting or an argument that cannot be used (also a ValueError)
├── InvalidFile             a file that cannot be read, or not to its end
├── InvalidReport           a provider's report that says something else than it should (also a ValueError)
├── InvalidPlan             plans.toml, or a plan in it, cannot be used (also a ValueError)
├── AmbiguousRate           two rates claim the same usage
├── UnpricedUsage           a cost-plus rate meets usage whose provider cost is not known
├── NotFound                (also a LookupError)
│   ├── UnknownAccount
│   ├── UnknownPlan
│   ├── UnknownKey
│   ├── UnknownEvent
│   ├── EventsArchived      events that have left the ledger for an archive
│   ├── UnknownReconciliation
│   ├── UnknownInvoice
│   ├── UnknownProvider     a provider whose rate limits are not known here
│   └── UnknownEncoding     no tokenizer for a model, or no table of it on this machine
├── Conflict
│   ├── AccountConflict     the account exists and differs from what was asked
│   ├── IdempotencyConflict the key was used with another request
│   ├── IdempotencyInProgress
│   ├── SettleConflict      the hold was settled before, with other usage
│   ├── CorrectionConflict  the fact changed since it was read
│   ├── PeriodClosed        a billing period that is closed already
│   └── InvoiceConflict     a final document that this cannot be done to, or that is not what was written
├── RevokedKey              revoked, or its grace time after a rotation is over
├── LimitExceeded           carries the decision
├── Replayed                carries the stored response
├── ProbeFailed             a provider could not be asked for its limits, or did not answer as it should
│   ├── NoProviderKey       there is no key to ask with
│   ├── AddressRefused      a base URL that keys are not sent to
│   ├── HostNotFound        no address for the host
│   ├── ConnectionFailed    no connection, or it broke
│   │   └── TlsFailed       no TLS, or a certificate that does not fit
│   ├── ProbeTimeout
│   ├── KeyRefused          401 or 403
│   ├── ProviderLimited     429
│   └── UnexpectedAnswer    another status, or a body that cannot be read
└── LedgerError
    ├── StoreUnavailable    the store did not answer in time; nothing was decided
    └── SchemaMismatch      the ledger is older or newer than this code
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datetime import datetime

    from metering.admission.protocol import Decision

__all__ = [
    "AccountConflict",
    "AddressRefused",
    "AmbiguousRate",
    "Conflict",
    "ConnectionFailed",
    "CorrectionConflict",
    "EventsArchived",
    "HostNotFound",
    "IdempotencyConflict",
    "IdempotencyInProgress",
    "InvalidEvent",
    "InvalidFile",
    "InvalidPlan",
    "InvalidReport",
    "InvalidSetting",
    "InvalidUsage",
    "InvoiceConflict",
    "KeyRefused",
    "LedgerError",
    "LimitExceeded",
    "MeteringError",
    "NoProviderKey",
    "NotFound",
    "PeriodClosed",
    "ProbeFailed",
    "ProbeTimeout",
    "ProviderLimited",
    "Replayed",
    "RevokedKey",
    "SchemaMismatch",
    "SettleConflict",
    "StoreUnavailable",
    "TlsFailed",
    "UnexpectedAnswer",
    "UnknownAccount",
    "UnknownEncoding",
    "UnknownEvent",
    "UnknownInvoice",
    "UnknownKey",
    "UnknownPlan",
    "UnknownProvider",
    "UnknownReconciliation",
    "UnpricedUsage",
]


class MeteringError(Exception):
    """Root of everything this library raises on purpose."""


class _FieldError(MeteringError, ValueError):
    """A value that cannot be used: names the field, shows the value, says what was expected."""

    def __init__(self, field: str, value: object, expected: str) -> None:
        super().__init__(f"{field}: got {_shown(value)}, expected {expected}")
        self.field = field
        self.value = value
        self.expected = expected


class InvalidEvent(_FieldError):
    """A fact that cannot be billed as given."""


class InvalidUsage(InvalidEvent):
    """Token counts that cannot be: negative, not whole, or a subset larger than its total."""


class InvalidSetting(_FieldError):
    """A setting or an argument that cannot be used."""


class InvalidReport(_FieldError):
    """A provider's report of usage or costs that says something else than it should. `field` is the place in it."""


class InvalidFile(MeteringError):
    """A file that cannot be read, or not to its end."""

    def __init__(self, path: object, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path
        self.problem = problem


class InvalidPlan(MeteringError, ValueError):
    """A plan that cannot be used. `where` is its place, such as `plans.pro.rates[2]`; `line` counts from 1."""

    def __init__(self, where: str, problem: str, *, line: int | None = None) -> None:
        super().__init__(f"{where}{f' (line {line})' if line else ''}: {problem}")
        self.where = where
        self.problem = problem
        self.line = line


class AmbiguousRate(MeteringError):
    """Two rates claim the same usage and neither is more specific than the other."""


class UnpricedUsage(MeteringError):
    """Cost-plus items are not issued while the provider cost of some of their usage is unknown."""

    def __init__(self, message: str, *, requests: int) -> None:
        super().__init__(message)
        self.requests = requests


class NotFound(MeteringError, LookupError):
    """Something named is not there."""


class UnknownAccount(NotFound):
    """No account of that name."""

    def __init__(self, account: str) -> None:
        super().__init__(
            f"account {account!r} is not known: create it with keys.create or `tallystick accounts create`"
        )
        self.account = account


class UnknownPlan(NotFound):
    """No plan of that name, neither in the ledger nor built in."""

    def __init__(self, plan: str, known: list[str]) -> None:
        super().__init__(f"plan {plan!r} is not known; known plans: {', '.join(sorted(known)) or 'none'}")
        self.plan = plan
        self.known = known


class UnknownKey(NotFound):
    """No such API key. The key itself is never shown."""

    def __init__(self, hint: str = "the API key presented is not known") -> None:
        super().__init__(hint)


class UnknownEvent(NotFound):
    """No event of that id."""

    def __init__(self, event_id: object) -> None:
        super().__init__(f"event {event_id} is not in the ledger")
        self.event_id = event_id


class EventsArchived(NotFound):
    """Events of the time asked for have left the ledger for an archive: nothing can be counted over them."""

    def __init__(self, account: str, period: str, last_at: datetime) -> None:
        super().__init__(
            f"events of account {account!r} up to {last_at.isoformat()} are archived: ask for what came after, or read "
            f"them with `python -m flows restore {period}`"
        )
        self.account = account
        self.period = period
        self.last_at = last_at


class UnknownReconciliation(NotFound):
    """No reconciliation of that number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"reconciliation {number} is not in the ledger")
        self.number = number


class UnknownInvoice(NotFound):
    """No final document of that number."""

    def __init__(self, number: str) -> None:
        super().__init__(f"{number!r} is not the number of a final document, such as INV-000001")
        self.number = number


class UnknownProvider(NotFound):
    """A provider whose rate limits are not known here."""

    def __init__(self, provider: object, known: list[str]) -> None:
        super().__init__(f"the limits of provider {_shown(provider)} are not known; known: {', '.join(known)}")
        self.provider = provider
        self.known = known


class UnknownEncoding(NotFound):
    """No tokenizer for a model, or no table of an encoding on this machine. `asked` is which, `problem` what to do."""

    def __init__(self, asked: str, problem: str) -> None:
        super().__init__(f"{asked}: {problem}")
        self.asked = asked
        self.problem = problem


class Conflict(MeteringError):
    """What was asked contradicts what is already recorded."""


class AccountConflict(Conflict):
    """The account exists, and differs from what was asked."""

    def __init__(self, account: str, field: str, recorded: object, asked: object) -> None:
        super().__init__(f"account {account!r} has {field} {recorded!r}, not {asked!r}; change it explicitly")
        self.account = account
        self.field = field
        self.recorded = recorded
        self.asked = asked


class IdempotencyConflict(Conflict):
    """The idempotency key was used before, with another request."""

    def __init__(self, line: str, idempotency_key: str | None) -> None:
        super().__init__(f"idempotency key {idempotency_key!r} on line {line!r} was used before with another request")
        self.line = line
        self.idempotency_key = idempotency_key


class IdempotencyInProgress(Conflict):
    """A call with this idempotency key is still running. Try again in `retry_after_s` seconds at the latest."""

    def __init__(self, line: str, idempotency_key: str | None, retry_after_s: float) -> None:
        super().__init__(
            f"a call with idempotency key {idempotency_key!r} on line {line!r} is in progress; "
            f"it ends within {retry_after_s:.0f} s"
        )
        self.line = line
        self.idempotency_key = idempotency_key
        self.retry_after_s = retry_after_s


class SettleConflict(Conflict):
    """The hold was settled before, with other usage. The first settle stands."""


class CorrectionConflict(Conflict):
    """The fact to correct has changed since it was read."""


class PeriodClosed(Conflict):
    """The billing period is closed: what comes late is billed with the account's next invoice."""

    def __init__(self, account: str, period: str) -> None:
        super().__init__(f"period {period} of account {account!r} is closed already")
        self.account = account
        self.period = period


class InvoiceConflict(Conflict):
    """A final document that this cannot be done to, or that is not what was written."""

    def __init__(self, number: str, problem: str) -> None:
        super().__init__(f"{number}: {problem}")
        self.number = number
        self.problem = problem


class RevokedKey(MeteringError):
    """The key was revoked, or its grace time after a rotation is over."""

    def __init__(self, key_id: str, account: str) -> None:
        super().__init__(f"API key {key_id} of account {account!r} is no longer valid")
        self.key_id = key_id
        self.account = account


class LimitExceeded(MeteringError):
    """A limit refused the call. Nothing was counted. `decision.refused_by` is the limit."""

    def __init__(self, decision: Decision) -> None:
        refused = decision.refused_by
        assert refused is not None
        super().__init__(
            f"limit {refused.limit} of account {decision.account!r} would be exceeded: "
            f"asked {refused.asked}, used {refused.used} of {refused.max}"
            + (f"; resets at {refused.reset_at.isoformat()}" if refused.reset_at else "")
        )
        self.decision = decision
        self.limit = refused.limit
        self.used = refused.used
        self.max = refused.max
        self.remaining = refused.remaining
        self.reset_at = refused.reset_at
        self.retry_after_s = refused.retry_after_s


class Replayed(MeteringError):
    """The call was answered before. `response` is what was stored, None where it is no longer kept."""

    def __init__(self, decision: Decision) -> None:
        super().__init__(f"event {decision.event_id} was already billed; its stored response is attached")
        self.decision = decision
        self.response: Any = decision.response


class ProbeFailed(MeteringError):
    """A provider could not be asked for its limits, or did not answer as it should. The key is never shown."""

    def __init__(self, provider: str, problem: str, *, status: int | None = None) -> None:
        super().__init__(f"{provider}: {problem}")
        self.provider = provider
        self.problem = problem
        self.status = status
        """Of the answer, where there is one."""


class NoProviderKey(ProbeFailed):
    """There is no key to ask with."""


class AddressRefused(ProbeFailed):
    """The base URL is none that a key is sent to: not https, or of a private address, and not allowed."""


class HostNotFound(ProbeFailed):
    """The name of the host has no address."""


class ConnectionFailed(ProbeFailed):
    """No connection, or it broke."""


class TlsFailed(ConnectionFailed):
    """No TLS, or a certificate that does not fit."""


class ProbeTimeout(ProbeFailed):
    """There was no whole answer in time."""


class KeyRefused(ProbeFailed):
    """The provider refuses the key, with 401 or 403."""


class ProviderLimited(ProbeFailed):
    """The provider refuses for a rate limit, with 429."""


class UnexpectedAnswer(ProbeFailed):
    """Another status, or a body that cannot be read."""


class LedgerError(MeteringError):
    """The ledger, or the store that decides admissions, cannot serve."""


class StoreUnavailable(LedgerError):
    """The store did not answer in time, or cannot write. Not a refusal: nothing was decided."""


class SchemaMismatch(LedgerError):
    """The ledger's schema is older or newer than this code; the message says what to upgrade."""


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001  whatever an app's own object raises
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 200 else text[:197] + "..."
