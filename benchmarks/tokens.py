"""What the tokens of a calibration set should count: KL to the dense model by method and weight.

    python benchmarks/tokens.py [--model builtin:smollm2-135m] [--ways sparsegpt:0.5 ...]
        [--tokens raw unit ...] [--rows 32]

Every solver minimises a sum over tokens of the squared error of a layer's output. Weights:

    raw         every token as it is: those of large norm rule the sum
    root        divided by the square root of its input's norm
    unit        divided by its norm
    gradient    times the norm of the gradient of the dense model's loss at the outputs of the
                layers that read the input (GuidedQuant, arXiv 2505.07004, one group per layer)
    fisher      the same for a next token drawn from the dense model's prediction: an estimate of
                the second derivative of KL(dense || compressed)
    fisher4     the mean of the squares of four such draws
    block       as fisher, the gradient at the output of the layer's block for all its layers

The model is a twin (twins.py). A way is a method and its target, such as `gptq,group=128:3 bits` or
`ggml,damping=0.1:Q3_K`. Printed is KL(dense || compressed) in nats per token on four texts of the
data folder that no source reads, and the mean of the layers' errors, in the weights of the run.
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from common import commit, machine
from gguf_types import held_out
from keep_more import MIX, spent
from torch import Tensor
from twins import make_twin

from calmix.calibration import resolve
from calmix.evaluation.distance import distance, reference
from calmix.models import OpenModel, find_blocks, open_model
from calmix.pruning.engine import Run, Weighting, run_through
from calmix.pruning.methods import Look, get_method
from calmix.pruning.patterns import as_pattern
from calmix.pruning.solvers.block_grid import fitting
from calmix.pruning.solvers.libggml import quantise
from calmix.pruning.token_weights import token_weights

AT_ONCE = 4  # rows of a backward pass


def gradients(opened: OpenModel, ids: Tensor, draws: int | None) -> dict[str, Tensor]:
    """Return, by layer and block, the norm of the loss's gradient at its output: (rows, length).

    `draws` is the number of next tokens drawn from the model's prediction; None for the text's own.
    """
    squares: dict[str, list[Tensor]] = defaultdict(list)
    model: Any = opened.model
    model.requires_grad_(False)
    rng = torch.Generator().manual_seed(0)
    hooks = []
    modules = {layer.name: layer.module for layer in find_blocks(model).layers}
    modules |= {f"block {i}": block for i, block in enumerate(model.get_decoder().layers)}
    for name, module in modules.items():

        def seen(module: Any, args: Any, output: Any, name: str = name) -> None:
            output = output[0] if isinstance(output, tuple) else output
            output.register_hook(lambda g: squares[name].append(g.float().square().sum(-1)))

        hooks.append(module.register_forward_hook(seen))
    for part in ids.split(AT_ONCE):
        embedded = model.get_input_embeddings()(part).detach().requires_grad_(True)
        with torch.enable_grad():
            logits = model(inputs_embeds=embedded, use_cache=False).logits[:, :-1].flatten(0, 1)
            for draw in range(draws or 1):
                labels = part[:, 1:].flatten()
                if draws:
                    shares = logits.detach().float().softmax(-1)
                    labels = torch.multinomial(shares, 1, generator=rng)[:, 0]
                loss = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
                loss.backward(retain_graph=draw + 1 < (draws or 1))
    for hook in hooks:
        hook.remove()
    count = len(ids) // AT_ONCE
    rows = {}
    for name, parts in squares.items():
        each = len(parts) // count
        sums = [sum(parts[i * each : (i + 1) * each]) for i in range(count)]
        rows[name] = torch.cat(sums).sqrt()
    return rows


def weighting(kind: str, norms: dict[str, Tensor], sharers: dict[str, list[str]]) -> Weighting:
    """Return the weighting of a kind."""

    def weigh(outputs: Any, rows: slice, inputs: Tensor) -> Tensor:
        name = next(iter(outputs))
        if kind == "raw":
            return inputs
        if kind in ("root", "unit"):
            power = 1 if kind == "unit" else 0.5
            size = inputs.float().norm(dim=-1, keepdim=True).clamp_min(1e-9)
            return (inputs.float() / size**power).to(inputs.dtype)
        if kind == "block":
            scale = norms["block " + name.split("layers.")[1].split(".")[0]]
        elif kind == "half":
            scale = sum(norms[one].square() for one in sharers[name]).sqrt().sqrt()
        else:
            scale = sum(norms[one].square() for one in sharers[name]).sqrt()
        return (inputs.float() * (scale[rows] / scale.mean())[..., None]).to(inputs.dtype)

    return weigh


def rounding(opened: OpenModel, name: str, weigh: Weighting) -> Run:
    """Return a run that rounds by llama.cpp's search, weighted by the sum of squares."""

    def seen(layers: list[Any], squares: Tensor) -> None:
        for layer in layers:
            weight = layer.view()
            kind = fitting(name, weight.shape[1]).name
            weight.copy_(quantise(weight, squares, name=kind).values())

    run = Run(opened.model, find_blocks(opened.model), Look(), seen=seen)
    run.weighting = weigh
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--data")
    parser.add_argument("--ways", nargs="+", default=["sparsegpt:0.5"])
    parser.add_argument("--tokens", nargs="+", default=["raw", "unit", "gradient"])
    parser.add_argument("--calibration", default=MIX)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--held-out", type=int, default=8, help="rows of each text")
    parser.add_argument("--shrunk", action="store_true", help="shrink Gram matrices")
    options = parser.parse_args()
    opened = open_model(options.model)
    make_twin(opened.model)
    ids = resolve(
        options.calibration, opened, rows=options.rows, length=options.length, leakage="off"
    ).ids
    texts = held_out(opened, options.data, options.held_out, options.length)
    dense = reference(opened, texts)
    layers = find_blocks(opened.model).layers
    weights = [layer.view().clone() for layer in layers]
    norms: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for kind, draws in {"fisher": 1, "fisher4": 4}.items():
        if kind in options.tokens or ("half" in options.tokens and kind == "fisher"):
            began = spent()
            for seed in range(draws):
                some = token_weights(
                    opened.model,
                    find_blocks(opened.model),
                    ids,
                    rows_at_once=AT_ONCE,
                    device=opened.model.device,
                    seed=seed,
                )
                for name, squares in some.items():
                    norms[kind][name] = norms[kind].get(name, 0) + squares
            norms[kind] = {name: one.sqrt() for name, one in norms[kind].items()}
            norms["half"] = norms[kind]
            print(f"{kind}: {spent() - began:.0f} s", flush=True)
    if "gradient" in options.tokens:
        norms["gradient"] = gradients(opened, ids, None)
    prefixes = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
    names = [layer.name for layer in layers]
    sharers = {name: [name] for name in names}
    for name in names:
        stem, _, last = name.rpartition(".")
        for group in prefixes:
            if last in group:
                sharers[name] = [f"{stem}.{one}" for one in group]
    print(
        f"commit {commit()}, {machine()}; twin of {options.model}, {opened.model.dtype}, "
        f"{options.rows} rows of {options.length} tokens of {options.calibration}\n"
    )
    print(f"| way | tokens | KL | interval | top-1 | {' | '.join(texts)} | error | cpu s |")
    print("|---|---|---|---|---|" + "---|" * (len(texts) + 2), flush=True)
    for way in options.ways:
        name, _, target = way.partition(":")
        for kind in options.tokens:
            for layer, weight in zip(layers, weights, strict=True):
                layer.view().copy_(weight)
            began = spent()
            weigh = weighting(kind, norms[kind], sharers)
            if name == "matrix":
                run = rounding(opened, target, weigh)
            else:
                method, pattern = get_method(name).aim(
                    as_pattern(f"{target} blocks" if name.startswith("ggml") else target)
                )
                run = Run(opened.model, find_blocks(opened.model), method, pattern)
                run.weighting, run.shrunk = weigh, options.shrunk
            run_through(run, ids)
            seconds, result = spent() - began, distance(opened, dense)
            errors = [one.error for one in run.report.layers if one.error is not None]
            total, parts = result["total"], result["dimensions"]
            kls = " | ".join(f"{parts[text]['kl_mean']:.4f}" for text in texts)
            print(
                f"| {way} | {kind} | {total['kl_mean']:.4f} | {total['kl_low']:.4f} to "
                f"{total['kl_high']:.4f} | {total['top1']:.3f} | {kls} | "
                f"{sum(errors) / max(1, len(errors)):.4f} | {seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
