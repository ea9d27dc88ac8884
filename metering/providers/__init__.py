"""What is asked of the providers' own accounts, a small file each: their usage and cost reports (pure).

A provider says what to ask and how its answer is read; who asks is the jobs' business (`tasks/provider_reports.py`).
"""

from __future__ import annotations

from metering.providers.registry import PROVIDERS, provider_named
from metering.providers.reports import Counts, Page, Provider, Question, Report, ReportDay, ReportRow

__all__ = [
    "PROVIDERS",
    "Counts",
    "Page",
    "Provider",
    "Question",
    "Report",
    "ReportDay",
    "ReportRow",
    "provider_named",
]
