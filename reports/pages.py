"""Templates to pages: everything is escaped, and a name the template does not know is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from reports import formats

__all__ = ["page"]

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_TEMPLATES.filters.update({name: getattr(formats, name) for name in formats.__all__})


def page(template: str, **context: Any) -> str:
    """One self-contained HTML page from `templates/{template}`."""
    return _TEMPLATES.get_template(template).render(context)
