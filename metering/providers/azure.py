"""Azure OpenAI: limits of a deployment (https://learn.microsoft.com/azure/ai-services/openai/how-to/quota).

The base URL is the resource's, https://NAME.openai.azure.com. Its models can be listed
(https://learn.microsoft.com/rest/api/microsoft-foundry/azureopenai/models), its deployments cannot. Headers are named
as OpenAI's are, but -1 is what is not known (https://github.com/openai/openai-dotnet/issues/838), and a reset is a
number without a unit: seconds in some answers (https://github.com/openai/openai-python/issues/937, where the header is
spelled in another way, too), milliseconds in others. Where a renewal period stands beside it, the unit is the one in
which the number is the part of the period that corresponds to what is used. Without it, or where both units fit, the
reset is not read.
"""

from __future__ import annotations

import re
from datetime import timedelta
from fractions import Fraction
from typing import TYPE_CHECKING

from metering.providers.header_values import count, seconds
from metering.providers.openai_like import PREFIXES, openai_limits, openai_probe

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

__all__ = ["AZURE_LIMITS", "AZURE_PROBE"]

UNITS = (1_000_000, 1_000)
"""Microseconds of a second, and of a millisecond."""


def _reset(text: str, now: datetime, parts: Mapping[str, str]) -> datetime | None:
    number = seconds(text)
    if number == 0:
        return now if "limit" in parts else None
    try:
        limit, remaining, period = (count(parts[part]) for part in ("limit", "remaining", "renewalperiod"))
        expected = Fraction(limit - remaining, limit) * period * UNITS[0]
    except (KeyError, ValueError, ZeroDivisionError):
        raise ValueError("a renewal period beside it, without which it has no unit") from None
    fitting = [unit for unit in UNITS if abs(number * unit - expected) <= unit + expected / 10]
    if len(fitting) != 1:
        raise ValueError(f"a number that fits the renewal period of {period} s in one unit")
    return now + timedelta(microseconds=int(number * fitting[0]))


AZURE_LIMITS = openai_limits(
    "azure",
    aliases=("azure-openai",),
    prefixes=(*PREFIXES, "x-rate-limit-"),
    header=re.compile(
        r"x-rate-?limit-(?P<part>limit|remaining|reset|renewalperiod)-(?P<window>[a-z0-9-]+)",
    ),
    unknown="-1",
    reset=_reset,
)

AZURE_PROBE = openai_probe(
    "",
    headers=lambda key: {"api-key": key},
    models_path="/openai/v1/models",
    key_variable="AZURE_OPENAI_API_KEY",
    url_variable="AZURE_OPENAI_ENDPOINT",
)
