"""Any sequence of calls leaves the store where a model of twenty lines is left."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine

from metering.errors import IdempotencyConflict, IdempotencyInProgress, LimitExceeded, Replayed
from metering.events import TokenUsage
from metering.plans import Limit
from metering.windows import calendar_window

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

LIMITS = (
    Limit(metric="requests", per="day", max=7),
    Limit(metric="tokens", per="hour", max=20),
    Limit(metric="requests", per="hour", max=3, scope="key"),
    Limit(metric="tokens", per="day", max=15, line="b"),
)
TTL = timedelta(minutes=15)

callers = st.sampled_from([("acme", 0), ("acme", 1), ("other", 0), ("other", 1)])
lines = st.sampled_from("ab")
names = st.sampled_from([None, None, "k1", "k2"])
requests = st.sampled_from(["q1", "q1", "q1", "q2"])
sizes = st.integers(1, 9)


@dataclass
class Fact:
    """What the model knows of one admitted call."""

    account: str
    key: int
    line: str
    at: datetime
    tokens: int
    name: str | None
    request: str
    state: str
    """billed, open, released or expired."""
    expires_at: datetime | None = None
    hold: Any = None


class StoreMachine(RuleBasedStateMachine):
    """Runs every step on the store and on a list of facts, and compares."""

    holds = Bundle("holds")

    def __init__(self, open_shop: Callable[..., Any]) -> None:
        super().__init__()
        self.now = datetime(2026, 3, 12, 22, 40, tzinfo=UTC)
        self.shop = open_shop(lambda: self.now)
        self.facts: list[Fact] = []
        self.secrets: dict[tuple[str, int], str] = {}
        self.key_ids: dict[tuple[str, int], str] = {}
        for account in ("acme", "other"):
            first = self.shop.open_account(*LIMITS, account=account)
            for index, secret in enumerate((first, self.shop.meter.keys.create(account).secret)):
                self.secrets[account, index] = secret
                self.key_ids[account, index] = self.shop.meter.authenticate(secret).key_id

    def used(self, limit: Limit, account: str, key: int) -> int:
        window = calendar_window(limit.per, self.now)  # type: ignore[arg-type]
        counted = [
            fact
            for fact in self.facts
            if fact.account == account
            and fact.state in ("billed", "open")
            and window.start <= fact.at < window.end
            and limit.line in ("*", fact.line)
            and (limit.scope == "account" or fact.key == key)
        ]
        return len(counted) if limit.metric == "requests" else sum(fact.tokens for fact in counted)

    def expected(self, caller: tuple[str, int], line: str, name: str | None, request: str, size: int) -> str:
        """What the store must answer; marks the holds that the admission expires."""
        account, key = caller
        gone = [fact for fact in self.facts if fact.account == account and self._is_over(fact)]
        for fact in self.facts:
            if name is None or (fact.account, fact.line, fact.name) != (account, line, name) or fact in gone:
                continue
            if fact.state in ("billed", "open") and fact.request != request:
                return "conflict"
            if fact.state == "open":
                return "in progress"
        for fact in gone:
            fact.state = "expired"
        if name is not None and any(
            (fact.account, fact.line, fact.name, fact.state) == (account, line, name, "billed") for fact in self.facts
        ):
            return "replayed"
        for limit in LIMITS:
            asked = 1 if limit.metric == "requests" else size
            if limit.line in ("*", line) and self.used(limit, account, key) + asked > limit.max:  # type: ignore[operator]
                return "refused"
        return "admitted"

    def _is_over(self, fact: Fact) -> bool:
        return fact.state == "open" and fact.expires_at is not None and fact.expires_at <= self.now

    def _fact(self, caller: tuple[str, int], line: str, name: str | None, request: str, size: int, state: str) -> Fact:
        self.facts.append(Fact(*caller, line, self.now, size, name, request, state))
        return self.facts[-1]

    @rule(caller=callers, line=lines, name=names, request=requests, size=sizes)
    def consume(self, caller: tuple[str, int], line: str, name: str | None, request: str, size: int) -> None:
        expected = self.expected(caller, line, name, request, size)
        try:
            decision = self.shop.consume(
                self.secrets[caller], size, line=line, idempotency_key=name, request=request, response=request
            )
            answer = "replayed" if decision.replayed else "admitted" if decision.allowed else "refused"
        except IdempotencyConflict:
            answer = "conflict"
        except IdempotencyInProgress:
            answer = "in progress"
        assert answer == expected
        if answer == "admitted":
            self._fact(caller, line, name, request, size, "billed")

    @rule(target=holds, caller=callers, line=lines, name=names, request=requests, size=sizes)
    def reserve(self, caller: tuple[str, int], line: str, name: str | None, request: str, size: int) -> Any:
        expected = self.expected(caller, line, name, request, size)
        hold = None
        try:
            hold = self.shop.reserve(self.secrets[caller], size, line=line, idempotency_key=name, request=request)
            answer = "admitted"
        except LimitExceeded:
            answer = "refused"
        except Replayed:
            answer = "replayed"
        except IdempotencyConflict:
            answer = "conflict"
        except IdempotencyInProgress:
            answer = "in progress"
        assert answer == expected
        if hold is None:
            return multiple()
        fact = self._fact(caller, line, name, request, size, "open")
        fact.expires_at, fact.hold = self.now + TTL, hold
        return fact

    @rule(fact=holds, size=sizes)
    def settle(self, fact: Fact, size: int) -> None:
        if fact.hold.settled is not None:
            repeated = fact.hold.settle(TokenUsage(input_tokens=fact.tokens))
            assert repeated.repeated
            return
        is_first = fact.name is None or not any(
            (other.account, other.line, other.name, other.state) == (fact.account, fact.line, fact.name, "billed")
            for other in self.facts
        )
        settled = fact.hold.settle(TokenUsage(input_tokens=size))
        assert (settled.late, settled.billable, settled.repeated) == (fact.state != "open", is_first, False)
        fact.state, fact.tokens = "billed", size
        if not is_first:
            fact.name = None

    @rule(fact=holds)
    def release(self, fact: Fact) -> None:
        was_open = fact.state == "open"
        assert fact.hold.release() == was_open
        if was_open:
            fact.state = "released"

    @precondition(lambda self: any(self._is_over(fact) for fact in self.facts))
    @rule()
    def sweep(self) -> None:
        over = [fact for fact in self.facts if self._is_over(fact)]
        assert self.shop.meter.expire_holds() == len(over)
        for fact in over:
            fact.state = "expired"

    @rule(minutes=st.sampled_from([1, 8, 15, 40]))
    def wait(self, minutes: int) -> None:
        self.now += timedelta(minutes=minutes)

    @invariant()
    def the_store_stands_where_the_model_does(self) -> None:
        for account, key in self.secrets:
            statuses = self.shop.meter.quota(account, key_id=self.key_ids[account, key])
            assert [status.used for status in statuses] == [self.used(limit, account, key) for limit in LIMITS]
        assert self.shop.count("events") == sum(fact.state == "billed" for fact in self.facts)

    def teardown(self) -> None:
        self.shop.close()


def test_the_store_agrees_with_the_model(open_shop: Callable[..., Any], request: pytest.FixtureRequest) -> None:
    examples = 40 if "[sqlite]" in request.node.name else 6  # the others pay a round trip for each step
    run_machine(lambda: StoreMachine(open_shop), settings=settings(max_examples=examples, stateful_step_count=30))
