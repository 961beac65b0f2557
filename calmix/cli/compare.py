"""`compare`: several models' retention side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from calmix.cli.common import AsJson, out, print_json
from calmix.cli.evaluate import (
    MeasureName,
    Resamples,
    Seed,
    check_bootstrap,
    interval,
    legend,
    table_of,
)
from calmix.errors import InputError

if TYPE_CHECKING:
    from calmix.capability.measures import Measure
    from calmix.capability.retention import Retention


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
    measure: MeasureName = "primary",
    resamples: Resamples = 2000,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Put the retention of several models side by side, dimension by dimension."""
    from calmix.capability.scores import load_scores

    judged = check_bootstrap(measure, resamples, seed)
    names = [path.stem for path in scores]
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise InputError(f"two files are called {doubles[0]}.json: rename one, to tell them apart")
    dense = load_scores(against)
    models = {name: load_scores(path) for name, path in zip(names, scores, strict=True)}

    def kept_by(measure: Measure) -> dict[str, Retention]:
        return {
            name: model.retention(dense, measure=measure, resamples=resamples, seed=seed)
            for name, model in models.items()
        }

    kept = kept_by(judged)
    if as_json:
        print_json({name: retention.to_dict() for name, retention in kept.items()})
        return
    suite = dense.suite
    table = table_of(
        f"retention %, suite {suite['name']} version {suite['version']}, by {judged}",
        ["dimension", *names],
    )
    for dimension in next(iter(kept.values())).dimensions:
        cells = [interval(retention.of(dimension.name)) for retention in kept.values()]
        table.add_row(dimension.name, *cells)
    table.add_section()
    table.add_row("total", *[interval(r.total) for r in kept.values()])
    worst = [(r, r.worst) for r in kept.values()]
    table.add_row("worst", *["-" if name is None else interval(r.of(name)) for r, name in worst])
    table.add_row("", *["" if name is None else f"({name})" for _, name in worst])
    if judged != "accuracy":
        table.add_section()
        table.add_row("by accuracy", *[interval(r.total) for r in kept_by("accuracy").values()])
    out.print(table)
    out.print(legend(resamples, seed), highlight=False)
