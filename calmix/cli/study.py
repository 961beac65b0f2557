"""`study`: the verbs of a study, each group in a module of its own."""

from __future__ import annotations

import typer

from calmix.cli import study_power, study_report, study_run
from calmix.cli.common import MANY

study = typer.Typer(no_args_is_help=True, help="Many trials from one file: run, analyse, report.")


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    study_run.register(study)
    study_power.register(study)
    study_report.register(app, study)
    app.add_typer(study, name="study", rich_help_panel=MANY)
