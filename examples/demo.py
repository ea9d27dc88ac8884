"""The whole way in one go: a month of usage into a ledger, and its bills out. `make demo` runs this.

Without files it makes up a month of traffic and what was traced of it, always the same (`examples.traffic`,
`examples.traces`), on `examples/plans.toml`, and reconciles the two. With files it bills those; what
`tallystick import` takes after them is passed on.
"""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

from examples.traces import write_traces
from examples.traffic import write_month

MONTH = "2026-10"
PLANS = Path(__file__).with_name("plans.toml")


def main() -> int:
    """Run the demo; the exit status of the first command that failed, else 0."""
    parser = ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="CSV, JSON lines or Parquet files to bill")
    parser.add_argument("--period", help=f"the month to bill, YYYY-MM; {MONTH} for made-up traffic, else required")
    given, import_options = parser.parse_known_args()
    if given.files and not given.period:
        parser.error("--period is required with files: the month to bill, YYYY-MM")

    os.environ.setdefault("METERING_HOME", str(Path(".tallystick") / "demo"))
    if not Path("plans.toml").exists():
        os.environ.setdefault("METERING_PLANS", str(PLANS))
    period = given.period or MONTH
    files, traces = given.files, []
    if not files:
        calls, traces = _made_up(period)
        files, import_options = [calls], ["--map", "idempotency_key=request_id", *import_options]
    commands = [
        ["metering.cli", "init"],
        ["metering.cli", "import", *map(str, files), *import_options],
        *(["metering.cli", "import-spans", str(file)] for file in traces),
        *(["flows", "reconcile-tokens", "--period", period] for _ in traces),
        ["flows.billing_cycle", "--period", period],
        ["flows", "verify", "invoice", "--period", period],
    ]
    for command in commands:
        shown = " ".join(["python -m", *command]).replace("python -m metering.cli", "tallystick")
        print(f"\n$ {shown}", flush=True)
        status = subprocess.run([sys.executable, "-m", *command], check=False).returncode  # noqa: S603
        if status:
            return status
    page = Path(os.environ["METERING_HOME"]) / "out" / period / "index.html"
    print(f"\nThe bills of {period} are on {page.absolute()}")
    if traces:
        print(f"What differs from the traces is on {page.with_name('reconciliation.html').absolute()}")
    return 0


def _made_up(period: str) -> tuple[Path, list[Path]]:
    """The calls and the traces of a month."""
    calls = Path(os.environ["METERING_HOME"]) / f"traffic-{period}.csv"
    traces = calls.with_name(f"traces-{period}.jsonl")
    calls.parent.mkdir(parents=True, exist_ok=True)
    summary = write_month(calls, period=period)
    planted = write_traces(calls, traces)
    print(f"made up {summary.rows:,} calls of {summary.accounts} accounts: {calls}")
    faults = ", ".join(f"{count} x {fault}" for fault, count in planted.items() if fault != "none")
    print(f"and what was traced of their {sum(planted.values()):,} runs, with faults planted ({faults}): {traces}")
    return calls, [traces]


if __name__ == "__main__":
    sys.exit(main())
