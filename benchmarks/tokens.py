"""What counting costs beside tiktoken alone: `python -m benchmarks.tokens`.

A call counts one text of about 64 KB, in one thread. What is shown first for each encoding is the floor.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import tiktoken

from benchmarks.measure import Contender, Target, compare, in_threads
from metering.tokens import count_tokens, exceeds
from metering.tokens.encodings import recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.measure import Rate, Table

__all__ = ["token_tables"]

TEXTS = {
    "prose": "All human beings are born free and equal in dignity and rights. They are endowed with reason.\n" * 700,
    "Chinese": "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。" * 500,  # noqa: RUF001
    "one letter": "a" * 65_536,
}
LIMIT_TOKENS = 1_000


def token_tables(*, rounds: int, turn_s: float) -> Iterator[Table]:
    """One table for each encoding and text."""

    def turn(call: Callable[[], object], seconds: float) -> Rate:
        return in_threads(call, threads=1, seconds=seconds)

    for encoding in ("cl100k_base", "o200k_base"):
        bare = tiktoken.Encoding(**recipe(encoding))
        for kind, text in TEXTS.items():
            assert count_tokens(text, encoding=encoding) == len(bare.encode_ordinary(text)) > LIMIT_TOKENS
            contenders = [
                Contender(
                    name="tiktoken",
                    does="len(encode_ordinary(text))",
                    turn=partial(turn, partial(bare.encode_ordinary, text)),
                ),
                Contender(
                    name="count_tokens",
                    does="the same number, on any text",
                    turn=partial(turn, partial(count_tokens, text, encoding=encoding)),
                ),
                Contender(
                    name="exceeds",
                    does=f"whether it is more than {LIMIT_TOKENS:,} tokens",
                    turn=partial(turn, partial(exceeds, text, LIMIT_TOKENS, encoding=encoding)),
                ),
            ]
            targets = [Target(name="count_tokens", beside="tiktoken", least=0.95)]
            title = f"{encoding}, {kind}: {len(text.encode()) / 1e3:.0f} KB a call"
            yield compare(title, contenders, targets, rounds=rounds, turn_s=turn_s)


if __name__ == "__main__":
    for table in token_tables(rounds=5, turn_s=0.3):
        print(f"{table}\n")
