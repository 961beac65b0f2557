"""Templates: every page, and text, is rendered here."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from calmix.report import words
from calmix.sources.licences import use_of


def render(name: str, **context: Any) -> str:
    """Return a template filled in; in HTML everything is escaped."""
    found = Environment(
        loader=PackageLoader("calmix.report"), autoescape=select_autoescape(),
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    found.globals |= {"w": words, "use_of": use_of, "zip": zip}
    found.filters["heads"] = lambda names, *forms: [
        form.format(name) for name in names for form in forms
    ]
    return found.get_template(name).render(context)
