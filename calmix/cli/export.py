"""`export`: a model for another engine, a calibration set for other tools."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from calmix.cli.common import line, print_json, size
from calmix.cli.verbs import verb
from calmix.errors import InputError, nearest
from calmix.files import check_output_file, user_path
from calmix.options import Options, option, path_option
from calmix.progress import Progress

Form = Literal["pack", "model", "gguf", "openvino", "jsonl", "imatrix"]
SETS = ("jsonl", "imatrix")


class ExportOptions(Options):
    what: str = option(..., "A model, a pack or a saved calibration set.", argument=True)
    to: Form | None = option(None, "Form to write.", shown="pack; of a set jsonl")
    output: Path = path_option("Folder, .jsonl or .gguf file to write.")
    weights: Literal["int8", "own", "f16", "q8_0", "q4_0", "q4_1"] | None = option(
        None, "OpenVINO: int8 or own. GGUF: f16, q8_0, q4_0, q4_1.", shown="int8; of GGUF f16"
    )
    like: Path | None = option(None, "GGUF: a file of the same model.", metavar="FILE")
    model: str | None = option(None, "Set: the model it is for.", flag="--model -m")
    overwrite: bool = option(False, "Replace what calmix wrote there.")
    trust_remote_code: bool = option(
        False, "Run modelling code shipped with the model.", advanced=True
    )


PLACE, SET = {"output", "overwrite"}, {"output", "overwrite", "model", "trust_remote_code"}
FORMS = {  # which options a form has
    "pack": PLACE, "model": PLACE, "gguf": PLACE | {"weights", "like"}, "imatrix": SET,
    "openvino": PLACE | {"weights", "trust_remote_code"}, "jsonl": SET,
}  # fmt: skip


@verb("export")
def export(options: ExportOptions) -> None:
    """Write a model for another engine, a smaller pack, or a set for other tools."""
    from calmix.calibration import saved_set

    of_set = saved_set(options.what) is not None
    form: str = options.to or ("jsonl" if of_set else "pack")
    if of_set != (form in SETS):
        kind = "a calibration set" if of_set else "no saved calibration set"
        raise InputError(f"{options.what} is {kind}: it cannot be exported to {form}")
    if idle := options.given().keys() - FORMS[form] - {"what", "to", "as_json"}:
        flag = min(idle).replace("_", "-")
        raise InputError(f"--{flag} has no effect with --to {form}: leave it out")
    if of_set and options.model is None:
        raise InputError(f"{options.what} is a calibration set: name the model it is for: --model")
    act = {"pack": _pack, "model": _pack, "gguf": _engine, "openvino": _engine}.get(form, _set)
    with Progress() as bar:
        value, text = act(options, form, bar)
    print_json(value)
    line(f"{text}: {options.output}")


Made = tuple[dict[str, Any], str]  # the result as JSON, and in words


def _pack(options: ExportOptions, form: str, bar: Progress) -> Made:
    from calmix.deploy.pack import pack, unpack

    place, replace = (Path(options.what), options.output), options.overwrite
    if form == "model":
        dense = unpack(*place, overwrite=replace, progress=bar.of("unpacking"))
        text = f"{dense / 1e6:,.1f} MB of weights"
        return {"output": str(options.output), "dense": dense}, text
    made = pack(*place, overwrite=replace, progress=bar.of("packing"))
    before, after = made.sparse
    sparse = f", {after / before:.3f} where weights are pruned or quantised" if before else ""
    return (
        {"dense": made.dense, "packed": made.packed, "sparse": list(made.sparse)},
        f"{made.dense / 1e6:,.1f} MB of weights in {made.packed / 1e6:,.1f} MB "
        f"({made.packed / made.dense:.3f}{sparse})",
    )


def _engine(options: ExportOptions, form: str, bar: Progress) -> Made:
    """Write a model for an engine, by default with weights in the first form it knows."""
    from calmix.deploy import gguf, openvino

    known = gguf.TYPES if form == "gguf" else openvino.WEIGHTS
    asked: str = options.weights or next(iter(known))
    if asked not in known:
        raise InputError(f"--to {form} has no --weights {asked}: {nearest(asked, known)}")
    how: dict[str, Any] = {"weights": asked, "overwrite": options.overwrite}
    made: Any
    if form == "gguf":
        made = gguf.export(options.what, options.output, like=options.like,
                           say=bar.each("export", 2), **how)  # fmt: skip
        kinds = ", ".join(f"{count} {kind}" for kind, count in made.types.items())
        held, alike = f" ({kinds}; {made.ours} with the levels of calmix)", ""
    else:
        steps, trust = len(openvino.STEPS), options.trust_remote_code
        made = openvino.export(options.what, options.output, trust_remote_code=trust,
                               say=bar.each("export", steps), **how)  # fmt: skip
        held, alike = "", f", same first choice {made.top1:.0%}"
    return asdict(made), (f"{size(made.before)} of weights in {size(made.after)}{held}, KL to the "
                          f"model {made.kl:.2g} nats a token{alike}")  # fmt: skip


def _set(options: ExportOptions, form: str, bar: Progress) -> Made:
    from calmix.calibration import CalibrationSet, open_tokenizer
    from calmix.calibration.dataset import export_jsonl
    from calmix.deploy.gguf import export_imatrix
    from calmix.models import check_models

    folder, model, output = user_path(options.what), str(options.model), options.output
    trust: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
    if form == "imatrix":
        count = export_imatrix(folder, model, output, overwrite=options.overwrite, **trust)
        found = {"output": str(output), "matrices": count}
        return found, f"importance of the inputs of {count} matrices"
    CalibrationSet.open(folder)
    check_output_file(output, inputs=[folder, model], overwrite=options.overwrite)
    check_models(model, **trust)
    opened = open_tokenizer(model, **trust)
    made = CalibrationSet.open(folder, opened)
    export_jsonl(made, opened.tokenizer, output)
    found = {"output": str(output), "rows": made.rows, "length": made.length}
    return found, f"{made.rows} rows of {made.length} tokens"
