"""`study analyse`, `report`, `recommend` and `power`: what a finished or running study shows."""

from __future__ import annotations

import math
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from calmix.cli.common import line, percent, print_json
from calmix.cli.study import studies
from calmix.cli.tables import print_table
from calmix.cli.verbs import verb
from calmix.errors import InputError
from calmix.files import check_output_folder, real_place
from calmix.options import Json, MeasureOptions, Settings, Weights, option, path_option

if TYPE_CHECKING:
    from calmix.analysis import Analysis
    from calmix.analysis.power import Needed
    from calmix.study.results import StudyResults

MANY = 999  # seeds, or times the items: more are not counted out


class StudyOptions(MeasureOptions, Json):
    """Which trials of a study are looked at, and by what."""

    study: Path = option(..., "A study's results folder.", argument=True)
    method: str | None = option(None, "Only trials of this pruning method.")
    sparsity: str | None = option(None, "Only this sparsity or pattern: 0.6 or 2:4.")


class AnalyseOptions(Settings, StudyOptions):
    output: Path | None = path_option("Folder to write.", default=None, shown="in STUDY")
    overwrite: bool = option(False, "Replace what calmix wrote there.")


@verb("analyse", of=studies)
def analyse(options: AnalyseOptions) -> None:
    """Ranking, differences and correlations as JSON and CSV, with a summary."""
    folder = _folder(options, "analysis", "analysis.json")
    _, found = _analysis(options)
    found.save(folder)
    _print(found, folder / "analysis.json", options.as_json)


@verb("report", of=studies)
def report(options: AnalyseOptions) -> None:
    """One HTML page with figures, tables and a summary."""
    from calmix.report.study import write_report

    folder = _folder(options, "report", "report.html")
    results, found = _analysis(options)
    write_report(results, found, folder)
    _print(found, folder / "report.html", options.as_json)


def _analysis(options: AnalyseOptions) -> tuple[StudyResults, Analysis]:
    from calmix.analysis import analyse as analysis_of
    from calmix.study import read_results

    results = read_results(options.study)
    return results, analysis_of(results, options, method=options.method, sparsity=options.sparsity)


def _folder(options: AnalyseOptions, name: str, inside: str) -> Path:
    """Return the folder to write to; one that an earlier run made may be replaced."""
    study, output = options.study, options.output
    folder = output if output is not None else study / name
    if output is None and not study.is_dir():
        raise InputError(f"there is no folder {study}")
    inputs = [] if real_place(folder) == real_place(study / name) else [study]
    overwrite = options.overwrite or (folder / inside).is_file()
    check_output_folder(folder, inputs=inputs, overwrite=overwrite)
    return folder


def _print(found: Analysis, written: Path, as_json: bool) -> None:
    from calmix.report.study import summary_text

    if as_json:
        print_json(found.to_dict())
        return
    line(summary_text(found, short=True))
    line(f"\nwritten to {written}")


@verb("recommend", of=studies)
def recommend(
    options: StudyOptions,
    weights: Weights | None = option(
        None,
        "Weight of each dimension, e.g. general=1,code=2.",
        shown="all equal",
        metavar="NAME=WEIGHT,...",
    ),
    top: int = option(5, "Sets to list for each condition.", ge=1),
) -> None:
    """Which calibration set of those studied keeps the most, by your weights."""
    from calmix.analysis import recommend as best_of
    from calmix.report import words
    from calmix.study import read_results

    found = best_of(
        read_results(options.study), weights, measure=options.measure,
        method=options.method, sparsity=options.sparsity,
    )  # fmt: skip
    if options.as_json:
        print_json([asdict(one) for one in found])
        return
    for one in found:
        if not one.candidates:
            line(f"{one.condition}: no task with signal in a weighted dimension")
            continue
        shares = ", ".join(f"{name} {share:.2g}" for name, share in one.weights.items() if share)
        if len(set(one.weights.values())) == 1:
            shares = "all equal"
        rows = [
            {
                "calibration": each.calibration, "made": each.strategy,
                "retention %": words.with_span(each.total),
                "shrunken": words.percent(each.shrunken.value),
                "best": "–" if each.best is None else words.sure(each.best),
                "seeds": each.total.draws,
            }
            for each in one.candidates[:top]
        ]  # fmt: skip
        print_table(rows, least=["seeds", "made", "best", "shrunken"],
                    title=f"{one.condition}, weights {shares}; higher is better")  # fmt: skip
        first, *rest = one.candidates
        head = f"take {first.calibration}" if rest else f"no other set than {first.calibration}"
        tied = " or another that is tied" if len(one.best) > 1 else ""
        best = f". {words.which_is_best(one.candidates)}" if rest else ""
        line(words.wrapped(f"{head}{tied}: expect {words.with_span(first.shrunken)} %{best}"))
    drawn = any(each.total.draw_low is not None for one in found for each in one.candidates)
    over = "test items and seeds" if drawn else "test items; one seed each says nothing of others"
    line(f"brackets: 95 %, over {over} (docs/studies.md)")


@verb("power", of=studies)
def power(
    options: StudyOptions,
    difference: str = option("1,2,3", "Points of retention to detect.", metavar="POINTS,..."),
) -> None:
    """How noisy retention is, and how many seeds and items detect a difference."""
    from calmix.analysis.power import needed, noises
    from calmix.report import words
    from calmix.study import read_results

    points = parse_points(difference)
    noisy = noises(
        read_results(options.study), method=options.method, sparsity=options.sparsity,
        measure=options.measure,
    )  # fmt: skip
    found = [
        (one, [needed(p / 100, one.draw, one.freedom, one.item or 0.0) for p in points])
        for one in noisy if one.draw is not None
    ]  # fmt: skip
    if not found:
        raise InputError(
            f"power needs a set with two seeds, and {options.study} has none: give the study file "
            "a second seed"
        )
    if options.as_json:
        print_json([{"noise": asdict(noise), "needed": [asdict(one) for one in each],
                     "ratio": noise.ratio} for noise, each in found])  # fmt: skip
        return
    for condition, members in groupby(found, key=lambda one: one[0].condition):
        own = list(members)
        rows = [
            {
                "quantity": noise.quantity, "signal": percent(noise.signal),
                "seed": percent(noise.draw), "items": percent(noise.item),
                "s/n": "-" if noise.ratio is None else f"{noise.ratio:.1f}",
                **{f"{p:g} pt": _seeds(n) for p, n in zip(points, each, strict=True)},
            }
            for noise, each in own
        ]  # fmt: skip
        print_table(rows, title=f"{condition}: {own[0][0].sets} sets, "
                    f"{own[0][0].freedom} degrees of freedom")  # fmt: skip
    line(words.wrapped(
        "In points of retention. signal: between single sources; seed, items: noise of one seed, "
        "and of two sets' difference by their items; s/n: signal over both. N\N{NO-BREAK SPACE}pt: "
        "seeds of each set that detect N points in 80 % of studies, on these items/for other items "
        "too; 3x: no number of seeds does, without some 3 times the items."
    ))  # fmt: skip


def parse_points(text: str) -> list[float]:
    """Return differences in points from `1,2,3`; numbers above 0, none twice."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < point < math.inf for point in found):
        raise InputError(f"differences are points above 0, as 1,2,3, not '{text}'")
    if len(set(found)) < len(found):
        raise InputError(f"a difference is given twice: {text}")
    return found


def _seeds(found: Needed) -> str:
    if found.draws > MANY:
        return _count(found.draws)
    if found.draws_items is None:
        return f"{found.draws}/{_count(math.ceil(found.items))}x"
    return f"{found.draws}/{_count(found.draws_items)}"


def _count(number: int) -> str:
    return f">{MANY}" if number > MANY else str(number)
