"""`export`: a model for another engine or the hub, a calibration set for other tools."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Literal

import typer

from calmix.cli.common import line, note, print_json, progress_bar, size
from calmix.cli.verbs import verb
from calmix.errors import InputError
from calmix.files import check_output_file, check_output_folder, user_path
from calmix.options import Json, option, path_option

Form = Literal["pack", "model", "openvino", "hub", "datasets", "jsonl"]


class ExportOptions(Json):
    """What `export` can be asked for."""

    what: str = option(..., "A model, a pack or a saved calibration set.", argument=True)
    to: Form | None = option(None, "Form to write.", shown="pack; of a set datasets or jsonl")
    output: Path | None = path_option("Folder or .jsonl file to write.", default=None)
    weights: Literal["int8", "own"] = option("int8", "OpenVINO: 8-bit weights, or the model's own.")
    repository: str | None = option(None, "Hub: repository to push to, e.g. me/small.")
    pack: bool = option(False, "Hub: push a pack, lossless and smaller.")
    private: bool = option(False, "Hub: create the repository private.")
    model: str | None = option(None, "Set: the model it is for.", flag="--model -m")
    overwrite: bool = option(False, "Replace what calmix wrote there.")
    trust_remote_code: bool = option(
        False, "Run modelling code shipped with the model.", advanced=True
    )


USE = {  # which options a form has
    "pack": {"output", "overwrite"}, "model": {"output", "overwrite"},
    "openvino": {"output", "overwrite", "weights", "trust_remote_code"},
    "hub": {"repository", "pack", "private"},
    "datasets": {"output", "overwrite", "model", "trust_remote_code"},
    "jsonl": {"output", "overwrite", "model", "trust_remote_code"},
}  # fmt: skip


def register(app: typer.Typer, panel: str) -> None:
    """Add the verb to the command line."""
    verb(app, "export", panel)(export)


def export(options: ExportOptions) -> None:
    """Write a model for another engine, a smaller pack, the hub, or a set for other tools."""
    from calmix.calibration import is_saved_set

    of_set, output = is_saved_set(user_path(options.what)), options.output
    text = output is not None and output.suffix.lower() == ".jsonl"
    form: str = options.to or (("jsonl" if text else "datasets") if of_set else "pack")
    if of_set != (form in ("datasets", "jsonl")):
        kind = "a calibration set" if of_set else "no saved calibration set"
        raise InputError(f"{options.what} is {kind}: it cannot be exported to {form}")
    given = {name for name, value in options if value != type(options).model_fields[name].default}
    if idle := sorted(given - USE[form] - {"what", "to", "as_json"}):
        flag = idle[0].replace("_", "-")
        raise InputError(f"--{flag} has no effect with --to {form}: leave it out")
    needed = {"hub": "repository"}.get(form, "output")
    if getattr(options, needed) is None:
        raise InputError(f"--to {form} needs --{needed}")
    if of_set and options.model is None:
        raise InputError(f"{options.what} is a calibration set: name the model it is for: --model")
    {"pack": _pack, "model": _unpack, "openvino": _openvino, "hub": _push}.get(form, _set)(options)


def _pack(options: ExportOptions) -> None:
    from calmix.deploy.pack import pack

    assert options.output is not None
    with progress_bar() as bar:
        task = bar.add_task("packing", total=None)
        made = pack(
            Path(options.what), options.output, overwrite=options.overwrite,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    if options.as_json:
        print_json({"dense": made.dense, "packed": made.packed, "sparse": list(made.sparse)})
        return
    before, after = made.sparse
    sparse = f", {after / before:.3f} where weights are pruned" if before else ""
    line(f"{made.dense / 1e6:,.1f} MB of weights in {made.packed / 1e6:,.1f} MB "
         f"({made.packed / made.dense:.3f}{sparse}): {options.output}")  # fmt: skip


def _unpack(options: ExportOptions) -> None:
    from calmix.deploy.pack import unpack

    assert options.output is not None
    with progress_bar() as bar:
        task = bar.add_task("unpacking", total=None)
        dense = unpack(
            Path(options.what), options.output, overwrite=options.overwrite,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    if options.as_json:
        print_json({"output": str(options.output), "dense": dense})
    else:
        line(f"{dense / 1e6:,.1f} MB of weights: {options.output}")


def _openvino(options: ExportOptions) -> None:
    from calmix.deploy.openvino import STEPS, export

    assert options.output is not None
    with progress_bar() as bar:
        task = bar.add_task("export", total=len(STEPS))
        made = export(
            options.what, options.output, weights=options.weights,
            overwrite=options.overwrite, trust_remote_code=options.trust_remote_code,
            say=lambda step: bar.update(task, description=step, completed=STEPS.index(step)),
        )  # fmt: skip
    if options.as_json:
        print_json(asdict(made))
    else:
        line(f"{size(made.before)} of weights in {size(made.after)}, KL to the model "
             f"{made.kl:.2g} nats a token, same first choice {made.top1:.0%}: "
             f"{options.output}")  # fmt: skip


def _push(options: ExportOptions) -> None:
    from calmix.deploy.hub import CARD, push

    folder = Path(options.what)
    with progress_bar() as bar:
        task = bar.add_task("push", total=None)
        address = push(
            folder, str(options.repository), pack=options.pack, private=options.private,
            say=lambda told: bar.update(task, description=told),
        )  # fmt: skip
    if not (folder / CARD).is_file():
        note(f"{folder} has no {CARD}: pushed without a card (calmix report writes one)")
    print_json({"address": address}) if options.as_json else line(address)


def _set(options: ExportOptions) -> None:
    from calmix.calibration import CalibrationSet, open_tokenizer
    from calmix.calibration.dataset import export_datasets, export_jsonl
    from calmix.models import check_models

    folder, output, model = user_path(options.what), options.output, str(options.model)
    assert output is not None
    text = output.suffix.lower() == ".jsonl"
    CalibrationSet.open(folder)
    check = check_output_file if text else check_output_folder
    check(output, inputs=[folder, model], overwrite=options.overwrite)
    check_models(model, trust_remote_code=options.trust_remote_code)
    opened = open_tokenizer(model, trust_remote_code=options.trust_remote_code)
    made = CalibrationSet.open(folder, opened)
    if text:
        export_jsonl(made, opened.tokenizer, output)
    else:
        export_datasets(made, opened.tokenizer, output, overwrite=options.overwrite)
    if options.as_json:
        print_json({"output": str(output), "rows": made.rows, "length": made.length})
    else:
        line(f"{output}: {made.rows} rows of {made.length} tokens")
