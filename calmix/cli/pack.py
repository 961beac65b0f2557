"""`pack` and `unpack`: a model in fewer bytes, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from calmix.cli.common import MAKE, AsJson, out, print_json, progress_bar

Output = Annotated[Path, typer.Option("--output", "-o", show_default=False, help="The new folder.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result.")]


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command("pack", rich_help_panel=MAKE)(pack)
    app.command("unpack", rich_help_panel=MAKE)(unpack)


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
