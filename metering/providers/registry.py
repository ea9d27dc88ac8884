"""The known providers. Another one is a file with `Provider`, or `LimitRule` and `ProbeRule`, and a line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from metering.errors import InvalidSetting, UnknownProvider
from metering.providers.anthropic import ANTHROPIC, ANTHROPIC_LIMITS, ANTHROPIC_PROBE
from metering.providers.ollama import OLLAMA_LIMITS, OLLAMA_PROBE
from metering.providers.openai import OPENAI, OPENAI_LIMITS, OPENAI_PROBE
from metering.providers.openrouter import OPENROUTER

if TYPE_CHECKING:
    from metering.providers.limits import LimitRule
    from metering.providers.reports import Provider

__all__ = ["LIMIT_RULES", "PROBE_RULES", "PROVIDERS", "limit_rule_named", "provider_named"]

PROVIDERS = {provider.name: provider for provider in (OPENAI, ANTHROPIC, OPENROUTER)}
"""Those whose reports are known."""

LIMIT_RULES = {rule.provider: rule for rule in (ANTHROPIC_LIMITS, OPENAI_LIMITS, OLLAMA_LIMITS)}
"""Those whose rate limits are known."""

PROBE_RULES = {"anthropic": ANTHROPIC_PROBE, "openai": OPENAI_PROBE, "ollama": OLLAMA_PROBE}
"""How those are asked."""

_BY_NAME = {name: rule for rule in LIMIT_RULES.values() for name in (rule.provider, *rule.aliases)}


def provider_named(name: str) -> Provider:
    """One of PROVIDERS. Raises `InvalidSetting`."""
    if name not in PROVIDERS:
        raise InvalidSetting("provider", name, f"one of {', '.join(PROVIDERS)}")
    return PROVIDERS[name]


def limit_rule_named(name: str) -> LimitRule:
    """One of LIMIT_RULES, by its provider's name or an alias, in any case. Raises `UnknownProvider`."""
    rule = _BY_NAME.get(name.lower()) if isinstance(name, str) else None
    if rule is None:
        raise UnknownProvider(name, list(LIMIT_RULES))
    return rule
