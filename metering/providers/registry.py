"""The providers whose reports are known. A further one is a file with its `Provider`, and a line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from metering.errors import InvalidSetting
from metering.providers.anthropic import ANTHROPIC
from metering.providers.openai import OPENAI
from metering.providers.openrouter import OPENROUTER

if TYPE_CHECKING:
    from metering.providers.reports import Provider

__all__ = ["PROVIDERS", "provider_named"]

PROVIDERS = {provider.name: provider for provider in (OPENAI, ANTHROPIC, OPENROUTER)}


def provider_named(name: str) -> Provider:
    """One of PROVIDERS. Raises `InvalidSetting`."""
    if name not in PROVIDERS:
        raise InvalidSetting("provider", name, f"one of {', '.join(PROVIDERS)}")
    return PROVIDERS[name]
