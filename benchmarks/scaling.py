"""How the time of a prune grows with tokens, width and blocks.

    python benchmarks/scaling.py [--parts tokens width blocks] [--out FILE]

Tokens: the builtin model at 16 k to 256 k calibration tokens. Width: one block of LLaMA-3.2-1B's,
3.1-8B's and 3.1-70B's shape with random weights. Blocks: the builtin model's shape with 10 to 60
blocks. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from common import commit, machine

from calmix.models.opening import open_model
from calmix.pruning.engine import prune
from calmix.pruning.patterns import Unstructured

MODEL = "builtin:smollm2-135m"
LENGTH = 512
SHAPES = {
    "LLaMA-3.2-1B block": (2048, 8192, 32, 8),
    "LLaMA-3.1-8B block": (4096, 14336, 32, 8),
    "LLaMA-3.1-70B block": (8192, 28672, 64, 8),
}


def random_model(hidden: int, inner: int, heads: int, shared: int, blocks: int) -> Any:
    """Return a llama of random weights in bfloat16 with a small vocabulary."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama",
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device("cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.requires_grad_(False).eval()


def cases(parts: list[str], tokens: int) -> Iterator[tuple[str, Any, int]]:
    """Yield a label, a model and calibration tokens."""
    if "tokens" in parts:
        for thousands in (16, 32, 64, 128, 256):
            yield f"{thousands} k tokens", open_model(MODEL).model, thousands * 1024
    if "blocks" in parts:
        for blocks in (10, 30, 60):
            yield f"{blocks} blocks", random_model(576, 1536, 9, 3, blocks), 16 * 1024
    if "width" in parts:
        for label, shape in SHAPES.items():
            yield label, random_model(*shape, blocks=1), tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=["tokens", "blocks", "width"])
    parser.add_argument("--methods", nargs="+", default=["sparsegpt"])
    parser.add_argument("--width-tokens", type=int, default=4096)
    options = parser.parse_args()
    print(f"commit {commit()}, {machine()}\n")
    print("| case | method | seconds |\n|---|---|---|")
    for label, model, tokens in cases(options.parts, options.width_tokens):
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, 500, (tokens // LENGTH, LENGTH), generator=generator)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        for method in options.methods:
            model.load_state_dict(before)
            began = time.perf_counter()
            prune(model, ids, method=method, pattern=Unstructured(0.6))
            took = time.perf_counter() - began
            print(f"| {label} | {method} | {took:.1f} |", flush=True)


if __name__ == "__main__":
    main()
