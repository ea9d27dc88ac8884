"""An app that learns from conversations: five searches and a publish, sold by what they bring.

    $ pip install 'tallystick[fastapi,tokens]' uvicorn
    $ tallystick init
    $ uvicorn examples.learning_app:create_app --factory    # brings the plan `learning`
    $ tallystick keys create acme --plan learning           # shows the key, once
    $ curl localhost:8000/publish -H "x-api-key: $KEY" --json '{"text": "I prefer tea. Always be brief."}'
    $ curl "localhost:8000/search/preferences?q=tea" -H "x-api-key: $KEY"
    $ curl "localhost:8000/search/preferences?q=tea" -H "x-account: acme"       # one of our own: recorded, not billed
    $ tallystick usage acme --by line

Whoever shows an API key is a `production_agent`: its calls are admitted on the line `calls`, which the plan limits and
does not sell, and what they bring is a signal on the line that is sold. Without a key the caller type is what
`get_caller_type` says. That one is trusted to name its account: keep it inside, or let `get_caller_type` raise.
"""

# FastAPI reads annotations while the app runs.

from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Query, Request
from pydantic import BaseModel, Field

from metering import AsyncMeter, Limit, Plan, Rate, TokenUsage
from metering.events import CallerType
from metering.integrations.fastapi import billing_gate, caller_type, install
from metering.integrations.starlette import quota
from metering.signals import Operation, Run, add_tokens, applied_learnings, learnings_generated
from metering.tokens import count_input_tokens

CALLS = "calls"
PLAN = Plan(
    name="learning",
    retention_days=30,
    limits=(Limit(metric="requests", rate="120/minute"), Limit(metric="requests", per="month", max=Decimal(100_000))),
    rates=(
        Rate.from_dict({"line": "application", "metric": "quantity", "type": "per_unit", "unit_amount": "0.002"}),
        Rate.from_dict(
            {"line": "learnings_generated", "metric": "quantity", "type": "per_unit", "unit_amount": "0.01"}
        ),
    ),
)

SHELVES = {
    "rules": ("always", "never"),
    "preferences": ("prefer", "like"),
    "profiles": ("i am",),
    "mistakes": ("wrong",),
}
"""What is learned, and the words that it is known by. Whole texts stand on a fifth shelf, `conversations`."""

PUBLISH = Operation("publish", emits_billing=True)


class Library:
    """Stands for a database: texts by account and shelf."""

    def __init__(self) -> None:
        self._texts: defaultdict[tuple[str, str], list[str]] = defaultdict(list)

    async def add(self, account: str, shelf: str, text: str) -> None:
        self._texts[account, shelf].append(text)

    async def search(self, account: str, shelf: str, words: str, limit: int) -> list[str]:
        texts = self._texts.get((account, shelf), [])
        return [text for text in texts if words.lower() in text.lower()][:limit]


async def learn(text: str) -> list[tuple[str, str]]:
    """Stands for a model that finds what is worth keeping: (shelf, sentence). What it took is told from in here."""
    found = [
        (shelf, sentence)
        for sentence in filter(None, map(str.strip, text.split(".")))
        for shelf, words in SHELVES.items()
        if any(word in sentence.lower() for word in words)
    ]
    said = "\n".join(sentence for _, sentence in found)
    add_tokens(
        TokenUsage(input_tokens=count_input_tokens(text), output_tokens=count_input_tokens(said)), model="learner-1"
    )
    return found


@dataclass(frozen=True, kw_only=True)
class Call:
    """Who calls, and how an operation of theirs is run."""

    account: str
    run: Callable[[Operation], Run]


class Found(BaseModel):
    results: list[str]


class Text(BaseModel):
    text: str = Field(min_length=1, max_length=100_000)


class Learned(BaseModel):
    learnings: int
    tokens: int
    """What the model took."""


def call_on(line: str) -> Callable[..., Awaitable[Call]]:
    """The dependency of endpoints that sell on a line: lets a call through, or answers why not."""
    admit = quota(CALLS)

    async def let_through(
        request: Request,
        _gate: Annotated[None, Depends(billing_gate(line))],
        caller: Annotated[CallerType, Depends(caller_type)],
        x_account: Annotated[str | None, Header()] = None,
        x_request_id: Annotated[str | None, Header()] = None,
        x_session_id: Annotated[str | None, Header()] = None,
        idempotency_key: Annotated[str | None, Header()] = None,
    ) -> Call:
        shows_key = "authorization" in request.headers or "x-api-key" in request.headers
        if shows_key or x_account is None:
            x_account, caller = (await admit(request)).account, "production_agent"

        async def record(**said: Any) -> bool:
            # Asked for only now: a meter that is not there is the signal's loss, not the caller's.
            return bool(await request.app.state.meter.record(**said))

        def run(operation: Operation) -> Run:
            return operation.run(
                record,
                account=x_account,
                caller_type=caller,
                request_id=x_request_id,
                session_id=x_session_id,
                idempotency_key=idempotency_key,
                llm=request.app.state.llm.get(x_account),
            )

        return Call(account=x_account, run=run)

    return let_through


def search_on(shelf: str) -> Callable[..., Awaitable[Found]]:
    """The endpoint that searches a shelf."""
    operation = Operation(f"search {shelf}", emits_billing=True)

    async def search(
        request: Request,
        call: Annotated[Call, Depends(call_on("application"))],
        q: Annotated[str, Query(max_length=200)] = "",
        limit: Annotated[int, Query(ge=1, le=50)] = 10,
    ) -> Found:
        async with call.run(operation) as run:
            results = await request.app.state.library.search(call.account, shelf, q, limit)
            run.emit(applied_learnings, results)
        return Found(results=results)

    return search


async def publish(
    text: Text, request: Request, call: Annotated[Call, Depends(call_on("learnings_generated"))]
) -> Learned:
    """Keep a conversation, and what is learned from it."""
    library = request.app.state.library
    async with call.run(PUBLISH) as run:
        learnings = run.result(await learn(text.text))
        for shelf, sentence in [("conversations", text.text), *learnings.value]:
            await library.add(call.account, shelf, sentence)
        run.emit(learnings_generated, len(learnings.value))
    return Learned(learnings=len(learnings.value), tokens=learnings.totals.total_tokens)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with AsyncMeter.from_env() as meter:
        await meter.apply_plans([PLAN])
        app.state.meter = meter
        yield


def create_app(
    get_caller_type: Callable[[Request], CallerType | Awaitable[CallerType]] | None = None,
    get_billing_gate: Callable[[str], Callable[[Request], object]] | None = None,
) -> FastAPI:
    """The app. The seams are those of `install`; `app.dependency_overrides` may override what they default to."""
    app = FastAPI(lifespan=lifespan)
    install(app, None, caller_type=get_caller_type, billing_gate=get_billing_gate)
    app.state.library = Library()
    app.state.llm = {}  # by account: the customer's own LLM configuration, where there is one
    for shelf in (*SHELVES, "conversations"):
        app.add_api_route(f"/search/{shelf}", search_on(shelf), methods=["GET"], name=f"search {shelf}")
    app.add_api_route("/publish", publish, methods=["POST"])
    return app
