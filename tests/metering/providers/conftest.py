"""A provider on the loopback, and asking it."""

from __future__ import annotations

import json
import traceback
from typing import TYPE_CHECKING, Any

import pytest

from metering.providers import conversation
from metering.providers.probing import Credential, Memory, ProviderStatus, probe_sync
from tests.metering.providers.probe_server import ADMIN_KEY, KEY, ProbeServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import Clock


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is waited for before another attempt."""
    monkeypatch.setattr(conversation, "_drawn", lambda: 0.0)


@pytest.fixture
def server() -> Iterator[ProbeServer]:
    with ProbeServer() as running:
        yield running


@pytest.fixture
def ask(server: ProbeServer, clock: Clock) -> Callable[..., ProviderStatus]:
    """Probes the server, with a memory of this test's own."""
    memory = Memory()

    def once(provider: str = "openai", *, force_refresh: bool = False, timeout_s: float = 20, **more: Any) -> Any:
        credential = Credential(**{"id": "acme", "provider": provider, "key": KEY, "base_url": server.url, **more})
        status = probe_sync(credential, force_refresh=force_refresh, timeout_s=timeout_s, clock=clock, memory=memory)
        hidden(status)
        return status

    return once


def hidden(status: ProviderStatus) -> None:
    """Nothing of a key in what is told."""
    told = [repr(status), json.dumps(status.to_dict())]
    if status.error is not None:
        assert (status.error.__traceback__, status.error.__cause__, status.error.__context__) == (None, None, None)
        told += [str(status.error), repr(status.error), *traceback.format_exception(status.error)]
    for key in (KEY, ADMIN_KEY):
        assert key[3:] not in "".join(told)
