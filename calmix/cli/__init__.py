"""The command line: each verb parses, calls the API and prints; nothing is computed here."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from typing import Annotated

import typer

from calmix.cli import calibrate, compare, evaluate, generate, listing, prune, study
from calmix.cli.common import fail
from calmix.errors import CalmixError

app = typer.Typer(
    name="calmix",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Prune language models with mixed calibration sets, and see which abilities survive.",
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"calmix {importlib.metadata.version('calmix')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of no verb."""


prune.register(app)
calibrate.register(app)
generate.register(app)
evaluate.register(app)
compare.register(app)
listing.register(app)
study.register(app)


def main() -> None:
    """Run the command line. Exit code 2 and one line for a mistake; 130 for an interrupt."""
    try:
        app()
    except CalmixError as error:
        fail(str(error))
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
