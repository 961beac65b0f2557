"""How much to shrink a Gram matrix: output energy lost on other rows, by damping.

    python benchmarks/shrinkage.py [--model builtin:qwen2.5-coder-0.5b] [--blocks 3 12]
        [--rows 16 32 64] [--ways sparsegpt:0.5 "gptq:3 bits"] [--dampings 0.01 0.1]

Matrices of the named blocks are solved on some rows of a mix, with the dense model's inputs, and
judged on 64 other rows: without correction (Wanda's mask, plain rounding), with each damping, and
with the method's own damping and the share of `Gram.shrinkage`, as the engine does. The last column
is that share. The model is a twin (twins.py).
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from contextlib import suppress
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from common import commit, machine
from keep_more import MIX
from torch import Tensor
from twins import make_twin

from calmix.calibration.request import calibration_set
from calmix.models.opening import open_model
from calmix.pruning.gram import Gram, raised_diagonal, relative_error
from calmix.pruning.held_out import uncorrected
from calmix.pruning.methods import get_method
from calmix.pruning.patterns import as_pattern

DAMPINGS = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0)
LAYERS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
WAYS = ("sparsegpt:0.5", "gptq:3 bits")
OTHER = 64  # rows that judge


@torch.inference_mode()
def inputs_of(
    model: Any, ids: Tensor, blocks: list[int], names: list[str]
) -> dict[tuple[int, str], Tensor]:
    """Return the inputs of the layers, (rows, length, columns), by block and name."""
    stored: dict[tuple[int, str], list[Tensor]] = defaultdict(list)
    layers = model.get_decoder().layers

    def see(module: Any, args: Any, key: tuple[int, str]) -> None:
        stored[key].append(args[0].bfloat16())

    def stop(*_: Any) -> None:
        raise StopIteration

    for block in blocks:
        for name in names:
            layers[block].get_submodule(name).register_forward_pre_hook(
                lambda module, args, key=(block, name): see(module, args, key)
            )
    if max(blocks) + 1 < len(layers):
        layers[max(blocks) + 1].register_forward_pre_hook(stop)
    for part in ids.split(4):
        with suppress(StopIteration):
            model.get_decoder()(input_ids=part, use_cache=False)
    return {key: torch.cat(parts) for key, parts in stored.items()}


def gram_of(inputs: Tensor) -> Gram:
    gram = Gram(inputs.shape[-1], inputs.device)
    gram.add(inputs)
    gram.matrix()
    return gram


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin:qwen2.5-coder-0.5b")
    parser.add_argument("--blocks", type=int, nargs="+", default=[3, 12])
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--calibration", default=MIX)
    parser.add_argument("--ways", nargs="+", default=WAYS)
    parser.add_argument("--dampings", type=float, nargs="*", default=DAMPINGS)
    parser.add_argument("--layers", nargs="+", default=LAYERS)
    options = parser.parse_args()
    opened = open_model(options.model)
    make_twin(opened.model)
    drawn = calibration_set(
        options.calibration,
        opened,
        rows=max(options.rows) + OTHER,
        length=options.length,
        leakage="off",
    )
    inputs = inputs_of(opened.model, drawn.ids, options.blocks, options.layers)
    print(
        f"commit {commit()}, {machine()}; twin of {options.model}, "
        f"rows of {options.length} tokens\n"
    )
    dampings = " | ".join(map(str, options.dampings))
    print(f"| matrix | inputs | rows | method | uncorrected | {dampings} | shrunk | estimate |")
    print("|---|---|---|---|---|" + "---|" * (len(options.dampings) + 2), flush=True)
    for (block, name), seen in inputs.items():
        weight = opened.model.get_decoder().layers[block].get_submodule(name).weight.detach()
        other = gram_of(seen[max(options.rows) :]).sum
        for rows in options.rows:
            gram = gram_of(seen[:rows])
            share = gram.shrinkage()
            for way in options.ways:
                kind, _, target = way.partition(":")
                method, pattern = get_method(kind).aim(as_pattern(target))
                solved = [uncorrected(method, [weight], gram.sum.diagonal(), [pattern])]
                for damping in options.dampings:
                    damped = method.model_copy(update={"damping": damping})
                    solved.append(damped.solve([weight], gram.sum, [pattern]))
                with raised_diagonal(gram.sum, share):
                    solved.append(method.solve([weight], gram.sum, [pattern]))
                errors = [
                    f"{100 * relative_error(weight, one.weights[0], other):.2f}"
                    for one in solved
                    if one is not None
                ]
                print(
                    f"| block {block}, `{name.split('.')[1]}` | {weight.shape[1]} | {rows} | {way} "
                    f"| {' | '.join(errors)} | {share:.3f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
