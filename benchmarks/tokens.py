"""What the tokens of a calibration set should count: KL to the dense model by method and weight.

    python benchmarks/tokens.py [--model builtin:smollm2-135m] [--ways sparsegpt:0.5 ...]
        [--tokens raw unit ...] [--rows 32]

Every solver minimises a sum over tokens of the squared error of a layer's output. Weights:

    raw         every token as it is: those of large norm rule the sum
    root        divided by the square root of its input's norm
    unit        divided by its norm
    fisher      times the root of what an error at the token costs (`token_weights`; GuidedQuant,
                arXiv 2505.07004, one group per layer)
    half        times the fourth root, the engine's own weights

The model is a twin (twins.py). A way is a method and its target, such as `gptq,group=128:3 bits` or
`ggml,damping=0.1:Q3_K`. Printed is KL(dense || compressed) in nats per token on four texts of the
data folder that no source reads, and the mean of the layers' errors, in the weights of the run.
With `--targets own dense` layers approximate their own outputs, then also the dense model's.
`--answers` also counts right answers on the suite `abilities`, which runs programs.
"""

from __future__ import annotations

import argparse
import os
from itertools import product
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from common import commit, machine
from gguf_types import cells, held_out
from keep_more import MIX, spent
from torch import Tensor
from twins import make_twin

from calmix.calibration.request import calibration_set
from calmix.evaluation.behaviour import behaviour
from calmix.evaluation.distance import distance, reference
from calmix.evaluation.evaluate import evaluate
from calmix.evaluation.scores import CapabilityScores
from calmix.models.blocks import find_blocks
from calmix.models.opening import OpenModel, open_model
from calmix.pruning.engine import Run, costs_in_memory, run_through
from calmix.pruning.methods import Look, get_method
from calmix.pruning.patterns import as_pattern
from calmix.pruning.solvers.ggml_scales import fitting
from calmix.pruning.solvers.libggml import quantise
from calmix.pruning.token_weights import Weighting, weighting

TOKENS = ("raw", "root", "unit", "fisher", "half")


def unit(power: float) -> Weighting:
    """Return a weighting that divides tokens by a power of the norm of their inputs."""

    def weigh(outputs: Any, rows: slice, inputs: Tensor) -> Tensor:
        size = inputs.float().norm(dim=-1, keepdim=True).clamp_min(1e-9)
        return (inputs.float() / size**power).to(inputs.dtype)

    return weigh


class OwnTargets(Run):
    """A run whose layers approximate their own outputs on the inputs that earlier layers leave."""

    has_dense_targets = False


def rounding(opened: OpenModel, name: str, weigh: Weighting | None) -> Run:
    """Return a run that rounds by llama.cpp's search, weighted by the sum of squares."""

    def seen(layers: list[Any], squares: Tensor) -> None:
        for layer in layers:
            weight = layer.view()
            kind = fitting(name, weight.shape[1]).name
            weight.copy_(quantise(weight, squares, name=kind).values())

    run = Run(opened.model, find_blocks(opened.model), Look(), seen=seen)
    run.weighting = weigh
    return run


def asked(opened: OpenModel, quick: bool) -> CapabilityScores:
    return evaluate(opened, "abilities", quick=quick, allow_code_execution=True, baselines=False)


def right_cells(dense: CapabilityScores, scores: CapabilityScores) -> str:
    """Return the cells of right answers: relative to the dense model's, by items and as the mean
    over abilities, lost, gained, and the share of identical answers."""
    result = behaviour((dense, scores))
    assert result.right is not None
    assert result.answers is not None
    counts, total = result.answers, result.right.of("total").value
    mean = "-" if total is None else f"{100 * total:.1f}"
    same = 100 * (counts.same or 0)
    return (
        f"{counts.pruned} of {counts.dense} | {mean} | {counts.lost} | {counts.gained} | "
        f"{same:.1f} | "
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--data")
    parser.add_argument("--ways", nargs="+", default=["sparsegpt:0.5"])
    parser.add_argument("--tokens", nargs="+", default=TOKENS, choices=TOKENS)
    parser.add_argument("--calibration", default=MIX)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--held-out", type=int, default=8, help="rows of each text")
    parser.add_argument("--held-out-length", type=int, default=512)
    parser.add_argument("--shrunk", action="store_true", help="shrink Gram matrices")
    parser.add_argument("--targets", nargs="+", default=["own"], choices=("own", "dense"))
    parser.add_argument("--answers", action="store_true", help="count right answers")
    parser.add_argument("--quick", action="store_true", help="of the quick slice alone")
    options = parser.parse_args()
    opened = open_model(options.model)
    make_twin(opened.model)
    ids = calibration_set(
        options.calibration, opened, rows=options.rows, length=options.length, leakage="off"
    ).ids
    texts = held_out(opened, options.data, options.held_out, options.held_out_length)
    dense = reference(opened, texts)
    answers = asked(opened, options.quick) if options.answers else None
    layers = find_blocks(opened.model).layers
    weights = [layer.view().clone() for layer in layers]
    weightings = {"raw": None, "root": unit(0.5), "unit": unit(1)}
    if not weightings.keys() >= {*options.tokens}:
        began = spent()
        costs = costs_in_memory(opened.model, find_blocks(opened.model), ids)
        weightings |= {"fisher": weighting(costs, power=1), "half": weighting(costs)}
        print(f"costs of errors: {spent() - began:.0f} s", flush=True)
    print(
        f"commit {commit()}, {machine()}; twin of {options.model}, {opened.model.dtype}, "
        f"{options.rows} rows of {options.length} tokens of {options.calibration}\n"
    )
    columns = ["way", "tokens", "targets", "KL", "interval", "top-1", *texts, "error", "bits"]
    columns += ["right", "by ability, %", "lost", "gained", "same, %"] if answers else []
    print(f"| {' | '.join([*columns, 'cpu s'])} |")
    print("|---|" + "---|" * len(columns), flush=True)
    for way in options.ways:
        name, _, target = way.partition(":")
        for kind, targets in product(options.tokens, options.targets):
            for layer, weight in zip(layers, weights, strict=True):
                layer.view().copy_(weight)
            began = spent()
            weigh = weightings[kind]
            if name == "matrix":
                run = rounding(opened, target, weigh)
            else:
                method, pattern = get_method(name).aim(
                    as_pattern(f"{target} blocks" if name.startswith("ggml") else target)
                )
                kind_of_run = Run if targets == "dense" else OwnTargets
                run = kind_of_run(opened.model, find_blocks(opened.model), method, pattern)
                run.weighting, run.robust = weigh, options.shrunk
            run_through(run, ids)
            seconds, result = spent() - began, distance(opened, dense)
            errors = [one.error for one in run.report.layers if one.error is not None]
            mean = sum(errors) / max(1, len(errors))
            bits = f"{run.report.bits:.3f}" if run.report.bits else ""
            row = f"| {way} | {kind} | {targets} | {cells(result)} | {mean:.4f} | {bits} | "
            row += right_cells(answers, asked(opened, options.quick)) if answers else ""
            print(f"{row}{seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
