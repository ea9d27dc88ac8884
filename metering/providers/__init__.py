"""The providers, a small file each: their usage and cost reports, and the rate limits that their answers carry.

A provider says what to ask for its reports and how they are read; who asks is the jobs' business
(`tasks/provider_reports.py`). Limits are read of any answer: `observe` an app's own ones, or `parse_limits` of headers.
All of that is pure; `metering.providers.probing` asks for limits over HTTP.
"""

from __future__ import annotations

from metering.providers.limits import Limits, LimitWindow
from metering.providers.observing import observe, parse_limits
from metering.providers.registry import PROVIDERS, provider_named
from metering.providers.reports import Counts, Page, Provider, Question, Report, ReportDay, ReportRow

__all__ = [
    "PROVIDERS",
    "Counts",
    "LimitWindow",
    "Limits",
    "Page",
    "Provider",
    "Question",
    "Report",
    "ReportDay",
    "ReportRow",
    "observe",
    "parse_limits",
    "provider_named",
]
