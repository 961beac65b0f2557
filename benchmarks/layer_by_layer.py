"""ADMM beside SparseGPT on every layer's own Gram matrix: whether one of them loses more.

    python benchmarks/layer_by_layer.py [--model ...] [--calibration ...] [--rows 64]
        [--targets 0.6 2:4] [--method admm] [--against sparsegpt]

The model is pruned by `--method`; at every input the other solves the same layers on the same
Gram matrix, and both are measured alike: the share of output energy lost, in float32, without
damping, of the weights rounded to the model's type. Errors in two manifests cannot be held against
each other so: each prune has inputs of its own from the second layer on. Every pair goes to the
error stream as it is found; printed are means by kind of layer, and every layer where `--method` is
behind.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

from common import commit, machine
from keep_more import MIX
from torch import Tensor

import calmix
from calmix.pruning import prune
from calmix.pruning.gram import relative_error
from calmix.pruning.methods import Method, Solution, get_method
from calmix.pruning.patterns import Pattern, as_pattern

FOUND: list[tuple[float, float]] = []  # of every layer in the order of the engine: both errors


def lost(weight: Tensor, made: Tensor, gram: Tensor) -> float:
    """Return the share of a layer's output energy that is lost, in the model's type."""
    return float(relative_error(weight, made, gram))


def beside(method: Method, other: Method) -> Method:
    """Return a method that prunes as one does, and has another solve the same beside it."""
    kind: Any = type(method)

    class Beside(kind):  # type: ignore[misc]
        def solve(
            self, weights: Sequence[Tensor], statistic: Tensor | None, patterns: Sequence[Pattern]
        ) -> Solution:
            assert statistic is not None
            again = other.solve(weights, statistic.clone(), patterns).weights
            own: Solution = super().solve(weights, statistic, patterns)
            for weight, a, b in zip(weights, own.weights, again, strict=True):
                FOUND.append((lost(weight, a, statistic), lost(weight, b, statistic)))
                one, two = FOUND[-1]
                print(f"{one:.5f} {two:.5f}", tuple(weight.shape), file=sys.stderr, flush=True)
            return own

    return Beside(**method.options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--calibration", default=MIX)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--targets", nargs="+", default=["0.6"])
    parser.add_argument("--method", default="admm")
    parser.add_argument("--against", default="sparsegpt")
    options = parser.parse_args()
    print(machine(), f"commit {commit()}")
    for target in options.targets:
        pattern = as_pattern(target)
        opened = calmix.open_model(options.model)
        drawn = calmix.resolve(
            options.calibration, opened, rows=options.rows, length=options.length
        )
        FOUND.clear()
        began = time.perf_counter()
        method = beside(get_method(options.method), get_method(options.against))
        report = prune(opened.model, drawn.ids, method=method, pattern=pattern)
        names = [layer.name for layer in report.layers]
        kinds: dict[str, list[tuple[float, float]]] = {}
        for name, both in zip(names, FOUND, strict=True):
            kinds.setdefault(name.rsplit(".", 1)[-1], []).append(both)
        print(
            f"\n{options.model}, {target}, {options.rows} x {options.length}, "
            f"{time.perf_counter() - began:.0f} s"
        )
        print(f"{'':<12}{options.method:>10}{options.against:>12}   worst ratio   behind")
        for kind, found in [*kinds.items(), ("all", FOUND)]:
            one, other = (sum(pair[at] for pair in found) / len(found) for at in (0, 1))
            worst = max(a / b for a, b in found)
            print(
                f"{kind:<12}{one:10.4f}{other:12.4f}{worst:14.3f}"
                f"{sum(a > b for a, b in found):6} of {len(found)}"
            )
        for name, (a, b) in zip(names, FOUND, strict=True):
            if a > b:
                print(f"  {name}: {a:.5f}, {options.against} {b:.5f}")


if __name__ == "__main__":
    main()
