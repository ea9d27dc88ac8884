"""`python -m metering.cli` is `tallystick`."""

from __future__ import annotations

from metering.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
