"""`study`: many trials from one file, run and analysed."""

from __future__ import annotations

import typer

from calmix.cli import study_report, study_run


def register(app: typer.Typer, panel: str) -> None:
    """Add the group to the command line."""
    study = typer.Typer(
        no_args_is_help=True, help="Many trials from one file: run, analyse, report."
    )
    study_run.register(study)
    study_report.register(study)
    app.add_typer(study, name="study", rich_help_panel=panel)
