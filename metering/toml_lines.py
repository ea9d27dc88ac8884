"""Where each key of a TOML text stands, so that an error about a value can name its line.

tomllib gives values without places. This reads only as much of the grammar as places need.
"""

from __future__ import annotations

import re
from collections import Counter

_BLANK = re.compile(r"(?:[\s,]|#[^\n]*)*")
_STRING = re.compile(
    r'"""(?:[^"\\]|\\.|"{1,2}(?!"))*"{3,5}'
    r"|'''(?:[^']|'{1,2}(?!'))*'{3,5}"
    r'|"(?:[^"\\\n]|\\.)*"'
    r"|'[^'\n]*'",
    re.DOTALL,
)
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_DOT = re.compile(r"[ \t]*(\.?)[ \t]*")
_SCALAR = re.compile(r"[^,\]}#\n]*")


def line_of(text: str, where: str) -> int | None:
    """The line, from 1, of `where` (such as `plans.pro.rates[2].per`) or of the closest thing around it that is there.

    Arrays count from 0. `text` is one that tomllib accepts, `where` any text. None where not even the first part of
    `where` is in it.
    """
    places = _Scanner(text).places
    while where and where not in places:
        where = where[: max(where.rfind("."), where.rfind("["), 0)]
    return text.count("\n", 0, places[where]) + 1 if where else None


class _Scanner:
    """Walks a text once and keeps the position at which each path first stands."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.places: dict[str, int] = {}
        self.array_tables: Counter[str] = Counter()
        table = ""
        while self._next():
            if self._next() == "[":
                table = self._header()
            else:
                self._pair(table)

    def _next(self) -> str:
        """The next character that means something; empty at the end."""
        found = _BLANK.match(self.text, self.at)
        assert found
        self.at = found.end()
        return self.text[self.at : self.at + 1]

    def _header(self) -> str:
        start = self.at
        brackets = 2 if self.text.startswith("[[", start) else 1
        self.at += brackets
        keys = self._key()
        self._next()
        self.at += brackets
        path = ""
        for depth, key in enumerate(keys, start=1):
            path = _joined(path, key)
            if brackets == 2 and depth == len(keys):
                self.array_tables[path] += 1
            self.places.setdefault(path, start)
            if self.array_tables[path]:
                path += f"[{self.array_tables[path] - 1}]"
                self.places.setdefault(path, start)
        return path

    def _pair(self, path: str) -> None:
        start = self.at
        for key in self._key():
            path = _joined(path, key)
            self.places.setdefault(path, start)
        self._next()
        self.at += len("=")
        self._value(path)

    def _key(self) -> list[str]:
        """The parts of a dotted key, without their quotes."""
        keys = []
        while True:
            self._next()
            quoted = _STRING.match(self.text, self.at)
            found = quoted or _BARE_KEY.match(self.text, self.at)
            assert found
            keys.append(found[0][1:-1] if quoted else found[0])
            dot = _DOT.match(self.text, found.end())
            assert dot
            self.at = dot.end()
            if not dot[1]:
                return keys

    def _value(self, path: str) -> None:
        opening = self._next()
        if opening == "{":
            self.at += 1
            while self._next() != "}":
                self._pair(path)
            self.at += 1
        elif opening == "[":
            self.at += 1
            index = 0
            while self._next() != "]":
                self.places.setdefault(f"{path}[{index}]", self.at)
                self._value(f"{path}[{index}]")
                index += 1
            self.at += 1
        else:
            found = _STRING.match(self.text, self.at) or _SCALAR.match(self.text, self.at)
            assert found
            self.at = found.end()


def _joined(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
