"""Predict how well calibration sets work without pruning the model.

Each text runs through the dense model once, and the Gram matrices of the inputs of every k-th block
are stored in a file. Gram matrices add up: that of a mix is the weighted sum of its sources'. The
layers of these blocks are pruned with it, and the fraction of output energy they lose on another
text follows from that text's Gram matrix. Each further mix of known sources then takes seconds and
no forward pass.

This is ours, and an approximation: every layer is pruned on inputs from dense layers, not from
pruned ones as in a pruning run, and the other blocks are ignored. `benchmarks/predict.py` measures
how well the predicted ranking agrees with the measured one.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from torch import Tensor

from calmix.analysis.ranking import check_weights
from calmix.calibration import ask, resolve, saved_set
from calmix.calibration.texts import texts
from calmix.errors import InputError, ModelError
from calmix.files import cache_dir, check_free, sha256_json
from calmix.models import OpenModel, Prunable, find_blocks
from calmix.models.shards import read_header, read_tensor, write_file
from calmix.options import METHOD
from calmix.precision import dtype_name
from calmix.pruning.engine import Run, check_pattern, run_through
from calmix.pruning.gram import Gram, Squares, output_energy
from calmix.pruning.methods import Look, Method, get_method
from calmix.pruning.patterns import Pattern, as_pattern
from calmix.sources import Source, own_sources

ROWS, LENGTH, EVERY = 16, 512, 7
LEAST = 1e-12  # smaller fractions of output energy are rounding
Part = tuple[float, tuple[str, dict[str, Any]]]  # of a set: its weight, and a text with options


@dataclass(frozen=True)
class Prediction:
    """Predicted loss of pruning with a calibration set: `lost` is the fraction of output energy on
    each dimension's text (geometric mean over layers), `total` the weighted mean of these."""

    calibration: str
    total: float
    lost: dict[str, float]


def every_block(opened: OpenModel, every: int) -> list[str]:
    """Return patterns for the layers of every k-th block, starting with the first."""
    blocks = find_blocks(opened.model)
    if any(blocks.mixtures(index) for index in range(len(blocks))):
        raise ModelError(f"{opened.name} has experts, which predictions do not support yet")
    return [f"{blocks.name}.{at}.*" for at in range(0, len(blocks), every)]


def keep_grams(opened: OpenModel, ids: Tensor, only: Sequence[str], folder: Path) -> Path:
    """Run ids, int64 (rows, length), through the dense model and store Gram matrices of its layers'
    inputs, unless a file for the same model, ids and layers exists.

    The safetensors file holds the mean of x x^T over tokens, float32 (columns, columns), under the
    comma-separated names of the layers that read x.
    """
    about = {
        "model": opened.fingerprint, "dtype": dtype_name(opened.model.dtype),
        "ids": sha256_json(ids.tolist()), "layers": list(only),
    }  # fmt: skip
    path = folder / f"{sha256_json(about)}.safetensors"
    with contextlib.suppress(ModelError, OSError):  # missing or damaged
        read_header(path)
        return path
    grams: dict[str, Tensor] = {}

    def seen(layers: list[Prunable], gram: Tensor) -> None:
        grams[",".join(layer.name for layer in layers)] = gram / ids.numel()

    blocks = find_blocks(opened.model).select(only)
    run_through(Run(opened.model, blocks, Look(gram=True), seen=seen), ids)
    write_file(path, grams)
    return path


def lost_output(
    opened: OpenModel,
    only: Sequence[str],
    sets: Mapping[str, Mapping[Path, float]],
    held_out: Mapping[str, Path],
    method: Method,
    pattern: Pattern,
    *,
    tokens: int = ROWS * LENGTH,
    tick: Callable[[str], None] = lambda inputs: None,
) -> dict[str, dict[str, float]]:
    """Prune layers using Gram matrices only. Returns, by set and text, the fraction of output
    energy lost, as the geometric mean over layers.

    `sets` maps each set to files of `keep_grams` with their weights, `held_out` each text to its
    file; `only` is as for `keep_grams`. `tokens` is the size of a set, for methods that depend on
    the sum of x x^T rather than its mean. `tick` is called with the names of the layers just done.
    """
    layers = {layer.name: layer for layer in find_blocks(opened.model).select(only).layers}
    files = {*held_out.values(), *(file for parts in sets.values() for file in parts)}
    headers = {file: read_header(file) for file in files}
    shares: dict[tuple[str, str], list[float]] = {}
    for inputs in headers[next(iter(held_out.values()))]:
        weights = [layers[name].view().float() for name in inputs.split(",")]
        grams = {file: read_tensor(header[inputs]).to(weights[0].device)
                 for file, header in headers.items()}  # fmt: skip
        for name, parts in sets.items():
            gram = sum(tokens * share * grams[file] for file, share in parts.items())
            assert isinstance(gram, Tensor)
            statistic = gram if method.needs is Gram else gram.diagonal()
            made = method.solve(weights, statistic, [pattern] * len(weights)).weights
            for text, file in held_out.items():
                for weight, kept in zip(weights, made, strict=True):
                    whole = float(output_energy(weight, grams[file]))
                    lost = float(output_energy(weight - kept, grams[file])) / (whole or 1)
                    shares.setdefault((name, text), []).append(max(lost, LEAST))
        tick(inputs)
    return {name: {text: geometric_mean(shares[name, text]) for text in held_out} for name in sets}


def predict(
    opened: OpenModel,
    calibrations: Sequence[str],
    *,
    method: str | Method = METHOD,
    pattern: Pattern | str | float | None = None,
    rows: int = ROWS,
    length: int = LENGTH,
    every: int = EVERY,
    weights: Mapping[str, float] | None = None,
    held_out: Mapping[str, Tensor] | None = None,
    sources: Mapping[str, Source] | Path | None = None,
    tick: Callable[[str], None] = lambda what: None,
    note: Callable[[str], None] | None = None,
    writing: Callable[[str, int, int], None] | None = None,
    **draw: Any,
) -> list[Prediction]:
    """Rank calibration sets by their predicted loss, lowest first, without pruning the model.

    Args:
        opened: the dense model; it is left unchanged.
        calibrations: sets as for `calmix.resolve`. Each source of a mix is sampled and run once,
            however many mixes contain it.
        method, pattern: how the model is to be pruned; 60 % by default.
        rows, length: size of each source's sample.
        every: use every k-th block.
        weights: of the dimensions in the total; equal by default.
        held_out: texts by dimension (`calmix.calibration.texts`); 16 x 512 tokens of the builtin
            ones by default.
        sources: the user's own sources, by name or as a YAML file.
        tick: called with a description of each finished step.
        note: called with the size of the Gram matrices.
        writing, **draw: as for `calmix.resolve`.

    Raises:
        CalmixError: any error that a user can fix.
    """
    draw = {"rows": rows, "length": length, "sources": own_sources(sources), **draw}
    made = check_request(calibrations, method, every=every, **draw)
    chosen, pattern = get_method(method), as_pattern(0.6 if pattern is None else pattern)
    only = every_block(opened, every)
    blocks = find_blocks(opened.model).select(only)
    check_pattern(blocks, pattern, chosen)
    held_out = texts(opened, rows=ROWS, length=LENGTH) if held_out is None else held_out
    share = check_weights(weights or dict.fromkeys(held_out, 1.0), tuple(held_out),
                          "the held-out text")  # fmt: skip
    samples = {repr(sample): sample for parts in made.values() for _, sample in parts}
    folder = cache_dir() / "grams"
    # An upper bound: one matrix for each layer, though layers may share their input.
    room = (len(samples) + len(held_out)) * sum(4 * one.shape[1] ** 2 for one in blocks.layers)
    check_free(folder / "grams", room, "Gram matrices take up to")
    if note is not None:
        note(f"Gram matrices take up to {room / 1e9:.2g} GB in {folder}")
    files, kept = {}, {}
    for key, (part, options) in samples.items():
        ids = resolve(part, opened, writing=writing, **options).ids[:rows]
        files[key] = keep_grams(opened, ids, only, folder)
        tick(f"ran {part}")
    for name, ids in held_out.items():
        kept[name] = keep_grams(opened, ids, only, folder)
        tick(f"ran the text {name}")
    sets = {text: {files[repr(sample)]: weight for weight, sample in parts}
            for text, parts in made.items()}  # fmt: skip
    lost = lost_output(opened, only, sets, kept, chosen, pattern, tokens=rows * length,
                       tick=lambda inputs: tick(f"solved {inputs.partition(',')[0]}"))  # fmt: skip
    return sorted((prediction(text, lost[text], share) for text in calibrations),
                  key=lambda one: one.total)  # fmt: skip


def prediction(name: str, lost: dict[str, float], share: Mapping[str, float]) -> Prediction:
    """Combine the losses on the dimensions' texts by their weights."""
    total = math.fsum(share[text] * math.log(value) for text, value in lost.items())
    return Prediction(name, math.exp(total), lost)


def check_request(
    calibrations: Sequence[str], method: str | Method, *, every: int = EVERY, **draw: Any
) -> dict[str, list[Part]]:
    """Check a request to `predict` without the model; return the parts of each set."""
    if every < 1:
        raise InputError(f"--every must be at least 1, not {every}")
    chosen = get_method(method)
    if chosen.needs is None:
        raise InputError(f"method {chosen.name} uses no calibration text: all sets are equal")
    if chosen.needs not in (Gram, Squares):
        raise InputError(f"method {chosen.name} cannot be predicted: it uses no Gram matrix")
    return {text: _parts(text, draw) for text in calibrations}


def _parts(text: str, draw: Mapping[str, Any]) -> list[Part]:
    """Split a set into the texts that are run separately."""
    given = {} if saved_set(text) else {k: v for k, v in draw.items() if v is not None}
    asked = ask(text, **given)
    if len(asked.mix) < 2:  # none if the set is saved or generated
        return [(1.0, (text, given))]
    options = {**asked.draw.drawn(), "sources": asked.own}
    own = {"self-written": "self-written,chat=0"}  # in a mix chats have their own share
    return [(weight, (own.get(name, name), options)) for name, weight in asked.mix.items()]
