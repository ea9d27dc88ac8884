"""Whole numbers of any size in Lua: what `_numbers.lua` computes on a real server is what Python's int says."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.servers import RedisServer, flavours

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NUMBERS = (files("metering.admission.redis") / "scripts" / "_numbers.lua").read_text(encoding="utf-8")
ASK = """
local a, b, c, d = unpack(ARGV)
return {add(a, b), subtract(a, b), compare(a, b), greater(a, b), multiply(c, d)}
"""

# Of every length, and around what matters: powers of ten (limbs are seven digits, small is fifteen) and 2^53.
edges = st.builds(
    lambda power, step: max(0, power + step),
    st.one_of(st.integers(0, 60).map(lambda digits: 10**digits), st.sampled_from([2**31, 2**53, 2**63, 2**64])),
    st.integers(-2, 2),
)
naturals = st.one_of(st.integers(0, 99), edges, st.integers(0, 60).flatmap(lambda digits: st.integers(0, 10**digits)))
integers = st.builds(lambda number, is_negative: -number if is_negative else number, naturals, st.booleans())
pairs = st.one_of(
    st.tuples(integers, integers),
    # Differences that cancel nearly all digits, or all.
    st.tuples(integers, st.integers(-2, 2)).map(lambda of: (of[0], of[0] + of[1])),
    integers.map(lambda number: (number, -number)),
    # Sums that carry through every limb, and into a new one.
    st.builds(lambda digits, part: (part, 10**digits - part), st.integers(14, 60), naturals),
)


@pytest.fixture(scope="module", params=list(flavours()))
def computed(request: pytest.FixtureRequest) -> Iterator[Callable[..., list[Any]]]:
    """What a server makes of two numbers, and of two factors."""
    with RedisServer(request.param) as server, server.client() as client:
        script = client.register_script(NUMBERS + ASK)
        yield lambda *numbers: script(args=list(map(str, numbers)))


def text(number: int) -> bytes:
    return str(number).encode()


@settings(max_examples=300)
@given(pair=pairs, factors=st.tuples(naturals, naturals))
@example(pair=(2**53, 1), factors=(2**53 + 1, 2**53 - 1))
@example(pair=(-(10**15), 1), factors=(0, 10**40))
@example(pair=(10**21 - 1, 1), factors=(10**21 - 1, 10**21 - 1))
@example(pair=(0, 0), factors=(9_999_999**5, 9_999_999**5))
@example(pair=(10**14, -(10**14)), factors=(10**7, 10**7 - 1))
@example(pair=(-(10**14), -(10**14) + 1), factors=(1, 10**60))
def test_the_numbers_of_the_scripts_are_exact(
    computed: Callable[..., list[Any]], pair: tuple[int, int], factors: tuple[int, int]
) -> None:
    a, b = pair
    total, difference, order, greater, product = computed(a, b, *factors)
    # As text: no zero in front, no minus before a zero, no exponent.
    assert (total, difference) == (text(a + b), text(a - b))
    assert (order, greater) == ((a > b) - (a < b), text(max(a, b)))
    assert product == text(factors[0] * factors[1])


def test_an_account_of_numbers_never_drifts(computed: Callable[..., list[Any]]) -> None:
    """A counter in units of 10^-12, moved as admissions and give-backs move it."""
    used = b"0"
    steps = [10**12 * 123_456_789 + 1, 7, 10**30 + 3, 10**15, 10**15 - 1]
    for step in steps * 20:
        used = computed(used.decode(), step, 0, 0)[0]
    for step in reversed(steps * 20):
        used = computed(used.decode(), step, 0, 0)[1]
    assert used == b"0"
