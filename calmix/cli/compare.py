"""`compare`: several models' retention side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from calmix.cli.common import AsJson, out, print_json
from calmix.cli.evaluate import interval, table_of
from calmix.errors import InputError


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("compare")(compare)


def compare(
    scores: Annotated[
        list[Path],
        typer.Argument(
            metavar="SCORES...", show_default=False, help="Files of calmix evaluate -o, by model."
        ),
    ],
    against: Annotated[
        Path, typer.Option(metavar="DENSE", show_default=False, help="The dense model's file.")
    ],
    resamples: Annotated[int, typer.Option(help="Bootstrap resamples of the intervals.")] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Put the retention of several models side by side, dimension by dimension."""
    from calmix.capability.evaluate import load_scores

    if resamples < 1:
        raise InputError(f"the bootstrap needs at least 1 resample, not {resamples}")
    if seed < 0:
        raise InputError(f"the seed must not be negative, but is {seed}")
    names = [path.stem for path in scores]
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise InputError(f"two files are called {doubles[0]}.json: rename one, to tell them apart")
    dense = load_scores(against)
    kept = {
        name: load_scores(path).retention(dense, resamples=resamples, seed=seed)
        for name, path in zip(names, scores, strict=True)
    }
    if as_json:
        print_json({name: retention.to_dict() for name, retention in kept.items()})
        return
    suite = dense.suite
    table = table_of(
        f"retention %, suite {suite['name']} version {suite['version']}",
        ["dimension", "dense", *names],
    )
    dimensions = next(iter(kept.values())).dimensions
    for number, dimension in enumerate(dimensions):
        cells = [interval(retention.dimensions[number].corrected) for retention in kept.values()]
        table.add_row(dimension.name, "100.0", *cells)
    table.add_section()
    table.add_row("total", "100.0", *[interval(r.corrected) for r in kept.values()])
    worst = [
        next((d for d in r.dimensions if d.name == r.worst), r.dimensions[0]) for r in kept.values()
    ]
    table.add_row("worst", "100.0", *[interval(d.corrected) for d in worst])
    table.add_row("", "", *[f"({d.name})" for d in worst])
    out.print(table)
    out.print(
        "corrected for chance; brackets: 95 % paired bootstrap over items, "
        f"{resamples} resamples, seed {seed}",
        soft_wrap=True,
        highlight=False,
    )
