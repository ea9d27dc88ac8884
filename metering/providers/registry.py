"""The known providers. Another one is a file with `Provider`, or `LimitRule` and `ProbeRule`, and a line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from metering.errors import InvalidSetting, UnknownProvider
from metering.providers.anthropic import ANTHROPIC, ANTHROPIC_LIMITS, ANTHROPIC_PROBE
from metering.providers.azure import AZURE_LIMITS, AZURE_PROBE
from metering.providers.cerebras import CEREBRAS_LIMITS, CEREBRAS_PROBE
from metering.providers.cohere import COHERE_LIMITS, COHERE_PROBE
from metering.providers.deepseek import DEEPSEEK_LIMITS, DEEPSEEK_PROBE
from metering.providers.fireworks import FIREWORKS_LIMITS, FIREWORKS_PROBE
from metering.providers.gemini import GEMINI_LIMITS, GEMINI_PROBE
from metering.providers.groq import GROQ_LIMITS, GROQ_PROBE
from metering.providers.huggingface import HUGGINGFACE_LIMITS, HUGGINGFACE_PROBE
from metering.providers.mistral import MISTRAL_LIMITS, MISTRAL_PROBE
from metering.providers.ollama import OLLAMA_LIMITS, OLLAMA_PROBE
from metering.providers.openai import OPENAI, OPENAI_LIMITS, OPENAI_PROBE
from metering.providers.openai_compatible import OPENAI_COMPATIBLE_LIMITS, OPENAI_COMPATIBLE_PROBE
from metering.providers.openrouter import OPENROUTER, OPENROUTER_LIMITS, OPENROUTER_PROBE
from metering.providers.replicate import REPLICATE_LIMITS, REPLICATE_PROBE
from metering.providers.together import TOGETHER_LIMITS, TOGETHER_PROBE
from metering.providers.xai import XAI_LIMITS, XAI_PROBE

if TYPE_CHECKING:
    from metering.providers.limits import LimitRule
    from metering.providers.probes import ProbeRule
    from metering.providers.reports import Provider

__all__ = ["LIMIT_RULES", "PROBE_RULES", "PROVIDERS", "limit_rule_named", "provider_named"]

PROVIDERS = {provider.name: provider for provider in (OPENAI, ANTHROPIC, OPENROUTER)}
"""Those whose reports are known."""

_KNOWN: tuple[tuple[LimitRule, ProbeRule], ...] = (
    (ANTHROPIC_LIMITS, ANTHROPIC_PROBE),
    (OPENAI_LIMITS, OPENAI_PROBE),
    (OLLAMA_LIMITS, OLLAMA_PROBE),
    (AZURE_LIMITS, AZURE_PROBE),
    (CEREBRAS_LIMITS, CEREBRAS_PROBE),
    (COHERE_LIMITS, COHERE_PROBE),
    (DEEPSEEK_LIMITS, DEEPSEEK_PROBE),
    (FIREWORKS_LIMITS, FIREWORKS_PROBE),
    (GEMINI_LIMITS, GEMINI_PROBE),
    (GROQ_LIMITS, GROQ_PROBE),
    (HUGGINGFACE_LIMITS, HUGGINGFACE_PROBE),
    (MISTRAL_LIMITS, MISTRAL_PROBE),
    (OPENROUTER_LIMITS, OPENROUTER_PROBE),
    (REPLICATE_LIMITS, REPLICATE_PROBE),
    (TOGETHER_LIMITS, TOGETHER_PROBE),
    (XAI_LIMITS, XAI_PROBE),
    (OPENAI_COMPATIBLE_LIMITS, OPENAI_COMPATIBLE_PROBE),
)

LIMIT_RULES = {limits.provider: limits for limits, _ in _KNOWN}
"""Those whose rate limits are known."""

PROBE_RULES = {limits.provider: probe for limits, probe in _KNOWN}
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
