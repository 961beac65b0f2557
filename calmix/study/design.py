"""Mixes that say most about all mixes: a design over the simplex of some sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from calmix.calibration.mix import make_mix, rows_per_source
from calmix.errors import InputError
from calmix.sources import get_source

CANDIDATES = 2_000  # points of which the design takes those that lie furthest apart


def parse_components(given: Sequence[str]) -> dict[str, list[str]]:
    """Return components by name from `stories` (a source) and `code=python-stdlib+code-compiled`.

    Raises:
        InputError: not of that form, a component or a source named twice.
    """
    found: dict[str, list[str]] = {}
    for text in given:
        name, equals, members = text.partition("=")
        sources = [part.strip() for part in (members if equals else name).split("+")]
        name = name.strip()
        if not name or not all(sources):
            raise InputError(f"a component is SOURCE or NAME=SOURCE+SOURCE, not '{text}'")
        if name in found:
            raise InputError(f"component {name} is named twice")
        found[name] = sources
    every = [source for sources in found.values() for source in sources]
    if doubles := [name for name in every if every.count(name) > 1]:
        raise InputError(f"source {doubles[0]} is named twice")
    return found


def design(
    components: Mapping[str, Sequence[str]],
    *,
    mixes: int,
    rows: int,
    without: bool = False,
    seed: int = 0,
) -> dict[str, dict[str, int]]:
    """Return calibration sets by name, each with the rows of its sources.

    Every component alone (its sources in equal shares), all of them in equal shares, and `mixes`
    points drawn evenly from the simplex (Dirichlet, concentration 1), each time that of
    `CANDIDATES` which lies furthest from those there are *(ours)*.

    Args:
        rows: of a set; what is less than a row is rounded.
        without: also the equal shares of all components but one, for each.

    Raises:
        InputError: fewer than two components, fewer rows than components, or no mixes.
    """
    count = len(components)
    if count < 2:
        raise InputError("a design takes two components or more")
    if rows < count:
        raise InputError(f"{rows} rows do not give each of {count} components one")
    if mixes < 1:
        raise InputError(f"at least 1 mix must be asked for, not {mixes}")
    points: dict[str, Any] = dict(zip(components, np.eye(count), strict=True))
    points["uniform"] = np.full(count, 1 / count)
    if without:
        for at, name in enumerate(components):
            rest = np.full(count, 1 / (count - 1))
            rest[at] = 0
            points[f"without-{name}"] = rest
    candidates = np.random.default_rng(seed).dirichlet(np.ones(count), CANDIDATES)
    there = np.stack(list(points.values()))
    apart = np.square(candidates[:, None] - there).sum(-1).min(1)
    for number in range(1, mixes + 1):
        taken = candidates[int(np.argmax(apart))]
        points[f"mix-{number:02d}"] = taken
        apart = np.minimum(apart, np.square(candidates - taken).sum(-1))
    return {name: _rows(components, point, rows) for name, point in points.items()}


def _rows(components: Mapping[str, Sequence[str]], point: Any, rows: int) -> dict[str, int]:
    weights = {
        source: float(share) / len(sources)
        for share, sources in zip(point, components.values(), strict=True)
        for source in sources
    }
    return {n: c for n, c in rows_per_source(make_mix(weights, "design"), rows).items() if c}


def study_file(
    name: str,
    sets: Mapping[str, Mapping[str, int]],
    *,
    model: str,
    method: str,
    sparsity: float | str,
    rows: int,
) -> str:
    """Return the text of a study file that runs a design.

    Raises:
        SourceError: an unknown source.
    """
    import yaml

    for source in dict.fromkeys(name for mix in sets.values() for name in mix):
        get_source(source)

    head = (
        f"# {len(sets)} sets of {rows} rows: every component alone, all in equal shares, and mixes "
        "over the\n# simplex between them. calmix recommend STORE --unseen says what other mixes "
        "would keep.\n"
    )
    study = {
        "name": name,
        "models": [model],
        "suite": "offline",
        "rows": rows,
        "methods": {method: [sparsity]},
        "seeds": [0],
        "calibrations": {
            key: next(iter(mix)) if len(mix) == 1 else {"mix": dict(mix)}
            for key, mix in sets.items()
        },
    }
    return head + yaml.safe_dump(study, sort_keys=False, default_flow_style=None, width=96)
