"""What the providers' usage and cost reports have in common: a UTC day, what it is grouped by, counts and money."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, fields
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import msgspec

from metering.checks import MAX_TOKENS
from metering.errors import InvalidReport, InvalidSetting
from metering.events import MAX_NAME

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

__all__ = [
    "ALL_MODELS",
    "COUNTS",
    "Counts",
    "Page",
    "Part",
    "Provider",
    "ProviderDay",
    "Question",
    "Report",
    "ReportDay",
    "ReportRow",
    "bucket_page",
    "day_from",
    "decode",
    "grouped",
    "row",
    "summed",
]

DAYS_PER_PAGE = 31
"""The most that OpenAI's usage and Anthropic's reports give at once."""

ONE_DAY = timedelta(days=1)
LAST_YEAR = 9_000
MAX_DIMENSIONS = 1_000
"""Characters of a row's dimensions as JSON, in the ledger."""
MAX_USD = Decimal(10) ** 15
MAX_TOKEN = 4_096
"""Characters of what the next page is asked with."""
PLACES = Decimal(10) ** -12
MAX_NAMES_SHOWN = 12

_decode = msgspec.json.Decoder(float_hook=Decimal).decode


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Calls and tokens, under the inclusive rules of `TokenUsage`. None is what the provider does not say."""

    requests: int | None = None
    input_tokens: int | None = None
    """Including what was read from and written to a cache."""
    cache_read_tokens: int | None = None
    cache_write_tokens: int | None = None
    cache_write_1h_tokens: int | None = None
    """Part of `cache_write_tokens`."""
    input_audio_tokens: int | None = None
    output_tokens: int | None = None
    """Including reasoning."""
    reasoning_tokens: int | None = None
    output_audio_tokens: int | None = None


COUNTS: tuple[str, ...] = tuple(field.name for field in fields(Counts))


ALL_MODELS = "*"
"""The model of a provider's whole day."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderDay:
    """One model of a provider on one UTC day, or all of them."""

    day: date
    provider: str
    model: str | None
    """By its one name (`tasks.models`); None for calls that name none; ALL_MODELS for the provider's whole day."""
    ours: Counts
    theirs: Counts
    """None where the provider does not say, or its report was not pulled."""
    difference: Counts
    """Ours without theirs, where both are said."""
    our_cost: Decimal | None = None
    """USD. Of the whole day alone, since not every provider tells a model's cost. None where theirs was not pulled."""
    their_cost: Decimal | None = None
    unpriced_requests: int = 0
    """Calls of ours without a known price: they are not in `our_cost`."""
    provisional: bool
    """Whether a report of the day may still change."""
    agrees: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportRow:
    """What is reported of one combination of what the report is grouped by."""

    dimensions: str
    """The combination, as a JSON object with sorted names; those that are null are left out."""
    model: str | None
    counts: Counts
    cost: Decimal | None
    """USD, to 12 decimals; below 0 for a credit. None where the report is not about money."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportDay:
    """The whole of one UTC day. Without rows nothing was used."""

    day: date
    rows: tuple[ReportRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """One answer."""

    days: tuple[ReportDay, ...]
    """Each day once."""
    next_page: str | None
    """What to ask the next page with; None after the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A GET."""

    path: str
    params: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Report:
    """One report of a provider."""

    name: str
    """As in the ledger: `usage`, `embeddings` or `cost`."""
    question: Callable[[date, date, str | None], Question]
    """What to ask for the days from the first to before the second, and for which page of them (None: the first)."""
    page: Callable[[object], Page]
    """Reads an answer, as `decode` gives it. Raises `InvalidReport`."""
    says_tokens: bool
    says_cost: bool
    says_empty_days: bool = True
    """Whether a day on which nothing was used is there, without rows."""
    completed_days: int | None = None
    """Only that many days before today can be asked for; None: any day, and today."""

    def reach(self, start: date, end: date, today: date) -> tuple[date, date]:
        """The part of a half-open range of days that can be asked for."""
        if self.completed_days is None:
            return start, min(end, today + ONE_DAY)
        return max(start, today - timedelta(days=self.completed_days)), min(end, today)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Provider:
    """Who reports, where, and which key it takes."""

    name: str
    """As genai-prices names it."""
    url: str
    """Where its API is, unless it is said otherwise."""
    key_variable: str
    """The environment variable that holds the key."""
    key_kind: str
    """What key that is, for messages."""
    headers: Callable[[str], Mapping[str, str]]
    """What goes with each question; the argument is the key."""
    reports: tuple[Report, ...]

    def report(self, name: str) -> Report:
        """One of `reports`. Raises `InvalidSetting`."""
        for report in self.reports:
            if report.name == name:
                return report
        known = ", ".join(report.name for report in self.reports)
        raise InvalidSetting("report", name, f"one of those of {self.name}: {known}")


def decode(body: bytes | str) -> object:
    """JSON with every number exact: what is not an int is a Decimal. Raises `InvalidReport`."""
    try:
        return _decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as exc:
        raise InvalidReport("report", body[:40], f"JSON ({exc})") from exc


class Part:
    """A JSON object of a report, and where it stands in it. What is not asked for is not looked at.

    Raises `InvalidReport`, naming the place, for what is missing or is not what it should be. Null is as good as left
    out.
    """

    __slots__ = ("_data", "_place")

    def __init__(self, data: object, place: str = "") -> None:
        if type(data) is not dict:
            raise InvalidReport(place.rstrip(".") or "report", data, "a JSON object")
        self._data: dict[str, Any] = data
        self._place = place

    def count(self, name: str) -> int:
        """A count that has to be there."""
        count = self.optional_count(name)
        if count is None:
            raise self.refused(name, None, f"a count; names seen: {self._names()}")
        return count

    def optional_count(self, name: str) -> int | None:
        """A whole number from 0 to 2^53, also where it is written as 71.0."""
        value = self._data.get(name)
        if type(value) is Decimal and 0 <= value <= MAX_TOKENS and value == int(value):
            value = int(value)
        if value is not None and (type(value) is not int or not 0 <= value <= MAX_TOKENS):
            raise self.refused(name, value, f"a whole number, 0 to {MAX_TOKENS}")
        return value

    def number(self, name: str) -> Decimal:
        """An exact number that has to be there, written as a number or as a text."""
        value: Any = self._data.get(name)
        try:
            number = Decimal(value if type(value) in (str, int, Decimal) else "nan")
        except ArithmeticError:
            number = Decimal("nan")
        if not number.is_finite() or abs(number) >= MAX_USD:
            raise self.refused(name, value, "a decimal number below 10^15")
        return number

    def text(self, name: str) -> str | None:
        """A text of at most 255 printable characters; None for an empty one."""
        value = self._data.get(name)
        if value is not None and (type(value) is not str or len(value) > MAX_NAME or not value.isprintable()):
            raise self.refused(name, value, f"a text of at most {MAX_NAME} printable characters")
        return value or None

    def dimension(self, name: str) -> str | bool | None:
        """What a row is grouped by; None where it is not."""
        value = self._data.get(name)
        return value if type(value) is bool else self.text(name)

    def part(self, name: str) -> Part:
        """An object within."""
        return Part(self._data.get(name), f"{self._place}{name}.")

    def parts(self, name: str) -> list[Part]:
        """The objects of a list within."""
        value = self._data.get(name)
        if type(value) is not list:
            raise self.refused(name, value, f"a list; names seen: {self._names()}")
        return [Part(item, f"{self._place}{name}[{at}].") for at, item in enumerate(value)]

    def currency(self, name: str) -> None:
        """Check that money is in USD."""
        value = self._data.get(name)
        if type(value) is not str or value.lower() != "usd":
            raise self.refused(name, value, "USD")

    def next_page(self) -> str | None:
        """What the next page is asked with, where there is one."""
        more, token = self._data.get("has_more"), self._data.get("next_page")
        if more is False or (more is None and token is None):
            return None
        if type(token) is not str or not 1 <= len(token) <= MAX_TOKEN:
            raise self.refused("next_page", token, "the token of the next page, because has_more is not false")
        return token

    def refused(self, name: str, value: object, expected: str) -> InvalidReport:
        """The error for a value of this object."""
        return InvalidReport(self._place + name, value, expected)

    def _names(self) -> str:
        return ", ".join(list(self._data)[:MAX_NAMES_SHOWN]) or "none"


def row(
    part: Part, dimensions: Sequence[str], *, counts: Counts | None = None, cost_usd: Decimal | None = None
) -> ReportRow:
    """A row with those dimensions that are said. Raises `InvalidReport`."""
    said = {name: part.dimension(name) for name in dimensions}
    text = msgspec.json.encode({name: value for name, value in said.items() if value is not None}, order="sorted")
    combination = text.decode()
    if len(combination) > MAX_DIMENSIONS:
        raise part.refused("dimensions", combination, f"at most {MAX_DIMENSIONS} characters")
    return ReportRow(
        dimensions=combination,
        model=part.text("model"),
        counts=counts or Counts(),
        cost=None if cost_usd is None else cost_usd.quantize(PLACES),
    )


def grouped(rows: Iterable[ReportRow]) -> tuple[ReportRow, ...]:
    """Rows with the same dimensions added up: they differ in what we do not keep. Sorted by dimensions."""
    groups: defaultdict[str, list[ReportRow]] = defaultdict(list)
    for each in rows:
        groups[each.dimensions].append(each)
    return tuple(
        ReportRow(
            dimensions=dimensions,
            model=same[0].model,
            counts=summed(each.counts for each in same),
            cost=_sum(each.cost for each in same),
        )
        for dimensions, same in sorted(groups.items())
    )


def summed(counts: Iterable[Counts]) -> Counts:
    """Each count added up where it is said; None where nobody says it."""
    listed = list(counts)
    return Counts(**{name: _sum(getattr(each, name) for each in listed) for name in COUNTS})


def _sum(values: Iterable[Any]) -> Any:
    said = [value for value in values if value is not None]
    return sum(said) if said else None


def day_from(part: Part, name: str, start: datetime, end: datetime | None = None) -> date:
    """The UTC day from `start` to `end`. Raises `InvalidReport` for anything but one whole day."""
    midnight = start.replace(hour=0, minute=0, second=0, microsecond=0)
    if start != midnight or (end is not None and end - start != ONE_DAY) or start.year > LAST_YEAR:
        to = "" if end is None else f" to {end}"
        raise part.refused(name, f"{start}{to}", "one whole UTC day, from midnight to midnight")
    return start.date()


def bucket_page(page: object, day: Callable[[Part], date], row_of: Callable[[Part], ReportRow]) -> Page:
    """A page of buckets with results, as OpenAI and Anthropic answer. Raises `InvalidReport`."""
    answer = Part(page)
    days: dict[date, ReportDay] = {}
    for bucket in answer.parts("data"):
        which = day(bucket)
        if which in days:
            raise bucket.refused("results", str(which), "each day once")
        days[which] = ReportDay(day=which, rows=grouped(row_of(part) for part in bucket.parts("results")))
    return Page(days=tuple(days.values()), next_page=answer.next_page())
