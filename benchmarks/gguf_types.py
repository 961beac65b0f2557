"""GGML's types by llama.cpp's rounding and by calmix, at the same bytes: KL to the dense model.

    python benchmarks/gguf_types.py [--model builtin:smollm2-135m] [--types IQ4_NL Q4_0]
        [--ways ...] [--rows 32] [--every 4] [--blocks 3 13 --held-out 16 --outputs 512]
        [--files Q3_K_M ...]

The model is a twin (twins.py): the file it came from leaves no grid. Every matrix of the blocks
gets the type, or the one that fits its rows, with `--every 4` in every fourth block; embeddings
and head stay dense. Ways:

    plain       llama.cpp's rounding without an importance matrix
    ones        the same with a flat one, which changes its search
    matrix      the same with that of the calibration set
    gptq        feedback alone: damping 0.01, scales by a flat search on corrected weights
    both-0.01   feedback, scales weighted by 1 / U_jj^2, damping 0.01
    both        the same with damping 0.1; both-1: 1
    sweep       as both, with a sweep
    default     `ggml` as calmix has it
    diagonal    as both, with scales weighted by the sum of squares

Printed is KL(dense || quantised) in nats per token on four texts of the data folder that no source
reads, with a 95 % interval over rows, and the processor's seconds. With `--blocks` nothing is run
through the quantised model: printed is the share of each matrix's output energy lost on rows that
were not fitted, all on inputs of the dense model. With `--files`, embeddings and head get a type
too: those of llama.cpp's recipe, those of least measured loss in the same bytes, and one type that
takes about as many, all solved by the method. Needs libggml-python.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from common import commit, data_file, machine
from keep_more import MIX, spent
from torch import Tensor
from twins import make_twin

from calmix.calibration.request import calibration_set
from calmix.evaluation.distance import distance, reference
from calmix.models.blocks import Prunable, find_blocks
from calmix.models.opening import OpenModel, open_model
from calmix.pruning.allocation import LossPass, file_bytes, file_weights
from calmix.pruning.engine import Run, prune, run_through
from calmix.pruning.gram import Factor, Gram, relative_error
from calmix.pruning.methods import Look
from calmix.pruning.methods.ggml import Ggml
from calmix.pruning.patterns import Blocks, Mixed, Recipe
from calmix.pruning.solvers.ggml_scales import fitting
from calmix.pruning.solvers.ggml_types import TYPES
from calmix.pruning.solvers.libggml import quantise

TEXTS = {  # of the data folder, and the field that holds the text
    "general": ("general/wikitext2_raw-test.jsonl", "text"),
    "web": ("general/c4-train.jsonl", "text"),
    "code": ("code/thealgorithms_python-train.jsonl", "text"),
    "math": ("math/gsm8k-train.jsonl", "answer"),
}


class Flat(Ggml):
    """Feedback with scales that weigh all columns alike."""

    def importance(self, gram: Tensor, factor: Factor) -> Tensor:
        return torch.ones_like(factor.upper.diagonal())


class Diagonal(Ggml):
    """Feedback with scales weighted by the sum of squares of each input."""

    def importance(self, gram: Tensor, factor: Factor) -> Tensor:
        return gram.diagonal().clone()


ROUNDED: dict[str, Callable[[Tensor], Tensor | None]] = {
    "plain": lambda squares: None,
    "ones": torch.ones_like,
    "matrix": lambda squares: squares,
}
SOLVED = {
    "gptq": Flat(damping=0.01, sweeps=0),
    "both-0.01": Ggml(damping=0.01, sweeps=0),
    "both": Ggml(damping=0.1, sweeps=0),
    "both-1": Ggml(damping=1, sweeps=0),
    "diagonal": Diagonal(damping=0.1, sweeps=0),
    "sweep": Ggml(damping=0.1),
    "default": Ggml(),
}
WAYS = (*ROUNDED, *SOLVED)


class LookAtGrams(Look):
    """Gathers Gram matrices in place of square sums."""

    statistic = Gram


def statistics(
    opened: OpenModel, ids: Tensor, *, gram: bool, only: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Return the sum of squares, or the Gram matrix, of the inputs of every matrix."""
    sums: dict[str, Tensor] = {}

    def seen(layers: list[Prunable], statistic: Tensor) -> None:
        sums.update(dict.fromkeys((layer.name for layer in layers), statistic))

    layers = find_blocks(opened.model).select(only)
    run_through(Run(opened.model, layers, LookAtGrams() if gram else Look(), seen=seen), ids)
    return sums


def held_out(opened: OpenModel, folder: str | None, rows: int, length: int) -> dict[str, Tensor]:
    """Return token ids (rows, length) of each text."""
    texts = {}
    for name, (file, field) in TEXTS.items():
        lines = data_file(folder, file).read_text(encoding="utf-8").splitlines()
        text = "\n\n".join(json.loads(line)[field] for line in lines[: 30 * rows])
        ids = opened.tokenizer(text, verbose=False)["input_ids"]
        texts[name] = torch.tensor(ids[: rows * length]).view(rows, length)
    return texts


def cells(result: dict[str, Any]) -> str:
    """Return the cells of a distance: KL, its interval, top-1, and KL by text."""
    total, parts = result["total"], result["dimensions"].values()
    kls = " | ".join(f"{part['kl_mean']:.4f}" for part in parts)
    return (
        f"{total['kl_mean']:.4f} | {total['kl_low']:.4f} to {total['kl_high']:.4f} | "
        f"{total['top1']:.3f} | {kls}"
    )


def apply(
    way: str, name: str, model: Any, ids: Tensor, squares: dict[str, Tensor], only: Sequence[str]
) -> None:
    """Quantise the matrices of a model's blocks, in place."""
    if way in SOLVED:
        how: Any = "robust" if way == "default" else "plain"
        prune(model, ids, method=SOLVED[way], pattern=Blocks(name), statistics=how, only=only)
        return
    for layer in find_blocks(model).select(only).layers:
        weight = layer.view()
        importance = ROUNDED[way](squares[layer.name])
        kind = fitting(name, weight.shape[1]).name
        weight.copy_(quantise(weight, importance, name=kind).values())


def by_model(options: argparse.Namespace, opened: OpenModel, ids: Tensor) -> None:
    """Print a row for each type and way: the distance on held-out text."""
    texts = held_out(opened, options.data, options.held_out, options.length)
    dense = reference(opened, texts)
    blocks = find_blocks(opened.model)
    only = [f"*.{index}.*" for index in range(options.every // 2, len(blocks), options.every)]
    layers = blocks.select(only).layers
    weights = [layer.view().clone() for layer in layers]
    squares = statistics(opened, ids, gram=False) if {*options.ways} & {*ROUNDED} else {}
    print(f"| type | way | KL | interval | top-1 | {' | '.join(texts)} | cpu s |")
    print("|---|---|---|---|---|" + "---|" * (len(texts) + 1), flush=True)
    for name in options.types:
        for way in options.ways:
            for layer, weight in zip(layers, weights, strict=True):
                layer.view().copy_(weight)
            began = spent()
            apply(way, name, opened.model, ids, squares, only)
            seconds, result = spent() - began, distance(opened, dense)
            print(f"| {name} | {way} | {cells(result)} | {seconds:.0f} |", flush=True)


def by_file(options: argparse.Namespace, opened: OpenModel, ids: Tensor) -> None:
    """Print a row for each recipe and for other types in its bytes: the distance on held-out text.

    Types of least loss are those of `calmix prune --method ggml,bits=...`.
    """
    model, dense = opened.model, open_model(options.model)
    make_twin(dense.model)
    known = reference(dense, held_out(opened, options.data, options.held_out, options.length))
    blocks = find_blocks(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run_through(losses := LossPass(model, blocks), ids)
    print("| file | bits a weight | MB | KL | interval | top-1 |\n|---|---|---|---|---|---|")
    for name in options.files:
        recipe = Recipe(name).types(model, blocks)
        size = file_bytes(model, recipe)
        bits = 8 * size / file_weights(model)
        each = {kind: file_bytes(model, dict.fromkeys(recipe, Blocks(kind))) for kind in TYPES}
        one = min(each, key=lambda kind: abs(each[kind] - size))
        ways = {name: recipe, "by loss": losses.patterns(Mixed(bits))}
        ways[f"all {one}"] = dict.fromkeys(recipe, Blocks(one))
        for way, types in ways.items():
            model.load_state_dict(before)
            prune(model, ids, method="ggml", pattern=types)
            size = file_bytes(model, types)
            total = distance(opened, known, dense=lambda: dense)["total"]
            print(
                f"| {way} | {8 * size / file_weights(model):.3f} | {size / 1e6:.1f} | "
                f"{total['kl_mean']:.4f} | {total['kl_low']:.4f} to {total['kl_high']:.4f} | "
                f"{total['top1']:.3f} |",
                flush=True,
            )


def by_matrix(options: argparse.Namespace, opened: OpenModel, ids: Tensor) -> None:
    """Print a row for each matrix and type: the error on rows that were not fitted, by way."""
    blocks = opened.model.get_decoder().layers
    del blocks[max(options.blocks) + 1 :]
    wanted = [f"*.{block}.*" for block in options.blocks]
    own = torch.arange(len(ids)) % (len(ids) // options.held_out) != 0  # some of every source
    fitted, other = (
        statistics(opened, part, gram=True, only=wanted) for part in (ids[own], ids[~own])
    )
    print(f"| matrix | inputs | type | {' | '.join(options.ways)} |")
    print("|---|---|---|" + "---|" * len(options.ways), flush=True)
    for layer in find_blocks(opened.model).select(wanted).layers:
        gram, weight = fitted[layer.name], layer.view()
        weight = weight[:: max(1, len(weight) // options.outputs)][: options.outputs]
        for name in options.types:
            kind, errors = fitting(name, weight.shape[1]), []
            for way in options.ways:
                if way in ROUNDED:
                    importance = ROUNDED[way](gram.diagonal())
                    after = quantise(weight, importance, name=kind.name).values()
                else:
                    [after] = SOLVED[way].solve([weight], gram, [Blocks(kind.name)]).weights
                errors.append(relative_error(weight, after, other[layer.name]))
            row = " | ".join(f"{error:.5f}" for error in errors)
            print(f"| {layer.name} | {weight.shape[1]} | {kind.name} | {row} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--data")
    parser.add_argument("--types", nargs="+", default=["IQ4_NL", "Q4_0", "Q5_0"])
    parser.add_argument("--files", nargs="+", help="recipes of llama.cpp, such as Q3_K_M")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--calibration", default=MIX)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--held-out", type=int, default=8, help="rows of each text, or of the set")
    parser.add_argument("--outputs", type=int, default=2**20, help="rows of a matrix, at most")
    parser.add_argument("--every", type=int, default=1, help="blocks of which one is quantised")
    parser.add_argument("--blocks", type=int, nargs="+", help="of which to print every matrix")
    options = parser.parse_args()
    opened = open_model(options.model)
    make_twin(opened.model)
    rows = options.rows + (options.held_out if options.blocks else 0)
    drawn = calibration_set(
        options.calibration, opened, rows=rows, length=options.length, leakage="off"
    )
    print(
        f"commit {commit()}, {machine()}; twin of {options.model}, {opened.model.dtype}, "
        f"{options.rows} rows of {options.length} tokens of {options.calibration}\n"
    )
    way = by_file if options.files else by_matrix if options.blocks else by_model
    way(options, opened, drawn.ids)


if __name__ == "__main__":
    main()
