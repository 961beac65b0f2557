"""`study power`: how noisy what was run is, and how many draws and items tell sets apart."""

from __future__ import annotations

import math
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from calmix.cli.common import AsJson, out, print_json
from calmix.cli.tables import print_rows
from calmix.errors import InputError

MANY = 999  # draws, or times the items: more are not counted out

if TYPE_CHECKING:
    from calmix.analysis.power import Needed


def register(study: typer.Typer) -> None:
    """Add the verb to the sub-command."""
    study.command("power")(power_command)


def power_command(
    study: Annotated[
        Path,
        typer.Argument(
            metavar="STUDY",
            show_default=False,
            help="A study's folder, running, finished or exported.",
        ),
    ],
    difference: Annotated[
        str, typer.Option(metavar="POINTS,...", help="Differences to tell, in points of retention.")
    ] = "1,2,3",
    method: Annotated[
        str | None, typer.Option(show_default="all", help="Only trials of this pruning method.")
    ] = None,
    sparsity: Annotated[
        str | None,
        typer.Option(show_default="all", help="Only this sparsity or pattern: 0.6 or 2:4."),
    ] = None,
    measure: Annotated[
        str, typer.Option(help="primary, probability, bits, smoothed, margin, accuracy or ratio.")
    ] = "primary",
    as_json: AsJson = False,
) -> None:
    """How noisy retention is, and how many draws and items tell sets apart."""
    from calmix.analysis.power import noises, power
    from calmix.capability.measures import check_measure
    from calmix.study.export import read_results

    points = parse_points(difference)
    results = read_results(study)
    noisy = noises(results, method=method, sparsity=sparsity, measure=check_measure(measure))
    found = [one for one in power(noisy, [p / 100 for p in points]) if one.needed]
    if not found:
        raise InputError(
            f"power needs a set with two draws, and {study} has none: give the study file a second "
            "seed"
        )
    if as_json:
        print_json([asdict(one) | {"ratio": one.noise.ratio} for one in found])
        return
    for condition, members in groupby(found, key=lambda one: one.noise.condition):
        own = list(members)
        noise = own[0].noise
        print_rows(
            [
                {
                    "quantity": one.noise.quantity,
                    "signal": _percent(one.noise.signal),
                    "draw": _percent(one.noise.draw),
                    "items": _percent(one.noise.item),
                    "s/n": "-" if one.noise.ratio is None else f"{one.noise.ratio:.1f}",
                }
                | {f"{p:g} pt": _draws(n) for p, n in zip(points, one.needed, strict=True)}
                for one in own
            ],
            as_json=False,
            title=f"{condition}: {noise.sets} sets, {noise.freedom} degrees of freedom",
        )
    from calmix.report import words

    _line(words.wrapped(
        "In points of retention. signal: between single sources; draw, items: noise of one draw, "
        "and of two sets' difference by their items; s/n: signal over both. N\N{NO-BREAK SPACE}pt: "
        "draws of each set that tell N points apart in 80 % of studies, on these items/for other "
        "items too; 3x: no number of draws does so, without some 3 times the items."
    ))  # fmt: skip


def parse_points(text: str) -> list[float]:
    """Return differences in points from `1,2,3`.

    Raises:
        InputError: not numbers above 0, or one given twice.
    """
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < point < math.inf for point in found):
        raise InputError(f"differences are points above 0, as 1,2,3, not '{text}'")
    if len(set(found)) < len(found):
        raise InputError(f"a difference is given twice: {text}")
    return found


def _draws(found: Needed) -> str:
    if found.draws > MANY:
        return _count(found.draws)
    if found.draws_items is None:
        return f"{found.draws}/{_count(math.ceil(found.items))}x"
    return f"{found.draws}/{_count(found.draws_items)}"


def _count(number: int) -> str:
    return f">{MANY}" if number > MANY else str(number)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _line(text: str) -> None:
    out.print(text, soft_wrap=True, highlight=False, markup=False)
