"""Doing the steps of a verb, one after the other: on the thread that asked, or on an event loop."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, TypeVar

from metering.admission.redis.steps import Ask, Call, Pause, Read

if TYPE_CHECKING:
    from metering.admission.redis.aio_link import AsyncLink
    from metering.admission.redis.link import Link
    from metering.admission.redis.steps import Steps

__all__ = ["drive", "drive_async"]

T = TypeVar("T")


def drive(steps: Steps[T], link: Link) -> T:
    """What the verb returns. Raises what it raises."""
    resume, value = steps.send, None
    while True:
        try:
            step = resume(value)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        try:
            resume, value = steps.send, _do(step, link)
        except Exception as exc:  # noqa: BLE001  what it means is the verb's to say
            resume, value = steps.throw, exc


async def drive_async(steps: Steps[T], link: AsyncLink) -> T:
    """As `drive`; the ledger is read on another thread."""
    resume, value = steps.send, None
    while True:
        try:
            step = resume(value)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        try:
            resume, value = steps.send, await _do_async(step, link)
        except Exception as exc:  # noqa: BLE001  what it means is the verb's to say
            resume, value = steps.throw, exc


async def _do_async(step: Ask | Call | Read | Pause, link: AsyncLink) -> Any:
    match step:
        case Ask():
            return await link.script(step.shard, step.script, step.keys, step.args, step.timeout_s, era=step.era)
        case Read():
            return await asyncio.to_thread(step.work)
        case Pause():
            return await asyncio.sleep(step.seconds)
        case Call():
            return await link.call(step.shard, *step.command, timeout_s=step.timeout_s)


def _do(step: Ask | Call | Read | Pause, link: Link) -> Any:
    match step:
        case Ask():
            return link.script(step.shard, step.script, step.keys, step.args, step.timeout_s, era=step.era)
        case Read():
            return step.work()
        case Pause():
            # Nothing tells when a server is back, or another call has counted; whoever asks has a deadline.
            return time.sleep(step.seconds)
        case Call():
            return link.call(step.shard, *step.command, timeout_s=step.timeout_s)
