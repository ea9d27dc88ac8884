from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

from reports.summary import summary_html

ROOT = Path(__file__).parents[2]
RENDER = """
import pickle, sys
from reports.summary import summary_html
sys.stdout.buffer.write(summary_html(pickle.loads(sys.stdin.buffer.read())).encode())
"""


def test_same_summary_same_bytes_also_on_another_clock(make: Any) -> None:
    summary = make.summary()
    here = summary_html(summary).encode()
    assert summary_html(summary).encode() == here

    elsewhere = {
        **os.environ,
        "TZ": "Pacific/Honolulu",
        "PYTHONHASHSEED": "7",
        "LC_ALL": "C",
        "PYTHONPATH": str(ROOT),
    }
    ran = subprocess.run(
        [sys.executable, "-c", RENDER], input=pickle.dumps(summary), env=elsewhere, capture_output=True, check=True
    )
    assert ran.stdout == here
