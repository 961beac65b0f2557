"""compressed-tensors by calmix, llm-compressor and rounding to nearest: KL to the dense model.

    python benchmarks/checkpoints.py --rival RIVAL_PYTHON [--model builtin:smollm2-135m]
        [--bits 4 3] [--group 64] [--rows 64] [--ways calmix gptq rtn]

The model is a twin (twins.py): the file it came from leaves no grid. All ways quantise the matrices
of the blocks on the same calibration rows. `gptq` is llm-compressor's, which writes the checkpoint
that calmix opens; `rtn` rounds to the scales of its default observer. `calmix` is our `gptq` with
its default statistics, `asymmetric` the same with zero points, `plain` with the papers' statistics.
`--folders` adds checkpoints and files made from the twin before (`calmix prune TWIN --method
ggml,type=Q4_K_M`, and `llama,type=Q4_K_M` for llama.cpp's rounding). Printed is KL(dense ||
quantised) in nats per token as in gguf_types.py, and wall-clock seconds.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from common import commit, machine, run_rival
from gguf_types import cells, held_out
from keep_more import MIX
from twins import make_twin

from calmix.calibration.request import calibration_set
from calmix.evaluation.distance import distance, reference
from calmix.models.blocks import find_blocks
from calmix.models.opening import forget, open_model
from calmix.pruning.engine import prune

SOLVED: dict[str, dict[str, Any]] = {
    "calmix": {},
    "asymmetric": {"symmetric": False},
    "plain": {"statistics": "plain"},
}


@torch.no_grad()
def round_to_nearest(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Return a matrix with scales of the largest magnitudes, as compressed-tensors' observer."""
    parts = weight.unflatten(1, (-1, group))
    scale = (parts.abs().amax(-1, keepdim=True).float() / (2**bits - 1) * 2).to(weight.dtype)
    levels = (parts / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return torch.where(scale == 0, 0, levels * scale).flatten(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rival", help="an interpreter that has llmcompressor")
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--held-out", type=int, default=8, help="rows of each held-out text")
    parser.add_argument("--data", help="the data folder")
    parser.add_argument("--ways", nargs="*", default=[*SOLVED, "gptq", "rtn"])
    parser.add_argument("--folders", type=Path, nargs="*", default=[])
    options = parser.parse_args()
    print(
        f"{machine()}, commit {commit()}; {' '.join(f'{k}={v}' for k, v in vars(options).items())}"
    )
    opened = open_model(options.model, device="cpu")
    make_twin(opened.model)
    ids = calibration_set(MIX, opened, rows=options.rows, length=options.length).ids
    texts = held_out(opened, options.data, options.held_out, options.length)
    dense = reference(opened, texts)
    layers = find_blocks(opened.model).layers
    weights = [layer.view().clone() for layer in layers]
    print(f"\n| bits | way | KL | interval | top-1 | {' | '.join(texts)} | seconds |")
    print("|---|---|---|---|---|" + "---|" * (len(texts) + 1), flush=True)

    def row(bits: object, way: str, model: Any, seconds: float) -> None:
        result = distance(model, dense, dense=lambda: opened)  # a file has a head of its own
        print(f"| {bits} | {way} | {cells(result)} | {seconds:.0f} |", flush=True)

    with tempfile.TemporaryDirectory() as place:
        twin = Path(place) / "twin"
        opened.model.save_pretrained(twin)
        opened.tokenizer.save_pretrained(twin)
        for bits in options.bits:
            for way in options.ways:
                began = time.perf_counter()
                if way != "gptq":
                    if way == "rtn":
                        for layer, weight in zip(layers, weights, strict=True):
                            layer.view().copy_(round_to_nearest(weight, bits, options.group))
                    else:
                        method = f"gptq,group={options.group}"
                        prune(opened.model, ids, method=method, bits=bits, **SOLVED[way])
                    row(bits, way, opened, time.perf_counter() - began)
                    with torch.no_grad():
                        for layer, weight in zip(layers, weights, strict=True):
                            layer.view().copy_(weight)
                    continue
                out = Path(place) / f"{way}-{bits}"
                how = {"model": twin, "method": way, "bits": bits, "group": options.group}
                how |= {"dtype": "bfloat16", "packed": 1, "output": out}
                made = run_rival(options.rival, ids, **how)
                row(
                    bits,
                    f"llm-compressor {made['version']}, {way}",
                    open_model(out),
                    made["seconds"],
                )
                forget(out)
        for folder in options.folders:
            row("-", folder.name, open_model(folder), 0)


if __name__ == "__main__":
    main()
