"""`recover`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from calmix.cli.common import (
    MAKE,
    AsJson,
    Device,
    Leakage,
    LeakageTokens,
    Length,
    Licence,
    OverwriteWork,
    Packing,
    Resume,
    Rows,
    Sources,
    TrustRemoteCode,
    note,
    out,
    print_json,
    progress_bar,
    writing_on,
)
from calmix.files import check_apart
from calmix.sources import load_sources
from calmix.specs import BATCH, recover_request

if TYPE_CHECKING:
    from rich.progress import Progress

    from calmix.calibration import CalibrationSet
    from calmix.recovery import RecoveryReport

LOSSES = {"distill": "KL of the logits, nats a token", "blocks": "relative error of a block"}


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("recover", rich_help_panel=MAKE)(recover_command)


def recover_command(
    pruned: Annotated[
        str,
        typer.Argument(
            metavar="PRUNED", show_default=False, help="The pruned model: what calmix prune wrote."
        ),
    ],
    against: Annotated[
        str,
        typer.Option(
            metavar="DENSE", show_default=False, help="The dense model it was pruned from."
        ),
    ],
    calibration: Annotated[
        str,
        typer.Option(
            show_default=False,
            help="What to train on: a saved set, a source, a mix, self-written.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", show_default=False, help="Folder to write.")
    ],
    method: Annotated[
        str,
        typer.Option(
            help="distill: the whole model towards the dense model's logits; blocks: one block at "
            "a time towards the dense block's outputs, in bounded memory."
        ),
    ] = "distill",
    epochs: Annotated[
        int | None, typer.Option(show_default="2", help="Passes over the rows, at most.")
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            show_default="1e-3, blocks 3e-3",
            help="Learning rate at its peak, as a share of the weights' size; of models less than "
            "0.2 nats a token apart distill takes as much less.",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(help="Rows a step.")] = BATCH,
    rows: Rows = None,
    length: Length = None,
    seed: Annotated[
        int | None,
        typer.Option(
            show_default="0",
            help="Seed of the calibration draw; it decides the held-out rows and the order too.",
        ),
    ] = None,
    packing: Packing = None,
    leakage: Leakage = None,
    leakage_tokens: LeakageTokens = None,
    licence: Licence = None,
    sources: Sources = None,
    dtype: Annotated[
        str,
        typer.Option(help="Compute in bfloat16 or float32; auto: bfloat16 where it is fast."),
    ] = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    max_memory: Annotated[
        str | None,
        typer.Option(show_default="no bound", help="Memory it may take, such as 6GiB."),
    ] = None,
    resume: Resume = False,
    overwrite: OverwriteWork = False,
    as_json: AsJson = False,
) -> None:
    """Train what a prune has left towards the dense model, its zeros held, on a calibration set.

    Rows held out of the set decide when to stop. Under accelerate launch or torchrun, distill
    shares the work among processes.
    """
    request = recover_request(
        calibration=calibration,
        method=method,
        epochs=epochs,
        lr=lr,
        batch=batch,
        rows=rows,
        length=length,
        seed=seed,
        packing=packing,
        leakage=leakage,
        leakage_tokens=leakage_tokens,
        licence=licence,
        sources=None if sources is None else load_sources(sources),
    )
    from calmix.pruning.budget import parse_memory
    from calmix.recovery import recover

    bound = None if max_memory is None else parse_memory(max_memory)
    check_apart(output, [sources])

    def started(drawn: CalibrationSet) -> None:
        if not leads:
            return
        shares = ", ".join(f"{name} {count}" for name, count in drawn.counts.items())
        note(f"recovering on {drawn.rows} rows of {drawn.length} tokens: {shares}")

    leads = os.environ.get("RANK", "0") == "0"  # of several processes one tells
    with progress_bar(shown=leads) as bar:
        report = recover(
            pruned,
            against,
            request,
            output,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            overwrite=overwrite,
            resume=resume,
            max_memory=bound,
            started=started,
            progress=recovering_on(bar, method),
            writing=writing_on(bar),
            note=note,
        )
    if not leads:
        return
    if as_json:
        print_json({"output": str(output)} | report.to_json())
        return
    tell_recovery(output, report)


def recovering_on(bar: Progress, method: str) -> Callable[[int, int, str], None]:
    """Return what shows on a bar how far a recovery is, and its latest loss."""
    task = bar.add_task(method, total=None)

    def show(done: int, total: int, loss: str) -> None:
        bar.update(task, completed=done, total=total, description=f"{method}, {loss}")

    return show


def tell_recovery(output: Path, report: RecoveryReport) -> None:
    """Print what became of a recovery."""
    out.print(
        f"held-out rows ({len(report.held_out)} of {report.rows}), {LOSSES[report.method]}: "
        f"{report.before:.4f} before, {report.after:.4f} after",
        soft_wrap=True,
        highlight=False,
    )
    out.print(
        f"{report.zeros:,} of {report.weights:,} weights are zero as before "
        f"({report.zeros / report.weights:.4%}), {report.seconds['total']:.1f} s: {output}",
        soft_wrap=True,
        highlight=False,
    )
    if report.after >= report.before:
        note("the held-out rows got no better: the weights are as they came")
