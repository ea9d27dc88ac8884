"""A small LLM API, metered: an endpoint, a streaming one, and one that records a signal.

    $ pip install 'tallystick[fastapi,tokens]' uvicorn
    $ tallystick init
    $ tallystick keys create acme --plan pro        # shows the key, once
    $ uvicorn examples.fastapi_app:app
    $ curl localhost:8000/answer -H "Authorization: Bearer $KEY" -H "Idempotency-Key: 1" --json '{"prompt": "Hello"}'
    $ curl localhost:8000/stream -H "Authorization: Bearer $KEY" --json '{"prompt": "Hello"}' --no-buffer
    $ tallystick usage acme

Every METERING_* setting holds here, so METERING_QUOTA_URL=redis://... is all it takes to share quotas between machines.
"""

# FastAPI reads annotations while the app runs.

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from metering import AsyncMeter, TokenUsage
from metering.integrations.fastapi import RequestHold, install, quota, recorder


class Parrot:
    """Stands for a provider's client: says what it was told, a word at a time, and what that came to."""

    async def complete(self, prompt: str, max_tokens: int) -> tuple[str, TokenUsage]:
        said = [word async for word in self.stream(prompt, max_tokens)]
        return "".join(said), TokenUsage(input_tokens=len(prompt.split()), output_tokens=len(said))

    async def stream(self, prompt: str, max_tokens: int) -> AsyncIterator[str]:
        for word in prompt.split()[:max_tokens]:
            await asyncio.sleep(0.001)
            yield f"{word} "


class Ask(BaseModel):
    prompt: str = Field(min_length=1, max_length=100_000)
    max_tokens: int = Field(default=256, ge=1, le=4_096)


def most_it_can_cost(ask: Ask) -> TokenUsage:
    """What is reserved before the model runs: the prompt is known, the answer is at most `max_tokens`."""
    return TokenUsage(input_tokens=len(ask.prompt.split()), output_tokens=ask.max_tokens)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with AsyncMeter.from_env() as meter:
        app.state.meter = meter
        yield


app = FastAPI(lifespan=lifespan)
install(app, None)  # the lifespan brings the meter; until then calls are answered 503
model = Parrot()

Hold = Annotated[
    RequestHold, Depends(quota("application", estimate=most_it_can_cost, provider="parrots", model="parrot-1"))
]


@app.post("/answer")
async def answer(ask: Ask, hold: Hold) -> dict[str, str]:
    text, usage = await model.complete(ask.prompt, ask.max_tokens)
    hold.settle(usage)
    return {"answer": text}


@app.post("/stream")
async def stream(ask: Ask, hold: Hold) -> StreamingResponse:
    async def events() -> AsyncIterator[str]:
        said = 0
        async for word in model.stream(ask.prompt, ask.max_tokens):
            hold.produced(word)  # counted, if the caller leaves before the usage is known
            said += 1
            yield f"data: {word}\n\n"
        hold.settle(TokenUsage(input_tokens=len(ask.prompt.split()), output_tokens=said))
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


@app.post("/accounts/{account}/learnings", status_code=202)
async def learned(
    account: str, count: int, record: Annotated[Callable[..., Awaitable[bool]], Depends(recorder)]
) -> dict[str, bool]:
    """For our own jobs, which have no key: recorded as `internal`, and not billed."""
    return {"recorded": await record(account=account, line="learnings_generated", quantity=count)}
