"""Models under one name each, whoever spells them."""

from __future__ import annotations

from functools import cache

__all__ = ["canonical_model"]


@cache
def canonical_model(provider: str | None, model: str | None) -> str | None:
    """The name that genai-prices knows a model by, so that `gpt-4.1-2025-04-14` is `gpt-4.1`; None for none.

    A model it does not know keeps its own name, in lower case. The provider only helps where it is known there.
    """
    if model is None:
        return None
    from genai_prices.data_snapshot import get_snapshot  # noqa: PLC0415  a third of a second

    for asked in dict.fromkeys((provider, None)):
        try:
            return get_snapshot().find_provider_model(model, None, asked, None)[1].id
        except LookupError:
            continue
    return model.lower()
