r"""Where a text may be cut without changing its tokens.

tiktoken splits a text by a regular expression and encodes each piece on its own, so the tokens of a text are those of
its parts if a piece ends where it is cut, and the pieces before stay what they are when the text ends there. Both hold,
for every pattern of tiktoken's (r50k and p50k, cl100k, o200k), before

- a blank after anything that is not white space: no alternative takes a blank except as its first character or after
  white space, and no look-ahead or `$` asks what comes after a character that is not white space;
- punctuation other than an apostrophe, after a letter or a digit: no alternative has one after the other. Only
  characters are named here whose class no version of Unicode changes.

Long white space is another matter. `\s+(?!\S)` keeps a place to come back to for each character, and tiktoken's engine
(fancy-regex) gives up at 1,000,000 of them: `encode` raises ValueError, `encode_ordinary` a panic that is not an
`Exception`. What that alternative would have matched is one piece all the same, and is known without it: the blanks
after the last line break, without the last one where something follows. So it is cut out and encoded as one piece.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["long_blanks", "parts"]

_BLANK = "\\t\\v\\f \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
"""White space but line feed and carriage return, by Unicode's White_Space: Python's own class has four more."""

_PUNCTUATION = r"!-&(-/:-@\[-`{-~\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f"
_WORD = r"0-9A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
_CUT = re.compile(f"[ {_PUNCTUATION}](?:(?<=\\S )|(?<=[{_WORD}][{_PUNCTUATION}]))")
"""It starts with a set of characters because `re` looks for those fast."""


def parts(text: str, chars: int) -> Iterator[str]:
    """`text` in parts whose tokens add up to its own: each `chars` characters, and on to the next place for a cut."""
    start = 0
    while len(text) - start > chars and (cut := _CUT.search(text, start + chars)):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def long_blanks(pattern: str, chars: int) -> re.Pattern[str]:
    """What finds the pieces of `chars` characters and more that tiktoken's engine may give up on, given its pattern."""
    # Without an alternative that ends at a line break, as in r50k, breaks are white space like any other.
    blank = f"[{_BLANK}]" if r"\s*[\r\n]" in pattern else f"[{_BLANK}\\r\\n]"
    something = f"[^{_BLANK}\\r\\n]"
    # `\s++$` keeps no places to come back to, so where there is one the end of the text is no trouble.
    end = "" if r"\s++$" in pattern else r"|\Z"
    return re.compile(f"(?<!{blank}){blank}{{{chars},}}(?={blank}{something}{end})")
