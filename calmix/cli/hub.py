"""`hub push`: what calmix has made, on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from calmix.cli.common import MAKE, note, out, progress_bar


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    hub = typer.Typer(no_args_is_help=True, help="Models on the Hugging Face hub.")
    hub.command("push")(push)
    app.add_typer(hub, name="hub", rich_help_panel=MAKE)


def push(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", show_default=False, help="A model folder with its card, or a pack."
        ),
    ],
    repository: Annotated[
        str,
        typer.Argument(metavar="OWNER/NAME", show_default=False, help="Made if there is none."),
    ],
    pack: Annotated[
        bool, typer.Option("--pack", help="Push a pack of the model: fewer bytes, without loss.")
    ] = False,
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private, if it is made.")
    ] = False,
) -> None:
    """Push a model and its card in one commit. The hub client's own login is used."""
    from calmix.hub import CARD
    from calmix.hub import push as write

    with progress_bar() as bar:
        task = bar.add_task("push", total=None)
        address = write(
            folder, repository, pack=pack, private=private,
            say=lambda line: bar.update(task, description=line),
        )  # fmt: skip
    if not (folder / CARD).is_file():
        note(f"{folder} has no {CARD}: pushed without a card (calmix report writes one)")
    out.print(address, soft_wrap=True, highlight=False)
