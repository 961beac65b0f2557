"""`pack`, `unpack` and `export`: a model in fewer bytes and back, or for another engine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from calmix.cli.common import (
    MAKE,
    AsJson,
    ModelName,
    TrustRemoteCode,
    out,
    print_json,
    progress_bar,
    size,
)

Output = Annotated[Path, typer.Option("--output", "-o", show_default=False, help="The new folder.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a folder that is there.")]


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command("pack", rich_help_panel=MAKE)(pack)
    app.command("unpack", rich_help_panel=MAKE)(unpack)
    app.command("export", rich_help_panel=MAKE)(export)


def pack(
    folder: Annotated[Path, typer.Argument(show_default=False, help="A model folder.")],
    output: Output,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a model in fewer bytes, without loss: zeros as a bit mask, exponents entropy-coded."""
    from calmix.packed import pack as write

    with progress_bar() as bar:
        task = bar.add_task("packing", total=None)
        made = write(
            folder,
            output,
            overwrite=overwrite,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if as_json:
        print_json({"dense": made.dense, "packed": made.packed, "sparse": list(made.sparse)})
        return
    before, after = made.sparse
    sparse = f", {after / before:.3f} where weights are pruned" if before else ""
    out.print(
        f"{made.dense / 1e6:,.1f} MB of weights in {made.packed / 1e6:,.1f} MB "
        f"({made.packed / made.dense:.3f}{sparse}): {output}",
        soft_wrap=True,
        highlight=False,
    )


def unpack(
    folder: Annotated[Path, typer.Argument(metavar="PACK", show_default=False, help="A pack.")],
    output: Output,
    overwrite: Overwrite = False,
) -> None:
    """Write the model folder a pack was made of, byte for byte."""
    from calmix.packed import unpack as write

    with progress_bar() as bar:
        task = bar.add_task("unpacking", total=None)
        dense = write(
            folder,
            output,
            overwrite=overwrite,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    out.print(f"{dense / 1e6:,.1f} MB of weights: {output}", soft_wrap=True, highlight=False)


def export(
    model: ModelName,
    output: Output,
    to: Annotated[str, typer.Option(metavar="ENGINE", help="openvino.")] = "openvino",
    weights: Annotated[
        str,
        typer.Option(help="int8 (a scale an output row; zeros stay zeros), or the model's own."),
    ] = "int8",
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Write a model for another engine, and check it against the model."""
    from calmix.exported import STEPS
    from calmix.exported import export as write

    with progress_bar() as bar:
        task = bar.add_task("export", total=len(STEPS))
        made = write(
            model, output, to=to, weights=weights, overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            say=lambda step: bar.update(task, description=step, completed=STEPS.index(step)),
        )  # fmt: skip
    if as_json:
        print_json(asdict(made))
        return
    out.print(
        f"{size(made.before)} of weights in {size(made.after)}, KL to the model {made.kl:.2g} nats "
        f"a token, same first choice {made.top1:.0%}: {output}",
        soft_wrap=True,
        highlight=False,
    )
