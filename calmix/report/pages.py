"""Render the templates of all pages."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from calmix.evaluation.generations import TOKENS
from calmix.report import words


def render(name: str, **context: Any) -> str:
    """Return a filled-in template; in HTML everything is escaped."""
    templates = Environment(
        loader=PackageLoader("calmix.report"),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.globals |= {"w": words, "TOKENS": TOKENS, "zip": zip}
    return templates.get_template(name).render(context)
