"""`compare`: several models' retention side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from calmix.cli.common import LEFT, AsJson, out, print_json
from calmix.cli.evaluate import (
    MeasureName,
    Resamples,
    Seed,
    check_bootstrap,
    interval,
    kl_cells,
    legend,
)
from calmix.cli.tables import show, table_of
from calmix.errors import InputError

if TYPE_CHECKING:
    from calmix.capability.measures import Measure
    from calmix.capability.retention import Retention


BESIDE = 3  # models whose intervals fit side by side into 80 columns


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("compare", rich_help_panel=LEFT)(compare)


def compare(
    scores: Annotated[
        list[Path],
        typer.Argument(
            metavar="SCORES...", show_default=False, help="Files of calmix evaluate -o, by model."
        ),
    ],
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="DENSE", show_default="the one in SCORES", help="The dense model's file."
        ),
    ] = None,
    measure: MeasureName = "primary",
    resamples: Resamples = 2000,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Put the retention of several models side by side, dimension by dimension."""
    from calmix.capability.distance import flips
    from calmix.capability.scores import load_dense, load_scores

    judged = check_bootstrap(measure, resamples, seed)
    # A folder of calmix compress is known by its own name.
    names = [path.resolve().parent.name if path.stem == "scores" else path.stem for path in scores]
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise InputError(f"two files are called {doubles[0]}: rename one, to tell them apart")
    dense = load_dense(scores[0]) if against is None else load_scores(against)
    if dense is None:
        raise InputError(
            f"{scores[0]} was scored without a dense model: name its file with --against"
        )
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
    changed = [
        flips(dense.tasks, model.tasks, resamples=resamples, seed=seed).total
        for model in models.values()
    ]
    far = [(model.distance or {}).get("total") for model in models.values()]
    whole = list(kept.values())
    rows: dict[str, list[str]] = {
        one.name: [interval(each.of(one.name)) for each in whole] for one in whole[0].dimensions
    }
    rows["total"] = [interval(each.total) for each in whole]
    rows["worst"] = [each.worst or "-" for each in whole]
    if judged != "accuracy":
        rows["by accuracy"] = [interval(each.total) for each in kept_by("accuracy").values()]
    if any(far):
        rows["KL to dense"] = [kl_cells(one, far)[0] for one in far]
        rows["top-1 %"] = [kl_cells(one, far)[-1] for one in far]
    rows["flips %"] = ["-" if one is None else interval(one.share) for one in changed]
    suite = dense.suite
    title = f"retention %, suite {suite['name']} version {suite['version']}, by {judged}"
    least = ["by accuracy", "top-1 %", "flips %", "worst", "KL to dense"]
    if len(models) <= BESIDE:
        least = []
        table = table_of(title, ["", *names])
        for label, cells in rows.items():
            if label in ("total", "by accuracy", "KL to dense"):
                table.add_section()
            table.add_row(label, *cells)
    else:  # a row a model, the intervals but the total's left out
        table = table_of(title, ["", *rows])
        for number, name in enumerate(names):
            cells = [
                row[number] if label == "total" else row[number].split(" ")[0]
                for label, row in rows.items()
            ]
            table.add_row(name, *cells)
    show(table, least=least)
    out.print(legend(resamples, seed), highlight=False)
