"""Mixes of sources: named ones, and how a user writes one."""

from __future__ import annotations

import math
from collections.abc import Mapping

from calmix.errors import InputError

# Named mixes, with relative weights. `mix-default` is what `compress` takes, with chats added, and
# `mix-permissive` what it takes under a licence filter: two sources per dimension (mathematics has
# one) that need neither network nor extra. `mix-clean` shares no benchmark with a suite, not even
# the half that is not scored; the web mixes are the usual calibration text, without selection.
MIXES: dict[str, dict[str, float]] = {
    "mix-default": {
        "encyclopedia": 1.0,
        "books": 1.0,
        "stories": 1.0,
        "procedures": 1.0,
        "python-stdlib": 1.0,
        "code-compiled": 1.0,
        "math-solutions": 2.0,
    },
    "mix-permissive": {
        "papers": 1.0,
        "abstracts": 1.0,
        "procedures": 1.0,
        "activities": 1.0,
        "python-stdlib": 1.0,
        "code-compiled": 1.0,
        "math-solutions": 2.0,
    },
    "mix-8": dict.fromkeys(
        (
            "encyclopedia",
            "books",
            "stories",
            "activities",
            "python-stdlib",
            "code-compiled",
            "math-solutions",
            "word-problems",
        ),
        1.0,
    ),
    "mix-clean": {
        "encyclopedia": 2.0,
        "papers": 1.0,
        "stories": 2.0,
        "python-stdlib": 1.0,
        "python-algorithms": 1.0,
        "cpp-headers": 1.0,
        "word-problems": 2.0,
    },
    "web-mix": dict.fromkeys(("c4", "github-code", "gutenberg", "stackexchange"), 1.0),
    "web-mix-70": {"c4": 7.0, "github-code": 1.0, "gutenberg": 1.0, "stackexchange": 1.0},
}
OFFLINE = "offline"  # in a mix: every builtin source that needs no hub
# The model writes their text.
GENERATOR_NAMES = ("self-written", "chat", "prompts", "igsp", "self-cal", "sgs")
# Source names with positive weights that sum to 1, in the order they were written.
Mix = dict[str, float]


def mix_text(mix: Mapping[str, float]) -> str:
    """Return a mix as a user writes it."""
    return ",".join(f"{name}:{weight:.4g}" for name, weight in mix.items())


def parse_mix(text: str) -> Mix:
    """Parse `name`, `a:0.5,b:0.3,c:0.2` or `uniform:a,b,c` into a mix.

    Names may be paths. Weights are relative; a source with weight 0 is dropped.
    """
    text = text.strip()
    uniform = text.startswith("uniform:")
    weights: dict[str, float] = {}
    for part in (piece.strip() for piece in text.removeprefix("uniform:").split(",")):
        if not part:
            raise InputError(f"calibration '{text}' has an empty name between commas")
        name, _, number = part.rpartition(":")
        try:
            source, weight = (part, 1.0) if uniform or not name else (name.strip(), float(number))
        except ValueError:
            source, weight = part, 1.0
        if source == part and "," in text and not uniform:
            raise InputError(
                f"calibration '{text}': '{part}' has no weight: write {part}:0.5, or "
                "uniform:a,b,c for equal weights"
            )
        if source in weights:
            raise InputError(f"calibration '{text}' names '{source}' twice")
        weights[source] = weight
    for name, weight in weights.items():
        if not math.isfinite(weight) or weight < 0:
            raise InputError(f"calibration '{text}': the weight of '{name}' is {weight}, not >= 0")
    total = sum(weights.values())
    if not total > 0:
        raise InputError(f"calibration '{text}': all weights are zero")
    return {name: weight / total for name, weight in weights.items() if weight > 0}
