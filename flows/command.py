"""Flows as commands: `python -m flows.NAME --option VALUE`."""

from __future__ import annotations

import inspect
import json
import logging
import sys
from argparse import SUPPRESS, ArgumentParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metering.errors import MeteringError
from tasks.errors import JobError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["call", "run"]


def run(flow: Any) -> None:
    """Run a flow with its parameters read from the command line, print its result, and exit.

    A parameter that is False unless said is a flag; any other has a value.
    """
    parser = ArgumentParser(prog=f"python -m flows.{flow.fn.__name__}", description=inspect.getdoc(flow.fn))
    for name, parameter in inspect.signature(flow.fn).parameters.items():
        action = "store_true" if parameter.default is False else "store"
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, default=SUPPRESS, action=action)
    sys.exit(call(flow, **vars(parser.parse_args())))


def call(job: Callable[..., Any], **parameters: Any) -> int:
    """Call a job, print its result, and return the exit status. What it says is wrong is said without a traceback."""
    from prefect.exceptions import ParameterTypeError

    # A flow's own log goes to Prefect; on the terminal its traceback would bury what the error says.
    for name in ("prefect", "prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        result = job(**parameters)
    except (MeteringError, JobError, ParameterTypeError) as exc:
        return _failed(str(exc))
    except OSError as exc:
        return _failed(f"{exc.filename}: {exc.strerror}" if exc.filename else str(exc))
    if isinstance(result, dict):
        print(json.dumps(result))
    elif isinstance(result, Path):
        print(result.absolute())
    elif isinstance(result, list):
        for line in result or ["nothing changes"]:
            print(line)
    return 0


def _failed(problem: str) -> int:
    print("error:", " ".join(problem.splitlines()), file=sys.stderr)
    return 1
