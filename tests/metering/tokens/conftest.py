from __future__ import annotations

import pytest

from metering.tokens import (
    encodings,
)

IN_THE_WHEEL = {"cl100k_base", "o200k_base", "o200k_harmony"}


@pytest.fixture(autouse=True)
def no_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.delenv("DATA_GYM_CACHE_DIR", raising=False)


@pytest.fixture
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encodings, "_coders", {})
