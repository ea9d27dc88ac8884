"""One name for a provider and a model, however they are spelled."""

from __future__ import annotations

import pytest

from tasks.models import canonical_model, canonical_provider


@pytest.mark.parametrize(
    ("provider", "model", "known_provider", "known_model"),
    [
        ("openai", "gpt-4.1", "openai", "gpt-4.1"),
        ("openai", "gpt-4.1-2025-04-14", "openai", "gpt-4.1"),
        (None, "GPT-4.1", "openai", "gpt-4.1"),
        ("openai.responses", "gpt-4.1", "openai", "gpt-4.1"),
        ("azure", "gpt-4.1", "azure", "gpt-4.1"),
        ("anthropic", "claude-sonnet-4-5-20250929", "anthropic", "claude-sonnet-4-5"),
        (None, "claude-sonnet-4-5", "anthropic", "claude-sonnet-4-5"),
        ("openrouter", "openai/gpt-4.1-2025-04-14", "openrouter", "openai/gpt-4.1"),
        ("openai", "gpt-4o-2024-05-13", "openai", "gpt-4o-2024-05-13"),  # has a price of its own
        ("openai", "ft:GPT-4.1:acme", "openai", "ft:gpt-4.1:acme"),
        ("aws.bedrock", "mystery", "aws", "mystery"),
        ("Nobody", "gpt-4.1", "nobody", "gpt-4.1"),
        ("openai", None, "openai", None),
        (None, "mystery", None, "mystery"),
        (None, "", None, ""),
        (None, None, None, None),
    ],
)
def test_names(provider: str | None, model: str | None, known_provider: str | None, known_model: str | None) -> None:
    assert canonical_provider(provider, model) == known_provider
    assert canonical_model(provider, model) == known_model
