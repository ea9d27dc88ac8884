"""One name for a provider and for a model, however they are spelled: by genai-prices, which costs are computed with."""

from __future__ import annotations

from functools import lru_cache

from metering.payloads.registry import known_provider

__all__ = ["canonical_model", "canonical_provider"]

NAMES_KEPT = 10_000
"""Apps name models, so there may be any number."""


def canonical_model(provider: str | None, model: str | None) -> str | None:
    """The model's one name: `gpt-4.1` for `gpt-4.1-2025-04-14`. In lower case where it is not known; None for none."""
    if model is None:
        return None
    found = _found(provider, model)
    return model.lower() if found is None else found[1]


def canonical_provider(provider: str | None, model: str | None) -> str | None:
    """The provider's one name: `openai` for `openai.responses`, and for no provider at all with the model `gpt-4.1`.

    That is also whose prices such a call is costed by. None where neither tells.
    """
    found = None if model is None else _found(provider, model)
    if found is not None:
        return found[0]
    return None if provider is None else known_provider(provider) or provider.lower()


@lru_cache(maxsize=NAMES_KEPT)
def _found(provider: str | None, model: str) -> tuple[str, str] | None:
    """Provider and model as genai-prices names them; None where it does not know the model."""
    from genai_prices import Usage, calc_price  # noqa: PLC0415  a third of a second

    try:
        price = calc_price(Usage(), model, provider_id=provider)
    except (LookupError, ValueError):
        return None
    return price.provider.id, price.model.id
