"""Cells of files as values: read where they are meant, refused where they are not."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metering.errors import InvalidEvent
from metering.importing.values import FIELDS, is_blank, parse_instant, parse_quantity, parse_whole

AT = datetime(2023, 11, 16, 18, 17, 3, 979960, tzinfo=UTC)


@pytest.mark.parametrize(
    ("written", "at", "zoneless"),
    [
        ("2023-11-16 18:17:03.9799600", AT, True),
        ("2023-11-16 18:17:03.9799609", AT, True),
        ("2023-11-16T18:17:03.9799600Z", AT, False),
        ("2023-11-17T07:17:03.97996+13:00", AT, False),
        ("2023-11-16T13:47:03.979960-04:30", AT, False),
        (" 2023-11-16T18:17:03.97996Z ", AT, False),
        ("20231116T181703Z", AT.replace(microsecond=0), False),
        ("2023-11-16", datetime(2023, 11, 16, tzinfo=UTC), True),
        ("1700158623", AT.replace(microsecond=0), False),
        ("1700158623.97996", AT, False),
        ("1700158623979", AT.replace(microsecond=979000), False),
        (1700158623979, AT.replace(microsecond=979000), False),
        (1700158623.97996, AT, False),
        (Decimal("1700158623.9799609"), AT, False),
        (AT.replace(tzinfo=None), AT, True),
        (AT.astimezone(timezone(timedelta(hours=5, minutes=45))), AT, False),
        (date(2023, 11, 16), datetime(2023, 11, 16, tzinfo=UTC), True),
    ],
)
def test_times_are_read(written: Any, at: datetime, zoneless: bool) -> None:
    found, without_zone = parse_instant("occurred_at", written)
    assert (found, found.tzinfo, without_zone) == (at, UTC, zoneless)


@given(st.integers(10**12, 10**13 - 1))
def test_seconds_and_milliseconds_of_an_epoch_mean_the_same(milliseconds: int) -> None:
    at = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=milliseconds)
    for written in (milliseconds, str(milliseconds), Decimal(milliseconds) / 1000, str(Decimal(milliseconds) / 1000)):
        assert parse_instant("occurred_at", written) == (at, False)


@pytest.mark.parametrize(
    "nonsense",
    [
        "yesterday",
        "16/11/2023",
        "2023-13-01",
        "2023-11-16 25:00",
        "20231116",
        "202311161817",
        "20231116181703",
        "0",
        "-1700158623",
        "1_700_158_623",
        "1700158623000000",
        "NaN",
        "sNaN",
        "Infinity",
        "1969-12-31",
        "9999-12-31T00:00:00Z",
        "0001-01-01T00:00:00+14:00",
        float("nan"),
        float("inf"),
        True,
        b"2023-11-16",
        {"at": 1},
    ],
)
def test_times_that_are_none_are_refused(nonsense: Any) -> None:
    with pytest.raises(InvalidEvent, match=r"^occurred_at: got .*, expected a time ") as refused:
        parse_instant("occurred_at", nonsense)
    assert refused.value.value is nonsense


@pytest.mark.parametrize(
    ("written", "number"),
    [("812", 812), (" 812 ", 812), ("812.0", 812), ("8.12e2", 812), (812, 812), (812.0, 812), (Decimal(812), 812)],
)
def test_whole_numbers_are_read(written: Any, number: int) -> None:
    found = parse_whole("input_tokens", written)
    assert (found, type(found)) == (number, int)


@pytest.mark.parametrize(
    "nonsense",
    [
        "many",
        "1.5",
        "NaN",
        "sNaN",
        "Infinity",
        "-Infinity",
        "1_000",
        "٣",
        "0x10",
        "1e999999",
        "9223372036854775808",
        True,
        1.5,
        float("nan"),
        float("inf"),
        2**63,
        b"1",
        [1],
    ],
)
def test_what_is_no_whole_number_is_refused(nonsense: Any) -> None:
    with pytest.raises(InvalidEvent, match=r"^input_tokens: got .*, expected a whole number"):
        parse_whole("input_tokens", nonsense)


@pytest.mark.parametrize(
    ("written", "number"),
    [("0.1", "0.1"), (0.1, "0.1"), ("123456789012345.678901234567", "123456789012345.678901234567"), (3, "3")],
)
def test_quantities_keep_every_digit(written: Any, number: str) -> None:
    assert parse_quantity("quantity", written) == Decimal(number)


@pytest.mark.parametrize("nonsense", ["some", "1,5", "1_000", True, b"1", None])
def test_what_is_no_quantity_is_refused(nonsense: Any) -> None:
    with pytest.raises(InvalidEvent, match=r"^quantity: got .*, expected a decimal number"):
        parse_quantity("quantity", nonsense)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("acme", "acme"),
        (" a ", " a "),
        ("042", "042"),
        (42, "42"),
        (Decimal("42"), "42"),
        ("Zoë".encode(), "Zoë"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
    ],
)
def test_names_are_text_or_the_digits_of_a_whole_number(written: Any, name: str) -> None:
    assert FIELDS["account"]("account", written) == name


@pytest.mark.parametrize("nonsense", [True, 42.0, float("nan"), Decimal("1.5"), b"\xff", date(2023, 1, 1), ["a"]])
def test_other_values_are_no_names(nonsense: Any) -> None:
    with pytest.raises(InvalidEvent, match=r"^account: got .*, expected text"):
        FIELDS["account"]("account", nonsense)


@pytest.mark.parametrize(
    ("written", "meant"), [("true", True), ("FALSE", False), ("1", True), (0, False), (True, True)]
)
def test_truth_is_read(written: Any, meant: bool) -> None:
    assert FIELDS["platform_paid"]("platform_paid", written) is meant


@pytest.mark.parametrize("nonsense", ["yes", "", 2, 1.5])
def test_what_is_neither_true_nor_false_is_refused(nonsense: Any) -> None:
    with pytest.raises(InvalidEvent, match=r"^platform_paid: got .*, expected true or false"):
        FIELDS["platform_paid"]("platform_paid", nonsense)


@pytest.mark.parametrize(
    "written", ['{"temperature": 0.7, "tags": ["a"]}', {"temperature": Decimal("0.7"), "tags": ["a"]}]
)
def test_attributes_are_an_object_with_plain_numbers(written: Any) -> None:
    assert FIELDS["attributes"]("attributes", written) == {"temperature": 0.7, "tags": ["a"]}


@pytest.mark.parametrize("nonsense", ["[1]", "{", "[" * 100_000, [1], 5, {"a": object()}])
def test_attributes_that_are_no_object_are_refused(nonsense: Any) -> None:
    with pytest.raises(InvalidEvent, match=r"^attributes: got .*, expected a JSON object"):
        FIELDS["attributes"]("attributes", nonsense)


def test_only_nothing_is_blank() -> None:
    assert [value for value in (None, "", " ", 0, False, float("nan")) if is_blank(value)] == [None, ""]
