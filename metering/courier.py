"""What a store is told later: kept in the spool of this machine, and carried there as soon as it can be."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from typing import TYPE_CHECKING

from metering.errors import StoreUnavailable
from metering.spool import Spool

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from uuid import UUID

    from metering.spool import Line, Shipped

    Deliver = Callable[[list[Line]], list[Line]]

__all__ = ["Courier"]

logger = logging.getLogger("metering")

EVERY_S = 1.0
MOST_CLOSE_S = 30.0

_couriers: weakref.WeakSet[Courier] = weakref.WeakSet()


class Courier:
    """Keeps facts in a folder, and carries them from one thread that lives as long as there are any."""

    def __init__(self, folder: Path, ledger_id: UUID) -> None:
        self._folder = folder
        self._spool = Spool(folder, owner=ledger_id)
        self._shipping = threading.Lock()
        self._delivers: dict[str, Deliver] = {}
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_empty = True
        self._closing = False
        _couriers.add(self)

    def carries(self, kind: str, deliver: Deliver) -> None:
        """From now on `deliver` gets the lines of a kind, and returns those that cannot be told now.

        Kinds are delivered in the order in which they were given here. It must be idempotent: see `Spool.ship`.
        """
        self._delivers[kind] = deliver

    def begin(self) -> None:
        """Carry what processes that are gone have left, if there is anything."""
        if self._folder.is_dir() and any(self._folder.iterdir()):
            self._rouse()

    def keep(self, kind: str, named: UUID, payload: bytes, *, durable: bool = True) -> None:
        """Keep a fact. It survives a kill, and if `durable` a power cut. Raises what `Spool.append` does."""
        self._spool.append(kind, named, payload, durable=durable)
        self._rouse()

    def ship(self) -> Shipped:
        """Carry what waits, also of processes that are gone. Raises `StoreUnavailable` for an unreadable spool."""
        with self._shipping:
            return self._spool.ship(self._deliver)

    def close(self) -> None:
        """Stop, after a last attempt to ship; what is left is for the next process, or for the drain."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(MOST_CLOSE_S)
            self._ship_quietly()
        self._spool.close()

    def _rouse(self) -> None:
        with self._wake:
            self._is_empty = False
            if self._thread is None and not self._closing:
                self._thread = threading.Thread(target=self._run, name="metering-spool", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            with self._wake:
                if self._is_empty or self._closing:
                    self._thread = None
                    return
                self._wake.wait(EVERY_S)
                self._is_empty = True
            if not self._ship_quietly():
                self._is_empty = False

    def _ship_quietly(self) -> bool:
        """Whether all that waited was carried."""
        try:
            return not self.ship().kept
        except StoreUnavailable as exc:
            logger.warning("what waits in the spool cannot be carried now: %s", exc)
        except Exception:
            logger.exception("what waits in the spool cannot be carried")
        return False

    def _deliver(self, lines: list[Line]) -> list[Line]:
        """Deliver lines; those of kinds that nobody carries here are of another store, or a newer version."""
        left = [line for line in lines if line.kind not in self._delivers]
        for kind, deliver in self._delivers.items():
            of_kind = [line for line in lines if line.kind == kind]
            if not of_kind:
                continue
            try:
                left += deliver(of_kind)
            except Exception:
                logger.exception("%d lines of the spool could not be carried, and stay: %s", len(of_kind), kind)
                left += of_kind
        return left

    def _start_anew(self) -> None:
        self._wake = threading.Condition()
        self._shipping = threading.Lock()
        self._thread = None
        self._is_empty = True


def _start_anew_after_fork() -> None:
    for courier in _couriers:
        courier._start_anew()


os.register_at_fork(after_in_child=_start_anew_after_fork)
