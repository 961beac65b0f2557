"""What a set keeps, predicted without pruning a model: the output a few layers would lose.

A text runs through the dense model once, and the Gram matrices of the inputs of every k-th block
are kept in a file. They add: that of a mix is the sum of its sources', each times its share. The
layers of these blocks are pruned on it, and the share of output energy they lose on another text
is read off that text's Gram matrix. So each further mix of known sources takes seconds and no
forward pass.

Ours, and an approximation: every layer is pruned on inputs from dense layers, where a pruning
run's come from pruned ones, and the layers between are not looked at. How well it orders sets is
measured by `benchmarks/predict.py`.
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
from calmix.pruning.engine import Looking, check_pattern, run_through
from calmix.pruning.gram import Gram, Squares, output_energy
from calmix.pruning.methods import Method, get_method
from calmix.pruning.patterns import Pattern, as_pattern
from calmix.sources import Source, own_sources

ROWS, LENGTH, EVERY = 16, 512, 7
LEAST = 1e-12  # a share of output energy below this is rounding


@dataclass(frozen=True)
class Prediction:
    """What pruning on a set is expected to lose: `lost` is the share of output energy on each
    dimension's text, the geometric mean over layers; `total`, the weighted one over dimensions."""

    calibration: str
    total: float
    lost: dict[str, float]


def every_block(opened: OpenModel, every: int) -> list[str]:
    """Return patterns of the layers of every k-th block, the first one included."""
    found = find_blocks(opened.model)
    if any(found.mixtures(index) for index in range(len(found))):
        raise ModelError(f"{opened.name} has experts, for which nothing is predicted yet")
    return [f"{found.name}.{at}.*" for at in range(0, len(found), every)]


def keep_grams(opened: OpenModel, ids: Tensor, only: Sequence[str], folder: Path) -> Path:
    """Run ids, int64 (rows, length), through the dense model once, and keep Gram matrices of its
    layers' inputs; a whole file of the same model, ids and layers is not made again.

    The safetensors file holds the mean x x^T over tokens, float32 (columns, columns), by the names
    of the layers that read x, comma-separated.
    """
    about = {
        "model": opened.fingerprint, "dtype": dtype_name(opened.model.dtype),
        "ids": sha256_json(ids.tolist()), "layers": list(only),
    }  # fmt: skip
    path = folder / f"{sha256_json(about)}.safetensors"
    with contextlib.suppress(ModelError, OSError):  # none there, or damaged
        read_header(path)
        return path
    grams: dict[str, Tensor] = {}

    def seen(layers: list[Prunable], gram: Tensor) -> None:
        grams[",".join(layer.name for layer in layers)] = gram / ids.numel()

    blocks = find_blocks(opened.model).select(only)
    run_through(Looking(opened.model, blocks, seen, gram=True), ids)
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
    """Prune layers on Gram matrices alone, and return by set and text the share of output energy
    they would lose, the geometric mean over layers.

    `only` is as for `keep_grams`, which made the files: of sets with their shares, and of texts.
    `tokens` are of a set, for methods to which the sum and not the mean of x x^T matters; `tick` is
    called with the layers of each input that is done.
    """
    found = find_blocks(opened.model).select(only)
    layers = {layer.name: layer for layer in found.layers}
    files = {*held_out.values(), *(file for parts in sets.values() for file in parts)}
    headers = {file: read_header(file) for file in files}
    shares: dict[tuple[str, str], list[float]] = {}
    for inputs in headers[next(iter(held_out.values()))]:
        weights = [layers[name].view().float() for name in inputs.split(",")]
        grams = {file: read_tensor(file.parent, header[inputs]).to(weights[0].device)
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
    """Predict which calibration set keeps most, without pruning the model: the least lost first.

    Args:
        opened: the dense model; it ends as it was.
        calibrations: sets as `calmix.resolve` takes them. Of a mix each source is drawn and run by
            itself, once, whatever mixes it is in.
        method, pattern: how the model is to be pruned; at 60 % if no pattern is given.
        rows, length: of each source.
        every: look at every k-th block.
        weights: of the dimensions in the total; the same for all if not given.
        held_out: texts by dimension (`calmix.calibration.texts`); 16 x 512 of the builtin ones if
            not given.
        sources: the user's own, by name or as a YAML file.
        tick: called with what has been done.
        note: called with how much room the Gram matrices take.
        writing, **draw: as for `calmix.resolve`.

    Raises:
        CalmixError: anything a user can mend.
    """
    draw = {"rows": rows, "length": length, "sources": own_sources(sources), **draw}
    check_request(calibrations, method, every=every, **draw)
    chosen, pattern = get_method(method), as_pattern(0.6 if pattern is None else pattern)
    only = every_block(opened, every)
    blocks = find_blocks(opened.model).select(only)
    check_pattern(blocks, pattern, chosen)
    held_out = texts(opened, rows=ROWS, length=LENGTH) if held_out is None else held_out
    share = check_weights(weights or dict.fromkeys(held_out, 1.0), tuple(held_out),
                          "the held-out text")  # fmt: skip
    made = {text: _parts(text, draw) for text in calibrations}
    drawn = {repr(asked): asked for parts in made.values() for _, asked in parts}
    folder = cache_dir() / "grams"
    room = (len(drawn) + len(held_out)) * sum(4 * one.shape[1] ** 2 for one in blocks.layers)
    check_free(folder / "grams", room, "Gram matrices take up to")  # each of a layer of its own
    if note is not None:
        note(f"Gram matrices take {room / 1e9:.2g} GB at most in {folder}")
    files, kept = {}, {}
    for key, (part, options) in drawn.items():
        ids = resolve(part, opened, writing=writing, **options).ids[:rows]
        files[key] = keep_grams(opened, ids, only, folder)
        tick(f"ran {part}")
    for name, ids in held_out.items():
        kept[name] = keep_grams(opened, ids, only, folder)
        tick(f"ran the text {name}")
    sets = {text: {files[repr(asked)]: weight for weight, asked in parts}
            for text, parts in made.items()}  # fmt: skip
    lost = lost_output(opened, only, sets, kept, chosen, pattern, tokens=rows * length,
                       tick=lambda inputs: tick(f"solved {inputs.partition(',')[0]}"))  # fmt: skip
    return sorted((prediction(text, lost[text], share) for text in calibrations),
                  key=lambda one: one.total)  # fmt: skip


def prediction(name: str, lost: dict[str, float], share: Mapping[str, float]) -> Prediction:
    """Put what texts lose together, by the weights of their dimensions."""
    total = math.fsum(share[text] * math.log(value) for text, value in lost.items())
    return Prediction(name, math.exp(total), lost)


def check_request(
    calibrations: Sequence[str], method: str | Method, *, every: int = EVERY, **draw: Any
) -> None:
    """Check what `predict` is asked for, without the model."""
    if every < 1:
        raise InputError(f"--every {every} is not positive")
    chosen = get_method(method)
    if chosen.needs is None:
        raise InputError(f"method {chosen.name} looks at no text: every set keeps as much")
    if chosen.needs not in (Gram, Squares):
        raise InputError(f"method {chosen.name} cannot be predicted: it goes by no Gram matrix")
    for text in calibrations:
        ask(text, **({} if saved_set(text) else draw))


def _parts(text: str, asked: Mapping[str, Any]) -> list[tuple[float, tuple[str, dict[str, Any]]]]:
    """Return the shares of the texts a set is made of, which are run one by one, each with the
    options to draw it with."""
    if saved_set(text):
        return [(1.0, (text, {}))]
    given = {name: value for name, value in asked.items() if value is not None}
    found = ask(text, **given)
    if found.generate is not None or len(found.mix) == 1:
        return [(1.0, (text, given))]
    options = {**found.draw.drawn(), "sources": found.own}
    return [(weight, (name, options)) for name, weight in found.mix.items()]
