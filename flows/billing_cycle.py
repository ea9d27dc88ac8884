"""The main job: aggregate what was recorded, then bill one period."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefect import flow

from flows.aggregate_usage import aggregate_usage
from flows.bill_period import bill_period
from flows.command import run

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["billing_cycle"]


@flow
def billing_cycle(period: str | None = None) -> Path:
    """Run the jobs of one period (`YYYY-MM`, last month unless said) in order. Returns the index page's path."""
    aggregate_usage()
    return bill_period(period)


if __name__ == "__main__":
    run(billing_cycle)
