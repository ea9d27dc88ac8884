"""An app for servers in processes of their own: what its endpoints did is counted outside, in the file of RAN."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, FastAPI
from fastapi.responses import StreamingResponse

from metering import AsyncMeter, TokenUsage
from metering.integrations.fastapi import RequestHold, install, quota

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

Known = Annotated[RequestHold, Depends(quota("application"))]
Guessed = Annotated[RequestHold, Depends(quota("application", estimate=TokenUsage(input_tokens=10, output_tokens=50)))]

app = FastAPI()
install(app, AsyncMeter.from_env(create=False))
ran = os.open(os.environ["RAN"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


@app.post("/run")
async def run(hold: Known) -> dict[str, str]:
    os.write(ran, b"ran\n")
    await asyncio.sleep(0.01)
    return {"by": str(os.getpid()), "account": hold.account}


@app.get("/who")
async def who() -> int:
    return os.getpid()


@app.post("/endless")
async def endless(hold: Guessed) -> StreamingResponse:
    async def words() -> AsyncIterator[str]:
        yield "word"
        await asyncio.Event().wait()

    return StreamingResponse(words())
