"""The spool: facts that could not be told to their store, kept in files of this machine until they can be.

Every spool appends to one file of its own, which is locked for as long as its process lives: a file whose lock can be
taken belongs to nobody alive, and whoever takes it ships it. What the payloads mean is not known here.
"""

from __future__ import annotations

import fcntl
import io
import os
import re
import secrets
import threading
import weakref
import zlib
from binascii import a2b_base64, b2a_base64
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from uuid import UUID

from metering.clock import utc_now
from metering.errors import InvalidEvent, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

__all__ = ["Line", "Shipped", "Spool", "SpoolState"]

MAX_PAYLOAD_BYTES = 2**20
MAX_BATCH_BYTES = 8 * 2**20
"""Payloads handed over at once: a batch ends with the line that reaches this."""

_LONGEST_LINE = 2 * MAX_PAYLOAD_BYTES
"""No line is as long: base64 makes four bytes of three."""
_KIND = re.compile(r"[a-z_]{1,32}")
_NAME = re.compile(r"(?P<at_us>[0-9]{16})-(?P<writer>[0-9]+-[0-9a-f]{8})(?:-(?P<owner>[0-9a-f]{32}))?\.(?:open|sealed)")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One fact, as it was appended."""

    kind: str
    event_id: UUID
    payload: bytes
    at: datetime
    """When it was appended, by the clock of its machine."""
    position: int
    """Where in its file it begins, in bytes."""


@dataclass(slots=True, kw_only=True)
class Shipped:
    """What became of the lines of the files that were taken."""

    lines: int = 0
    """Delivered."""
    kept: int = 0
    """Not taken by `deliver`, so still in the spool."""
    damaged: int = 0
    """Unreadable, and set aside in a file `.damaged`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpoolState:
    """What waits in a folder, of all processes, dead or alive."""

    files: int
    lines: int
    bytes: int
    oldest: datetime | None
    """When the oldest file was begun."""
    damaged_files: int
    """Files of unreadable lines that were set aside, for a person to look at."""


class Spool:
    """Appends to, and ships, what lies in one folder, which is created at the first append.

    Any number of threads may share one; after a fork the child goes on with a file of its own. With an `owner`, such as
    a ledger's id, only files of that owner are shipped; without one all are, and counted by `pending`.
    """

    def __init__(self, folder: Path, *, owner: UUID | None = None, clock: Callable[[], datetime] = utc_now) -> None:
        self._folder = folder.absolute()
        self._owner = owner and owner.hex
        self._clock = clock
        self._last_us = 0
        self._start_anew()
        _spools.add(self)

    def append(self, kind: str, event_id: UUID, payload: bytes, *, durable: bool = True) -> None:
        """Keep a fact. Once this returned it survives a kill, and if `durable` a power cut too.

        `kind` is 1 to 32 lower-case letters or `_`, the payload at most 1 MiB: else `InvalidEvent`. Raises
        `StoreUnavailable` where it cannot be written, as on a full disk; the fact is then not in the spool.
        """
        if not _KIND.fullmatch(kind):
            raise InvalidEvent("kind", kind, "1 to 32 lower-case letters or _")
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise InvalidEvent("payload", f"{len(payload)} bytes", f"at most {MAX_PAYLOAD_BYTES}")
        line = _encode(kind, event_id, payload, self._clock())
        with self._turn(), _failing_as_unavailable(self._folder):
            file = self._writable()
            size = os.fstat(file.fileno()).st_size
            try:
                _write(file, line)
                if durable:
                    os.fsync(file.fileno())
            except OSError:
                self._take_back(file, size)
                raise

    def seal(self) -> None:
        """End the file that is appended to, where it has lines. The next append begins another."""
        with self._turn():
            if self._file is not None and os.fstat(self._file.fileno()).st_size:
                self._release(self._file)

    def close(self) -> None:
        """End the file that is appended to, and leave it to whoever ships next."""
        with self._turn():
            if self._file is not None:
                self._release(self._file)

    def ship(self, deliver: Callable[[list[Line]], list[Line] | None], most: int = 500) -> Shipped:
        """Hand over the lines of every file that nobody else holds, and delete each file after its last line.

        `deliver` gets at most `most` lines of one file, in the order they were appended, and returns those that it
        could not take, which stay in the spool. It must be idempotent by `event_id`: a kill before the file is deleted
        repeats lines. What it raises ends the shipping and goes on to the caller; the file stays as it was.

        Files of one writer are shipped in their order: while another process ships one, the later ones wait. Raises
        `StoreUnavailable` where files cannot be read, or lines not be kept.
        """
        shipped = Shipped()
        done: set[str] = set()
        self._ship_files(deliver, most, shipped, done)
        # Only now: while nothing can be delivered, each attempt would add a file.
        self.seal()
        self._ship_files(deliver, most, shipped, done)
        return shipped

    def pending(self) -> SpoolState:
        """What waits in the folder. Reads the files once, without locking them."""
        files = lines = size = 0
        oldest: datetime | None = None
        for path, name in self._files():
            try:
                bytes_, lines_ = _measure(path)
            except OSError:
                continue  # shipped meanwhile
            if bytes_:
                files, lines, size = files + 1, lines + lines_, size + bytes_
                oldest = oldest or _EPOCH + int(name["at_us"]) * _MICROSECOND
        damaged_files = sum(1 for _ in self._folder.glob("*.damaged"))
        return SpoolState(files=files, lines=lines, bytes=size, oldest=oldest, damaged_files=damaged_files)

    def _start_anew(self) -> None:
        # Re-entrant only so that a signal handler in the middle of an append is refused rather than left waiting.
        self._lock = threading.RLock()
        self._busy = False
        self._writer = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._file: io.FileIO | None = None
        self._path = self._folder

    @contextmanager
    def _turn(self) -> Iterator[None]:
        with self._lock:
            if self._busy:
                raise StoreUnavailable(f"spool {self._folder}: a signal handler asked for it in the middle of a write")
            try:
                self._busy = True
                yield
            finally:
                self._busy = False

    def _writable(self) -> io.FileIO:
        """The file to append to: a new one where there is none, or where somebody deleted it."""
        if self._file is not None:
            if os.fstat(self._file.fileno()).st_nlink:
                return self._file
            self._file.close()
            self._file = None
        if not self._folder.is_dir():
            self._folder.mkdir(parents=True, exist_ok=True)
            _sync_folder(self._folder.parent)
        file = None
        while file is None:  # a shipper may lock a new file first: it finds it empty and deletes it
            self._last_us = max((self._clock() - _EPOCH) // _MICROSECOND, self._last_us + 1)
            owner = f"-{self._owner}" if self._owner else ""
            path = self._folder / f"{self._last_us:016d}-{self._writer}{owner}.open"
            file = _take(path, "ab")
        _sync_folder(self._folder)
        self._file, self._path = file, path
        return file

    def _take_back(self, file: io.FileIO, size: int) -> None:
        """Cut off what was not written as a whole; where that fails too, leave the file to whoever ships next."""
        try:
            os.ftruncate(file.fileno(), size)
        except OSError:
            self._file = None
            file.close()

    def _release(self, file: io.FileIO) -> None:
        self._file = None
        # Where this fails the file is still there, and without its lock as good as sealed.
        with file, suppress(OSError):
            if os.fstat(file.fileno()).st_size:
                self._path.rename(self._path.with_suffix(".sealed"))
            else:
                self._path.unlink()

    def _files(self) -> list[tuple[Path, re.Match[str]]]:
        """The files of the folder and the parts of their names, by the time they were begun."""
        paths: list[Path] = []
        with _failing_as_unavailable(self._folder), suppress(FileNotFoundError):
            paths = sorted(self._folder.iterdir())
        named = [(path, name) for path in paths if (name := _NAME.fullmatch(path.name))]
        return [(path, name) for path, name in named if self._owner in (None, name["owner"])]

    def _ship_files(
        self, deliver: Callable[[list[Line]], list[Line] | None], most: int, shipped: Shipped, done: set[str]
    ) -> None:
        elsewhere: set[str] = set()
        for path, name in self._files():
            if path.stem in done or name["writer"] in elsewhere:
                continue
            with _taken(path) as reader:
                if reader is None:
                    elsewhere.add(name["writer"])
                else:
                    done.add(path.stem)
                    _ship_file(path, reader, deliver, most, shipped)


def _ship_file(
    path: Path,
    reader: io.BufferedReader,
    deliver: Callable[[list[Line]], list[Line] | None],
    most: int,
    shipped: Shipped,
) -> None:
    delivered = 0
    kept: set[int] = set()
    damaged: set[int] = set()
    for batch in _batches(_lines(path, reader, damaged), most):
        delivered += len(batch)
        kept.update(line.position for line in deliver(batch) or ())
    shipped.lines += delivered - len(kept)
    shipped.kept += len(kept)
    if len(kept) == delivered and kept and not damaged:
        return
    rest = path.with_suffix(".rest")
    with _failing_as_unavailable(path):
        if kept:
            _copy(reader, kept, rest, "wb")
        else:
            rest.unlink(missing_ok=True)  # of a shipper that was killed
        if damaged:
            _copy(reader, damaged, path.with_suffix(".damaged"), "ab")
            shipped.damaged += len(damaged)
        if kept:
            rest.replace(path)
        else:
            path.unlink()


def _lines(path: Path, reader: io.BufferedReader, damaged: set[int]) -> Iterator[Line]:
    """The lines of a file. Adds the positions of those that cannot be read to `damaged`."""
    position = 0
    with _failing_as_unavailable(path):
        while raw := reader.readline(_LONGEST_LINE):
            if raw != b"\n":
                line = _decode(raw, position)
                if line is None:
                    damaged.add(position)
                else:
                    yield line
            position += len(raw)


def _batches(lines: Iterable[Line], most: int) -> Iterator[list[Line]]:
    batch: list[Line] = []
    size = 0
    for line in lines:
        batch.append(line)
        size += len(line.payload)
        if len(batch) >= most or size >= MAX_BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(kind: str, event_id: UUID, payload: bytes, at: datetime) -> bytes:
    """A line: checksum, time in microseconds, kind, id, payload.

    It begins with a newline too, so that neither a torn line before it nor a damaged newline takes it along.
    """
    says = b"%d %s %s %s" % (
        (at - _EPOCH) // _MICROSECOND,
        kind.encode(),
        event_id.hex.encode(),
        b2a_base64(payload, newline=True),
    )
    return b"\n%08x %s" % (zlib.crc32(says), says)


def _decode(raw: bytes, position: int) -> Line | None:
    """What a line says; None where it is not what was written. The newline at its end is part of the checksum."""
    checksum, _, says = raw.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(says):
        return None
    try:
        at_us, kind, event_id, payload = says.split(b" ")
        return Line(
            kind=kind.decode(),
            event_id=UUID(event_id.decode()),
            payload=a2b_base64(payload),
            at=_EPOCH + int(at_us) * _MICROSECOND,
            position=position,
        )
    except ValueError:
        return None


def _write(file: io.FileIO, data: bytes) -> None:
    """Write all of it: in one call, unless the disk is full, which only a second one says."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _copy(reader: io.BufferedReader, positions: set[int], path: Path, mode: str) -> None:
    """Write the lines that begin at these positions to another file, durably."""
    with io.BufferedWriter(_open(path, mode)) as copy:
        for position in sorted(positions):
            reader.seek(position)
            copy.write(b"\n" + reader.readline(_LONGEST_LINE))
        copy.flush()
        os.fsync(copy.fileno())


def _measure(path: Path) -> tuple[int, int]:
    """Bytes and lines of a file."""
    size = newlines = 0
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            size += len(chunk)
            newlines += chunk.count(b"\n")
    return size, newlines // 2


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _failing_as_unavailable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise StoreUnavailable(f"spool {exc.filename or path}: {exc.strerror or exc}") from exc


@contextmanager
def _taken(path: Path) -> Iterator[io.BufferedReader | None]:
    """A file to read, locked until the block ends; None where another has it, or it is gone, or not ours to read."""
    file: io.FileIO | None = None
    with _failing_as_unavailable(path), suppress(FileNotFoundError, PermissionError):
        file = _take(path, "rb")
    if file is None:
        yield None
    else:
        reader: io.BufferedReader = io.BufferedReader(file)
        with reader:
            yield reader


def _take(path: Path, mode: str) -> io.FileIO | None:
    """Open and lock a file without waiting. None where another has it, or where `path` is another file by then."""
    file = _open(path, mode)
    with suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
    file.close()
    return None


def _open(path: Path, mode: str) -> io.FileIO:
    """Open a file unbuffered, for its owner only, so that a child born by a fork closes it."""
    with _opening:
        file = io.FileIO(path, mode, opener=_open_private)
        _open_files.add(file)
    return file


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


_spools: weakref.WeakSet[Spool] = weakref.WeakSet()
_open_files: weakref.WeakSet[io.FileIO] = weakref.WeakSet()
_opening = threading.RLock()
"""Held while a file is opened and noted, so that no child is born with one that it does not know of."""


def _start_anew_after_fork() -> None:
    # A lock belongs to the opened file, which parent and child share: it ends only when both have closed it.
    for file in _open_files:
        file.close()
    for spool in _spools:
        spool._start_anew()
    _opening.release()


os.register_at_fork(before=_opening.acquire, after_in_parent=_opening.release, after_in_child=_start_anew_after_fork)
