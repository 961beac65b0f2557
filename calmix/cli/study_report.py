"""`study analyse`, `study report` and `recommend`: what a finished or running study shows."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from calmix.cli.common import MANY, AsJson, out, print_json
from calmix.cli.tables import print_rows
from calmix.errors import InputError
from calmix.files import check_output_folder, real_place

if TYPE_CHECKING:
    from calmix.analysis import Analysis, Recommendation
    from calmix.capability.measures import Measure as Kind
    from calmix.study.results import StudyResults

Study = Annotated[
    Path,
    typer.Argument(
        metavar="STUDY", show_default=False, help="A study's folder, running, finished or exported."
    ),
]
Folder = Annotated[Path | None, typer.Option("-o", "--output", show_default=False)]
Method = Annotated[
    str | None, typer.Option(show_default="all", help="Only trials of this pruning method.")
]
Sparsity = Annotated[
    str | None, typer.Option(show_default="all", help="Only this sparsity or pattern: 0.6 or 2:4.")
]
Measure = Annotated[
    str,
    typer.Option(
        help="What retention is of: primary (each task's own score), probability, bits, smoothed, "
        "margin, accuracy (the paper's, corrected for chance) or ratio (not corrected)."
    ),
]
Over = Annotated[
    str,
    typer.Option(help="Sets that count in correlations: single sources, or all (mixes too)."),
]
Default = Annotated[
    str | None,
    typer.Option(
        show_default="mean of the single sources", help="The set that margins are measured over."
    ),
]
Permutations = Annotated[int, typer.Option(help="Draws for p-values beyond 8 sets.")]
Resamples = Annotated[int, typer.Option(help="Bootstrap resamples of the intervals.")]
Seed = Annotated[int, typer.Option(help="Seed of permutations and bootstrap.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier result of another kind.")
]


def register(app: typer.Typer, study: typer.Typer) -> None:
    """Add the verbs to the command line."""
    study.command("analyse")(analyse)
    study.command("report")(report)
    app.command("recommend", rich_help_panel=MANY)(recommend)


def analyse(
    study: Study,
    output: Folder = None,
    method: Method = None,
    sparsity: Sparsity = None,
    measure: Measure = "primary",
    over: Over = "single",
    default: Default = None,
    permutations: Permutations = 19_999,
    resamples: Resamples = 2_000,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Correlations, trade-offs, ranking and differences as JSON and CSV, and what they say.

    Writes to STUDY/analysis unless -o names another folder.
    """
    folder = _folder(study, output, "analysis", "analysis.json", overwrite)
    _, found = _analysis(
        study, method, sparsity, measure, over, default, permutations, resamples, seed
    )
    found.save(folder)
    _tell(found, folder / "analysis.json", as_json)


def report(
    study: Study,
    output: Folder = None,
    method: Method = None,
    sparsity: Sparsity = None,
    measure: Measure = "primary",
    over: Over = "single",
    default: Default = None,
    permutations: Permutations = 19_999,
    resamples: Resamples = 2_000,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """One HTML page with figures, tables and a summary, and a brief one to pass on.

    Writes to STUDY/report unless -o names another folder, the figures as PNG and SVG too.
    """
    from calmix.report import write_report

    folder = _folder(study, output, "report", "report.html", overwrite)
    results, found = _analysis(
        study, method, sparsity, measure, over, default, permutations, resamples, seed
    )
    write_report(results, found, folder)
    _tell(found, folder / "report.html", as_json)


def recommend(
    study: Study,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="NAME=WEIGHT,...", show_default="all equal",
            help="How much each dimension matters, for example general=1,code=2.",
        ),
    ] = None,
    method: Method = None,
    sparsity: Sparsity = None,
    measure: Measure = "primary",
    top: Annotated[int, typer.Option(help="Sets to list for each method and sparsity.")] = 5,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Which calibration set of those studied keeps the most, by your weights."""
    from calmix.analysis import recommend as best_of
    from calmix.report import words

    asked = parse_weights(weights)
    if top < 1:
        raise InputError(f"at least 1 set must be listed, not {top}")
    found = best_of(
        _results(study), asked, measure=_measure(measure), method=method, sparsity=sparsity
    )
    if as_json:
        print_json([asdict(one) for one in found])
        return
    for one in found:
        if not one.candidates:
            out.print(f"{one.condition}: no task with signal in a weighted dimension")
            continue
        shares = ", ".join(f"{name} {share:.2g}" for name, share in one.weights.items() if share)
        if len(set(one.weights.values())) == 1:
            shares = "all equal"
        print_rows(
            [
                {
                    "calibration": each.calibration,
                    "made": each.strategy,
                    "retention %": words.with_span(each.total),
                    "shrunken": words.percent(each.shrunken.value),
                    "best": "–" if each.best is None else words.sure(each.best),
                    "draws": each.total.draws,
                }
                for each in one.candidates[:top]
            ],
            as_json=False,
            least=["draws", "made", "best", "shrunken"],
            title=f"{one.condition}, weights {shares}",
        )
        _line(words.wrapped(_advice(one)))
    drawn = any(each.total.draw_low is not None for one in found for each in one.candidates)
    _line(
        f"brackets: 95 %, for other test items{' and calibration draws' if drawn else ''} "
        "(docs/analysis.md)"
    )


def parse_weights(text: str | None) -> dict[str, float] | None:
    """Return weights by name from `general=1,code=2`.

    Raises:
        InputError: not of that form, or a name given twice.
    """
    if text is None:
        return None
    found: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = (piece.strip() for piece in part.partition("="))
        try:
            weight = float(number)
        except ValueError:
            equals = ""
        if not name or not equals:
            raise InputError(f"weights are written NAME=NUMBER,..., not '{part.strip()}'")
        if name in found:
            raise InputError(f"the weight of {name} is given twice")
        found[name] = weight
    return found


def _advice(found: Recommendation) -> str:
    """Say which set to take, and how sure that is."""
    from calmix.report import words

    first, *rest = found.candidates
    head = f"take {first.calibration}" if rest else f"no other set than {first.calibration}"
    if len(found.best) > 1:
        head += " or another that is tied"
    text = f"{head}: expect {words.with_span(first.shrunken)} %"
    if not rest:
        return text
    text += f". {words.which_is_best(found.candidates)}"
    tied = len(found.best) > 1
    lead = next(one.behind for one in rest if not tied or one.calibration in found.best)
    if lead is None or lead.value is None:
        return text
    if not tied and lead.sure is not None:
        text += f", {words.sure(lead.sure)} sure"
    if lead.draw_low is None:
        return f"{text}, for other items; what other draws would do cannot be told from one each"
    return f"{text}; for other draws on these items {words.span(lead.draw_low, lead.draw_high)}"


def _results(study: Path) -> StudyResults:
    from calmix.study import read_results

    return read_results(study)


def _measure(measure: str) -> Kind:
    from calmix.capability.measures import check_measure

    return check_measure(measure)


def _analysis(
    study: Path,
    method: str | None,
    sparsity: str | None,
    measure: str,
    over: str,
    default: str | None,
    permutations: int,
    resamples: int,
    seed: int,
) -> tuple[StudyResults, Analysis]:
    from calmix.analysis import Settings
    from calmix.analysis import analyse as analysis_of

    settings = Settings(_measure(measure), over, default, permutations, resamples, seed)  # type: ignore[arg-type]
    results = _results(study)
    return results, analysis_of(results, settings, method=method, sparsity=sparsity)


def _folder(study: Path, output: Path | None, name: str, inside: str, overwrite: bool) -> Path:
    """Return the folder to write to; one that an earlier run made may be replaced."""
    folder = output if output is not None else study / name
    if output is None and not study.is_dir():
        raise InputError(f"there is no folder {study}")
    inputs = [] if real_place(folder) == real_place(study / name) else [study]
    overwrite = overwrite or (folder / inside).is_file()
    check_output_folder(folder, inputs=inputs, overwrite=overwrite)
    return folder


def _tell(found: Analysis, written: Path, as_json: bool) -> None:
    from calmix.report import summarise

    if as_json:
        print_json(found.to_dict())
        return
    _line(summarise(found).short())
    _line(f"\nwritten to {written}")


def _line(text: str) -> None:
    out.print(text, soft_wrap=True, highlight=False, markup=False)
