"""`export`: a model for another engine, a calibration set for other tools."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from calmix.cli.common import result, size
from calmix.cli.verbs import verb
from calmix.errors import InputError, nearest
from calmix.files import check_output_file, user_path
from calmix.options import Json, option, path_option
from calmix.progress import Progress

Form = Literal["pack", "model", "gguf", "openvino", "jsonl", "imatrix"]
SETS = ("jsonl", "imatrix")


class ExportOptions(Json):
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


@verb("export")
def export(options: ExportOptions) -> None:
    """Write a model for another engine, a smaller pack, or a set for other tools."""
    from calmix.calibration import saved_set

    of_set, output = saved_set(options.what) is not None, options.output
    form: str = options.to or ("jsonl" if of_set else "pack")
    if of_set != (form in SETS):
        kind = "a calibration set" if of_set else "no saved calibration set"
        raise InputError(f"{options.what} is {kind}: it cannot be exported to {form}")
    act, own = FORMS[form]
    if idle := options.given().keys() - own - {"what", "to", "as_json"}:
        flag = min(idle).replace("_", "-")
        raise InputError(f"--{flag} has no effect with --to {form}: leave it out")
    if of_set and options.model is None:
        raise InputError(f"{options.what} is a calibration set: name the model it is for: --model")
    with Progress() as bar:
        value, text = act(options, output, bar)
    result(options, value, f"{text}: {output}")


Made = tuple[dict[str, Any], str]  # the result as JSON, and in words


def _pack(options: ExportOptions, output: Path, bar: Progress) -> Made:
    from calmix.deploy.pack import pack

    made = pack(Path(options.what), output, overwrite=options.overwrite,
                progress=bar.of("packing"))  # fmt: skip
    before, after = made.sparse
    sparse = f", {after / before:.3f} where weights are pruned or quantised" if before else ""
    return (
        {"dense": made.dense, "packed": made.packed, "sparse": list(made.sparse)},
        f"{made.dense / 1e6:,.1f} MB of weights in {made.packed / 1e6:,.1f} MB "
        f"({made.packed / made.dense:.3f}{sparse})",
    )


def _unpack(options: ExportOptions, output: Path, bar: Progress) -> Made:
    from calmix.deploy.pack import unpack

    dense = unpack(Path(options.what), output, overwrite=options.overwrite,
                   progress=bar.of("unpacking"))  # fmt: skip
    return {"output": str(output), "dense": dense}, f"{dense / 1e6:,.1f} MB of weights"


def _weights(options: ExportOptions, known: Collection[str]) -> str:
    """Return how weights are stored: the first that a form knows, if none is asked for."""
    asked: str = options.weights or next(iter(known))
    if asked not in known:
        raise InputError(f"--to {options.to} has no --weights {asked}: {nearest(asked, known)}")
    return asked


def _gguf(options: ExportOptions, output: Path, bar: Progress) -> Made:
    from calmix.deploy.gguf import TYPES, export

    made = export(
        options.what, output, weights=_weights(options, TYPES), like=options.like,
        overwrite=options.overwrite, say=bar.each("export", 2),
    )  # fmt: skip
    kinds = ", ".join(f"{count} {kind}" for kind, count in made.types.items())
    return asdict(made), (
        f"{size(made.before)} of weights in {size(made.after)} ({kinds}; {made.ours} with the "
        f"levels of calmix), KL to the model {made.kl:.2g} nats a token"
    )


def _imatrix(options: ExportOptions, output: Path, bar: Progress) -> Made:
    from calmix.deploy.gguf import export_imatrix

    count = export_imatrix(
        user_path(options.what), str(options.model), output, overwrite=options.overwrite,
        trust_remote_code=options.trust_remote_code,
    )  # fmt: skip
    found = {"output": str(output), "matrices": count}
    return found, f"importance of the inputs of {count} matrices"


def _openvino(options: ExportOptions, output: Path, bar: Progress) -> Made:
    from calmix.deploy.openvino import STEPS, WEIGHTS
    from calmix.deploy.openvino import export as write

    made = write(
        options.what, output, weights=_weights(options, WEIGHTS), overwrite=options.overwrite,
        trust_remote_code=options.trust_remote_code, say=bar.each("export", len(STEPS)),
    )  # fmt: skip
    return asdict(made), (
        f"{size(made.before)} of weights in {size(made.after)}, KL to the model {made.kl:.2g} nats "
        f"a token, same first choice {made.top1:.0%}"
    )


def _jsonl(options: ExportOptions, output: Path, bar: Progress) -> Made:
    from calmix.calibration import CalibrationSet, open_tokenizer
    from calmix.calibration.dataset import export_jsonl
    from calmix.models import check_models

    folder, model = user_path(options.what), str(options.model)
    CalibrationSet.open(folder)
    check_output_file(output, inputs=[folder, model], overwrite=options.overwrite)
    check_models(model, trust_remote_code=options.trust_remote_code)
    opened = open_tokenizer(model, trust_remote_code=options.trust_remote_code)
    made = CalibrationSet.open(folder, opened)
    export_jsonl(made, opened.tokenizer, output)
    found = {"output": str(output), "rows": made.rows, "length": made.length}
    return found, f"{made.rows} rows of {made.length} tokens"


PLACE, SET = {"output", "overwrite"}, {"output", "overwrite", "model", "trust_remote_code"}
FORMS = {  # who writes a form, and which options it has
    "pack": (_pack, PLACE), "model": (_unpack, PLACE),
    "gguf": (_gguf, PLACE | {"weights", "like"}), "imatrix": (_imatrix, SET),
    "openvino": (_openvino, PLACE | {"weights", "trust_remote_code"}),
    "jsonl": (_jsonl, SET),
}  # fmt: skip
