"""`doctor`, `inspect` and `rerun`: whether what is here can be relied on."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from calmix.cli.common import (
    HERE,
    AsJson,
    TrustRemoteCode,
    note,
    out,
    print_json,
    progress_bar,
    writing_on,
)
from calmix.cli.tables import print_rows
from calmix.errors import InputError

if TYPE_CHECKING:
    from calmix.trust.inspecting import Health, LayerHealth

WORST = 5  # layers that are named
WARNINGS = 10  # that are told one by one


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command("doctor", rich_help_panel=HERE)(doctor)
    app.command("inspect", rich_help_panel=HERE)(inspect_command)
    app.command("rerun", rich_help_panel=HERE)(rerun_command)


def doctor(as_json: AsJson = False) -> None:
    """Check this installation and machine, and say what to do about what is missing.

    Exit code 0 if pruning works.
    """
    from calmix.trust.doctor import examine, works

    with progress_bar() as bar:
        task = bar.add_task("looking", total=None)
        checks = examine(tick=lambda name: bar.update(task, description=f"looking at {name}"))
    fine = works(checks)
    if as_json:
        print_json({"works": fine, "checks": [asdict(check) for check in checks]})
    else:
        print_rows(
            [{"what": c.name, "state": c.state, "found": c.found} for c in checks],
            as_json=False,
            text=["found"],
            least=[],
        )
        for check in checks:
            if check.advice is not None:
                _line(f"{check.name}: {check.advice}")
        _line("pruning works" if fine else "pruning does not work")
    if not fine:
        sys.exit(2)


def inspect_command(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            show_default=False,
            help="Anything calmix wrote: a checkpoint, pack, set, study, scores, unfinished work.",
        ),
    ],
    layers: Annotated[
        bool, typer.Option("--layers", help="A row for every layer, not for every kind of layer.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(show_default=False, help="Draw sparsity and lost output to a .png or .svg."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check what calmix has written against its manifest, and show how well it is.

    Exit code 2 if a file is missing, damaged or changed.
    """
    from calmix.trust.inspecting import inspect
    from calmix.trust.plotting import check_plot
    from calmix.trust.plotting import plot as draw

    if plot is not None:
        check_plot(plot, path)
    with progress_bar() as bar:
        task = bar.add_task("checking", total=None)
        health = inspect(path, tick=lambda name: bar.update(task, description=f"checked {name}"))
    if as_json:
        print_json(health.to_json())
    else:
        _tell(health, each=layers)
    if health.problems:
        count = len(health.problems)
        more = "" if count == 1 else f" (and {count - 1} more)"
        raise InputError(f"{health.problems[0]}{more}: make it again")
    if plot is not None:
        draw(health, plot)
        if not as_json:
            _line(f"drawn to {plot}")


def rerun_command(
    manifest: Annotated[
        Path,
        typer.Argument(
            metavar="MANIFEST",
            show_default=False,
            help="calmix.json of a pruned or recovered checkpoint, manifest.json of a "
            "calibration set.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", show_default="none is kept", help="Keep the new one in this folder."
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Make an artefact again from its manifest, and say whether it is the same.

    Exit code 2 if not, with the inputs that differ. Relative paths in the manifest are meant from
    the folder you are in.
    """
    from calmix.trust.rerunning import rerun

    beside = manifest if manifest.is_dir() else manifest.parent
    with (
        tempfile.TemporaryDirectory(dir=_writable(beside), prefix=".calmix-rerun-")
        if output is None
        else contextlib.nullcontext(str(output.parent)) as folder,
        progress_bar() as bar,
    ):
        task = bar.add_task("making it again", total=None)
        result = rerun(
            manifest,
            Path(folder) / "again" if output is None else output,
            trust_remote_code=trust_remote_code,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            writing=writing_on(bar),
            note=note,
        )
    if as_json:
        print_json(result.to_json() | {"output": None if output is None else str(output)})
    else:
        for line in result.inputs:
            _line(f"another now: {line}")
        if result.same:
            _line("the same: every file has the hash of the manifest")
    if not result.same:
        why = "though all inputs are the same" if not result.inputs else result.inputs[0]
        raise InputError(f"not the same: {', '.join(result.differing)} ({why})")


def _writable(folder: Path) -> Path | None:
    """Return where a copy can be put for a while: beside the original, or the system's place."""
    place = folder.resolve().parent
    return place if os.access(place, os.W_OK) else None


def _tell(health: Health, *, each: bool) -> None:
    _line(f"{health.path}: {health.kind}")
    for name, value in health.facts.items():
        shown = f"{value:,}" if isinstance(value, int) else value
        _line(f"  {name}: {shown}")
    if health.layers:
        print_rows(_each(health.layers) if each else _by_kind(health.layers), as_json=False)
        measured = [layer for layer in health.layers if layer.error is not None]
        worst = sorted(measured, key=lambda layer: -(layer.error or 0))[:WORST]
        if worst and not each:
            told = ", ".join(f"{layer.name} {layer.error:.1%}" for layer in worst)
            _line(f"most of the output lost: {told}")
    for line in health.warnings[:WARNINGS]:
        _line(f"warning: {line}")
    if len(health.warnings) > WARNINGS:
        _line(f"and {len(health.warnings) - WARNINGS} more warnings (--json has them all)")
    for line in health.problems:
        _line(f"problem: {line}")
    if not health.problems:
        told = "whole: every file is as its manifest says"
        _line(told if health.hashed else "nothing is missing or damaged")


def _each(layers: list[LayerHealth]) -> list[dict[str, Any]]:
    return [
        {
            "layer": layer.name,
            "sparsity": f"{layer.sparsity:.2%}",
            "lost": "" if layer.error is None else f"{layer.error:.2%}",
            "damping": "" if layer.damping is None else f"{layer.damping:g}",
            "dead": layer.dead,
        }
        for layer in layers
    ]


def _by_kind(layers: list[LayerHealth]) -> list[dict[str, Any]]:
    kinds: dict[str, list[LayerHealth]] = {}
    for layer in layers:
        kinds.setdefault(layer.name.rsplit(".", 1)[-1], []).append(layer)
    return [
        {
            "layer": kind,
            "blocks": len(held),
            "sparsity": _range([100 * layer.sparsity for layer in held]),
            "lost output": _range([100 * la.error for la in held if la.error is not None]),
            "damping": _most([la.damping for la in held if la.damping is not None]),
            "dead inputs": sum(layer.dead for layer in held),
        }
        for kind, held in kinds.items()
    ]


def _range(values: list[float]) -> str:
    if not values:
        return ""
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return f"{low}%" if low == high else f"{low}-{high}%"


def _line(text: str) -> None:
    out.print(text, soft_wrap=True, highlight=False, markup=False)


def _most(values: list[float]) -> str:
    return f"{max(values):g}" if values else ""
