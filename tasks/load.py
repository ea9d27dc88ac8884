"""The load: ledger rows into the warehouse, in an interpreter of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from prefect import task

from metering.ledger import Ledger
from metering.settings import Settings
from tasks.errors import WarehouseError
from tasks.warehouse import lease

__all__ = ["for_duckdb", "load_into", "load_ledger"]

ROOT = Path(__file__).parent.parent
PATIENCE_S = 10
"""How long a server may take to answer the load's first word, and to acknowledge any other."""


@task
def load_ledger(ledger_url: str, warehouse: Path, archives: Path | None = None) -> dict[str, int]:
    """Load what is new; returns `loaded` events and the `watermark` reached.

    `archives` is the folder of events that have left the ledger, where the settings have it unless said.

    Raises `WarehouseError`, and what opening the ledger raises.
    """
    with lease(warehouse, exclusive=True) as held:
        return load_into(ledger_url, warehouse, held, archives)


def load_into(ledger_url: str, warehouse: Path, held: int, archives: Path | None = None) -> dict[str, int]:
    """Load what is new, under the lease of descriptor `held`; also events that are only in `archives` any more.

    A fresh interpreter, never a fork: see `tasks.load_worker`. It inherits the lease, so that a worker whose parent
    was killed keeps others out until it has ended too.
    """
    worker = subprocess.run(  # noqa: S603  our own module
        [sys.executable, "-m", "tasks.load_worker", str(warehouse.absolute())],
        cwd=ROOT,
        input=json.dumps(for_duckdb(ledger_url, archives)),
        capture_output=True,
        text=True,
        check=False,
        pass_fds=(held,),
    )
    try:
        answer = json.loads(worker.stdout)
    except json.JSONDecodeError:
        raise WarehouseError(f"the load ended with status {worker.returncode}: {worker.stderr[-2000:]}") from None
    if "error" in answer:
        raise WarehouseError(answer["error"])
    return dict(answer)


def for_duckdb(ledger_url: str, archives: Path | None = None) -> dict[str, str]:
    """Where a ledger and its archives are, as the worker wants to be told, once it is known that it can be used."""
    ledger = Ledger(ledger_url)
    ledger.close()
    folder = {"archives": str((archives or Settings.from_env().archives).absolute())}
    if ledger.dialect == "sqlite":
        return {"type": "sqlite", "at": str(ledger.path.absolute()), **folder}
    from psycopg.conninfo import conninfo_to_dict, make_conninfo  # noqa: PLC0415  only where there is a Postgres

    given: dict[str, Any] = conninfo_to_dict(ledger_url.replace("+psycopg", "", 1))
    password = {"password": given.pop("password")} if "password" in given else {}
    usual: dict[str, Any] = {
        "application_name": "tallystick load",
        "connect_timeout": PATIENCE_S,
        "tcp_user_timeout": PATIENCE_S * 1000,
    }
    return {"type": "postgres", "at": make_conninfo(**{**usual, **given}), **password, **folder}
