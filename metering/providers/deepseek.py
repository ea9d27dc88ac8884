"""DeepSeek (https://api-docs.deepseek.com/api/get-user-balance): no rate limits, but a balance; 402 when there is none.

Amounts are decimal texts, in USD or CNY.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from metering.providers.limit_bodies import objects, said
from metering.providers.limits import BodySays, LimitRule
from metering.providers.openai_like import openai_probe

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["DEEPSEEK_LIMITS", "DEEPSEEK_PROBE"]


def _balance(body: Mapping[str, Any]) -> BodySays:
    return BodySays(
        windows={
            f"credits_{info['currency'].lower()}": said(info, place, remaining="total_balance")
            for place, info in objects(body, "balance_infos")
            if isinstance(info.get("currency"), str)
        }
    )


DEEPSEEK_LIMITS = LimitRule(provider="deepseek", body=_balance)

DEEPSEEK_PROBE = openai_probe(
    "https://api.deepseek.com", models_path="/models", key_path="/user/balance", key_variable="DEEPSEEK_API_KEY"
)
