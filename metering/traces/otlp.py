"""OTLP JSON files as spans, one at a time, whatever their size: one document, or one a line, also gzipped.

The format: opentelemetry.io/docs/specs/otlp (JSON Protobuf encoding) and .../specs/otel/protocol/file-exporter.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import IO, TYPE_CHECKING, Any, cast

from metering.errors import InvalidFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

__all__ = ["FoundSpan", "open_otlp"]

MAX_VALUE = 16 * 1024 * 1024
"""Characters of a span, or bytes of a line, at the most."""

MAX_EARLY = 10_000
"""Spans that wait for their resource, where it stands after them."""

LINES_LOOKED_AT = 20
PIECE = 256 * 1024
_GZIP = b"\x1f\x8b"
_KEPT = "the spans before it were read"

_RESOURCES = ("resourceSpans", "resource_spans")
_SCOPES = ("scopeSpans", "scope_spans", "instrumentationLibrarySpans")
_SCOPE = ("scope", "instrumentationLibrary")

_blank = re.compile(r"[ \t\r\n]*")
_decode = json.JSONDecoder().raw_decode


@dataclass(frozen=True, slots=True)
class FoundSpan:
    """A span as the file has it, its `resource` and `scope` within; or why a line could not be read to its end."""

    span: Any
    progress: float
    """Share of the file read so far, 0 to 1."""
    problem: str | None = None


@contextmanager
def open_otlp(path: Path) -> Iterator[Iterator[FoundSpan]]:
    """The spans of a file. Opening and reading raise `InvalidFile`; of JSON lines a broken one is a `problem`."""
    try:
        raw = path.open("rb")
    except OSError as exc:
        raise InvalidFile(path, f"cannot be read: {exc.strerror}") from exc
    with raw:
        yield _found(path, raw)


def _found(path: Path, raw: io.BufferedReader) -> Iterator[FoundSpan]:
    size = max(os.fstat(raw.fileno()).st_size, 1)
    count = 0
    try:
        is_zipped = raw.peek(2)[:2] == _GZIP
        file = cast("IO[bytes]", gzip.GzipFile(fileobj=raw) if is_zipped else raw)
        has_lines = _has_lines(file)
        file.seek(0)
        for span, problem in _of_lines(path, file) if has_lines else _of_document(file):
            count += 1
            yield FoundSpan(span, min(raw.tell() / size, 1.0), problem)
    except _Broken as exc:
        raise InvalidFile(path, f"{exc}, after {count} spans; {_KEPT}") from exc
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as exc:
        raise InvalidFile(path, f"breaks off after {count} spans: {exc}; {_KEPT}") from exc


def _line_of(file: IO[bytes]) -> bytes:
    """The next line; nothing where the file breaks off in it, which is told when its spans are read."""
    try:
        return file.readline(MAX_VALUE + 1)
    except (EOFError, zlib.error):
        return b""


def _has_lines(file: IO[bytes]) -> bool:
    """Whether each line is a document of its own: one of the first is."""
    for line in islice(iter(lambda: _line_of(file), b""), LINES_LOOKED_AT):
        if len(line) > MAX_VALUE:
            return False
        try:
            document = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            continue
        if isinstance(document, dict) and any(name in document for name in _RESOURCES):
            return True
    return False


def _of_lines(path: Path, file: IO[bytes]) -> Iterator[tuple[Any, str | None]]:
    for number, line in enumerate(iter(lambda: file.readline(MAX_VALUE + 1), b""), 1):
        if len(line) > MAX_VALUE:
            raise InvalidFile(path, f"line {number} has more than {MAX_VALUE:,} bytes; {_KEPT}")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if text.strip():
                yield from ((span, None) for span in _spans(_Text(io.StringIO(text).read)))
        except (UnicodeDecodeError, _Broken) as exc:
            yield None, f"line {number}: {exc}"


def _of_document(file: IO[bytes]) -> Iterator[tuple[Any, str | None]]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()

    def read(size: int) -> str:
        text = ""
        while not text:
            data = file.read(size)
            text = decoder.decode(data, final=not data)
            if not data:
                break
        return text

    return ((span, None) for span in _spans(_Text(read)))


class _Broken(Exception):
    """What is not OTLP JSON."""


class _Text:
    """JSON text, of which no more than a value is in memory."""

    def __init__(self, read: Callable[[int], str]) -> None:
        self._read = read
        self._text = ""
        self._at = 0
        self._has_ended = False

    def peek(self) -> str:
        """The next character that is not blank; empty at the end."""
        while True:
            blank = _blank.match(self._text, self._at)
            assert blank is not None
            self._at = blank.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_more():
                return ""

    def take(self, expected: str) -> None:
        """Pass over a character."""
        found = self.peek()
        if found != expected:
            raise _Broken(f"expected {expected!r}, not {found!r}" if found else f"ends where {expected!r} should be")
        self._at += 1

    def value(self) -> Any:
        """Pass over a value, and return it."""
        self.peek()
        while True:
            try:
                value, end = _decode(self._text, self._at)
            except RecursionError:
                raise _Broken("a value is nested too deeply") from None
            except ValueError as exc:
                if not self._read_more():
                    raise _Broken(f"is not JSON: {getattr(exc, 'msg', exc)}") from None
                continue
            # What ends with the text read so far might go on: 12 could be the beginning of 123.
            if end < len(self._text) or not self._read_more():
                self._at = end
                return value

    def _read_more(self) -> bool:
        rest = len(self._text) - self._at
        if self._has_ended:
            return False
        if rest > MAX_VALUE:
            raise _Broken(f"a value has more than {MAX_VALUE:,} characters, or is not JSON")
        piece = self._read(max(PIECE, rest))
        if not piece:
            self._has_ended = True
            return False
        self._text = self._text[self._at :] + piece
        self._at = 0
        return True


def _spans(text: _Text) -> Iterator[Any]:
    while text.peek():
        has_spans = False
        for name in _object(text):
            if name in _RESOURCES:
                has_spans = True
                for _ in _array(text):
                    yield from _of_resource(text)
            else:
                text.value()
        if not has_spans:
            raise _Broken("a document without resourceSpans")


def _of_resource(text: _Text) -> Iterator[Any]:
    resource: Any = None
    early: list[tuple[Any, Any]] = []
    is_known = False
    for name in _object(text):
        if name == "resource":
            if len(early) > MAX_EARLY:
                raise _Broken(f"a resource after more than {MAX_EARLY:,} of its spans")
            resource, is_known = text.value(), True
            yield from (_with(resource, *found) for found in early)
            early = []
        elif name in _SCOPES:
            for _ in _array(text):
                for found in _of_scope(text):
                    # Writers put the resource first, but JSON has no order.
                    if is_known or len(early) > MAX_EARLY:
                        yield _with(resource, *found)
                    else:
                        early.append(found)
        else:
            text.value()
    yield from (_with(resource, *found) for found in early)


def _with(resource: Any, scope: Any, span: Any) -> Any:
    return {**span, "resource": resource, "scope": scope} if isinstance(span, Mapping) else span


def _of_scope(text: _Text) -> Iterator[tuple[Any, Any]]:
    scope: Any = None
    for name in _object(text):
        if name in _SCOPE:
            scope = text.value()
        elif name == "spans":
            for _ in _array(text):
                yield scope, text.value()
        else:
            text.value()


def _object(text: _Text) -> Iterator[str]:
    """The names of an object. After each the text is before its value, which whoever asks passes over."""
    text.take("{")
    if text.peek() == "}":
        text.take("}")
        return
    while True:
        name = text.value()
        if not isinstance(name, str):
            raise _Broken(f"expected a name, not {type(name).__name__}")
        text.take(":")
        yield name
        if text.peek() != ",":
            text.take("}")
            return
        text.take(",")


def _array(text: _Text) -> Iterator[None]:
    """The places of an array's values, in the same way. null is an empty one."""
    if text.peek() == "n" and text.value() is None:
        return
    text.take("[")
    if text.peek() == "]":
        text.take("]")
        return
    while True:
        yield None
        if text.peek() != ",":
            text.take("]")
            return
        text.take(",")
