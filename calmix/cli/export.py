"""`export`: a model for another engine, a calibration set for other tools."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from calmix.cli.common import (
    MAKE,
    AsJson,
    TrustRemoteCode,
    out,
    print_json,
    progress_bar,
    size,
)
from calmix.errors import InputError
from calmix.files import check_output_file, check_output_folder, user_path


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("export", rich_help_panel=MAKE)(export)


def export(
    what: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|SET", show_default=False, help="A model, or a saved calibration set."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", show_default=False,
            help="The new folder; of a set also a .jsonl file.",
        ),
    ],
    to: Annotated[
        str | None,
        typer.Option(metavar="ENGINE", show_default="openvino", help="Of a model: openvino."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            show_default="int8",
            help="Of a model: int8 (a scale an output row; zeros stay zeros), or own.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", show_default=False, help="Of a set: the model it is for."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier result.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Write a model for another engine, checked against it; or a calibration set for other tools.

    A set becomes a .jsonl file (text), or a folder for datasets.load_from_disk (ids and text).
    """
    from calmix.calibration import is_saved_set

    of_a_set = is_saved_set(user_path(what))
    idle = {"--to": to, "--weights": weights} if of_a_set else {"--model": model}
    for option, value in idle.items():
        if value is not None:
            raise InputError(
                f"{option} is for a {'model' if of_a_set else 'calibration set'}, which {what} is "
                "not: leave it out"
            )
    if of_a_set:
        if model is None:
            raise InputError(f"{what} is a calibration set: name the model it is for with --model")
        _export_set(user_path(what), model, output, overwrite, trust_remote_code, as_json)
        return
    from calmix.exported import STEPS
    from calmix.exported import export as write

    with progress_bar() as bar:
        task = bar.add_task("export", total=len(STEPS))
        made = write(
            what, output, to="openvino" if to is None else to,
            weights="int8" if weights is None else weights, overwrite=overwrite,
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


def _export_set(
    folder: Path, model: str, output: Path, overwrite: bool, trust_remote_code: bool, as_json: bool
) -> None:
    from calmix.calibration import CalibrationSet, open_tokenizer
    from calmix.calibration.dataset import export_datasets, export_jsonl
    from calmix.models import check_models

    text = output.suffix.lower() == ".jsonl"
    CalibrationSet.open(folder)
    check_models(model, trust_remote_code=trust_remote_code)
    check = check_output_file if text else check_output_folder
    check(output, inputs=[folder, model], overwrite=overwrite)
    opened = open_tokenizer(model, trust_remote_code=trust_remote_code)
    made = CalibrationSet.open(folder, opened)
    if text:
        export_jsonl(made, opened.tokenizer, output)
    else:
        export_datasets(made, opened.tokenizer, output, overwrite=overwrite)
    if as_json:
        print_json({"output": str(output), "rows": made.rows, "length": made.length})
        return
    out.print(f"{output}: {made.rows} rows of {made.length} tokens", soft_wrap=True)
