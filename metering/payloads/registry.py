"""The rules there are. A further shape is a file with its `Rule`, and a line here."""

from __future__ import annotations

import re

from metering.errors import InvalidUsage
from metering.payloads.anthropic import ANTHROPIC
from metering.payloads.bedrock import BEDROCK
from metering.payloads.cohere import COHERE
from metering.payloads.gemini import GEMINI
from metering.payloads.ollama import OLLAMA
from metering.payloads.openai_chat import CHAT
from metering.payloads.openai_responses import RESPONSES

__all__ = ["CHUNK_PLACES", "PLACES", "RULES", "SHAPES", "known_provider"]

RULES = (CHAT, RESPONSES, ANTHROPIC, GEMINI, BEDROCK, COHERE, OLLAMA)

SHAPES = ", ".join(rule.shape for rule in RULES)

PLACES = tuple(dict.fromkeys(place for rule in RULES for place in rule.places))
CHUNK_PLACES = {place: rule for rule in RULES for place in rule.chunk_places}

_OTHER_NAMES = {
    "anthropic": ("claude",),
    "aws": ("bedrock", "awsbedrock", "amazonbedrock"),
    "azure": ("azureopenai", "azureaiopenai", "azureaiinference"),
    "cerebras": (),
    "cohere": (),
    "deepseek": (),
    "google": ("gemini", "vertex", "vertexai", "gcpgemini", "gcpvertexai", "gcpgenai", "googlevertex", "googlegemini"),
    "groq": (),
    "huggingface": ("hf",),
    "mistral": ("mistralai",),
    "ollama": (),
    "openai": (),
    "openrouter": (),
    "together": ("togetherai",),
    "x-ai": ("xai", "grok"),
}
_NAMES = {name: known for known, others in _OTHER_NAMES.items() for name in (known.replace("-", ""), *others)}


def known_provider(provider: object) -> str | None:
    """The provider as genai-prices names it, from that or OpenTelemetry's name; None for one not known here.

    Raises `InvalidUsage` for what is no name.
    """
    if provider is None:
        return None
    if type(provider) is not str:
        raise InvalidUsage("provider", type(provider), "a name, such as openai")
    return _NAMES.get(re.sub(r"[\s._-]", "", provider).lower())
