"""The example, as its first lines say to run it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx
import pytest

from metering import Meter
from tests.integrations.conftest import in_processes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def meter(tmp_path: Path) -> Iterator[Meter]:
    with Meter(f"sqlite:///{tmp_path / 'ledger.db'}") as meter:
        yield meter


def test_the_example_app(meter: Meter, tmp_path: Path) -> None:
    secret = meter.keys.create("acme", plan="pro").secret
    with (
        in_processes("examples.fastapi_app:app", folder=tmp_path, METERING_HOME=str(tmp_path)) as (url, _),
        httpx.Client(base_url=url, headers={"authorization": f"Bearer {secret}"}, timeout=20) as client,
    ):
        ask = {"prompt": "say this again", "max_tokens": 8}
        answers = [client.post("/answer", json=ask, headers={"idempotency-key": "1"}) for _ in range(2)]
        assert [answer.json() for answer in answers] == [{"answer": "say this again "}] * 2
        assert answers[1].headers["idempotent-replayed"] == "true"
        streamed = client.post("/stream", json=ask)
        assert streamed.text.splitlines()[::2] == ["data: say ", "data: this ", "data: again ", "data: [DONE]"]
        assert client.post("/answer", json={"prompt": ""}).status_code == 422
        assert client.post("/answer", json=ask, headers={"authorization": ""}).status_code == 401
        learned = client.post("/accounts/acme/learnings", params={"count": 3})
        assert (learned.status_code, learned.json()) == (202, {"recorded": True})
        assert client.get("/openapi.json").status_code == 200
    totals = {total.group: total for total in meter.usage("acme", by="line")}
    application = totals["application"]
    assert (application.requests, application.input_tokens, application.output_tokens) == (2, 6, 6)
    assert totals["learnings_generated"].quantity == 3
    assert meter.quota("acme")[0].used == 2
