"""`export`: models for other engines, calibration sets for other tools."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from calmix.cli.common import line, note, print_json
from calmix.cli.verbs import verb
from calmix.errors import InputError
from calmix.files import check_output_file, size_text, user_path
from calmix.options import TRUST, Options, option, path_option
from calmix.progress import Progress

Form = Literal["pack", "model", "gguf", "vllm", "jsonl", "imatrix"]
SETS = ("jsonl", "imatrix")
WARNED_KL = 0.1  # nats per token between file and model; from here a warning says what is lost


class ExportOptions(Options):
    what: str = option(
        ..., "A model, a pack or a saved calibration set.", argument=True, names="any"
    )
    to: Form | None = option(None, "Format to write.", shown="pack; jsonl for a set")
    output: Path = path_option(..., "Folder, .jsonl or .gguf file to write.")
    weights: Literal["f16", "q8_0", "q4_0", "q4_1"] | None = option(
        None, "GGUF: type of weights that are not in blocks.", shown="f16"
    )
    like: Path | None = option(None, "GGUF: an existing file of the same model.", metavar="FILE")
    model: str | None = option(None, "Set: model that it is for.", flag="--model -m")
    overwrite: bool = option(False, "Replace what calmix wrote there.")
    trust_remote_code: bool = TRUST


SET_OPTIONS = {"model", "trust_remote_code"}
OPTIONS_OF = {  # the options of each format, beside those of all
    "gguf": {"weights", "like"},
    "imatrix": SET_OPTIONS,
    "jsonl": SET_OPTIONS,
}


@verb("export")
def export(options: ExportOptions) -> None:
    """Write a model for another engine, a smaller pack, or a set for other tools."""
    from calmix.calibration.dataset import saved_set

    of_set = saved_set(options.what) is not None
    form: str = options.to or ("jsonl" if of_set else "pack")
    if of_set != (form in SETS):
        kind = "a" if of_set else "not a saved"
        raise InputError(f"{options.what} is {kind} calibration set: it has no export to {form}")
    of_all = {"what", "to", "output", "overwrite", "as_json"}
    if idle := options.model_fields_set - of_all - OPTIONS_OF.get(form, set()):
        flag = min(idle).replace("_", "-")
        raise InputError(f"--{flag} has no effect with --to {form}: leave it out")
    if of_set and options.model is None:
        raise InputError(f"{options.what} is a calibration set: name its model with --model")
    write = {"pack": _pack, "model": _pack, "gguf": _gguf, "vllm": _vllm}.get(form, _set)
    with Progress() as bar:
        value, text = write(options, form, bar)
    print_json(value)
    line(f"{text}: {options.output}")


Outcome = tuple[dict[str, Any], str]  # the result as JSON and as text


def _pack(options: ExportOptions, form: str, bar: Progress) -> Outcome:
    from calmix.deploy.pack import pack, unpack

    folders, overwrite = (Path(options.what), options.output), options.overwrite
    if form == "model":
        dense = unpack(*folders, overwrite=overwrite, progress=bar.of("unpacking"))
        text = f"{size_text(dense)} of weights"
        return {"output": str(options.output), "dense": dense}, text
    packed = pack(*folders, overwrite=overwrite, progress=bar.of("packing"))
    before, after = packed.levels
    levels = f", {after / before:.3f} where weights are quantised" if before else ""
    text = f"{size_text(packed.dense)} of weights in {size_text(packed.packed)} "
    return asdict(packed), text + f"({packed.packed / packed.dense:.3f}{levels})"


def _gguf(options: ExportOptions, form: str, bar: Progress) -> Outcome:
    from calmix.deploy import gguf

    facts = gguf.export(
        options.what,
        options.output,
        weights=options.weights or "f16",
        like=options.like,
        overwrite=options.overwrite,
        say=bar.each("export", 2),
    )
    if facts["kl"] > WARNED_KL:
        finer = "f16" if options.weights == "q8_0" else "q8_0"
        note(
            f"warning: at KL {facts['kl']:.2g} to the model a file can lose many answers: "
            "SmolLM2-135M at 4.5 bits kept 57 of 65, rounded to Q4_0 (KL 0.68) 35. Solve the "
            f"types instead: calmix compress MODEL --type Q4_K_M, or use --weights {finer}"
        )
    kinds = ", ".join(f"{count} {kind}" for kind, count in facts["types"].items())
    return facts, (
        f"{size_text(facts['before'])} of weights in {size_text(facts['after'])} ({kinds}; "
        f"{facts['solved']} as solved), KL to the model {facts['kl']:.2g} nats per token"
    )


def _vllm(options: ExportOptions, form: str, bar: Progress) -> Outcome:
    from calmix.deploy import compressed_tensors
    from calmix.models.opening import forget

    how: dict[str, Any] = {"overwrite": options.overwrite, "say": bar.each("export", 2)}
    facts = compressed_tensors.export(options.what, options.output, **how)
    forget(options.output)
    return facts, (
        f"{size_text(facts['before'])} of weights in a folder of {size_text(facts['bytes'])} "
        f"({facts['rate']:.2f} bits per weight, {facts['matrices']} matrices of {facts['bits']:g} "
        f"bits in groups of {facts['group']})"
    )


def _set(options: ExportOptions, form: str, bar: Progress) -> Outcome:
    from calmix.calibration.dataset import CalibrationSet, export_jsonl
    from calmix.calibration.tokenizer import open_tokenizer
    from calmix.deploy.gguf import export_imatrix
    from calmix.models.opening import check_models

    folder, model, output = user_path(options.what), str(options.model), options.output
    trust: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
    if form == "imatrix":
        count = export_imatrix(folder, model, output, overwrite=options.overwrite, **trust)
        return {"output": str(output), "matrices": count}, f"input importance of {count} matrices"
    CalibrationSet.open(folder)
    check_output_file(output, inputs=[folder, model], overwrite=options.overwrite)
    check_models(model, **trust)
    opened = open_tokenizer(model, **trust)
    rows = CalibrationSet.open(folder, opened)
    export_jsonl(rows, opened.tokenizer, output)
    result = {"output": str(output), "rows": rows.rows, "length": rows.length}
    return result, f"{rows.rows} rows of {rows.length} tokens"
