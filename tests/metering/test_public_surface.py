"""What is public is written down, and nothing else is loaded by `import metering`."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import metering

HEAVY = ("sqlalchemy", "alembic", "prefect", "pandas", "duckdb", "fastapi", "tiktoken", "genai_prices", "pyarrow")
WITHOUT_NAMES = {
    "metering.admission",
    "metering.billing",
    "metering.billing.tables",
    "metering.checks",
    "metering.integrations",
    "metering.toml_lines",
}
"""Nothing but a folder, or helpers of this package that no user is told of."""


def modules() -> list[str]:
    found = pkgutil.walk_packages(metering.__path__, "metering.")
    return sorted(module.name for module in found if ".migrations" not in module.name)


def test_every_exported_name_is_there_and_is_the_one_of_its_home() -> None:
    assert sorted(metering.__all__) == metering.__all__ == metering.__dir__()
    for name in metering.__all__:
        exported = getattr(metering, name)
        assert exported.__name__ == name
        home = importlib.import_module(exported.__module__)
        assert getattr(home, name) is exported
        assert name in home.__all__
    with pytest.raises(AttributeError, match="module 'metering' has no attribute 'Nothing'"):
        metering.Nothing  # noqa: B018


def test_a_type_checker_sees_what_is_exported() -> None:
    tree = ast.parse(Path(metering.__file__).read_text(encoding="utf-8"))
    [guarded] = [node for node in tree.body if isinstance(node, ast.If)]
    imported = {alias.name for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imported == set(metering.__all__)


@pytest.mark.parametrize("name", modules())
def test_every_module_says_what_is_public(name: str) -> None:
    module = importlib.import_module(name)
    if name in WITHOUT_NAMES:
        return
    assert module.__doc__
    public = set(module.__all__)
    assert len(public) == len(module.__all__)
    for exported in public:
        assert hasattr(module, exported), exported
    for exported in public:
        value = getattr(module, exported)
        if callable(value) and getattr(value, "__module__", name) == name:
            assert value.__doc__, f"{name}.{exported} has no docstring"


def test_importing_is_light() -> None:
    script = (
        "import sys, metering\n"
        "before = set(sys.modules)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
        "from metering import Limit, Plan, Rate, TokenUsage, UsageEvent, LimitExceeded\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
        "from metering import Meter\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines() == ["[]", "[]", "['sqlalchemy']"]
