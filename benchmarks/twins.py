"""Twins: the same function with other weights, off the grid of the file a model came from.

A model read from a quantised file lies on a grid, and rounding it back to that grid loses nothing.
Its twin has no grid: norms are multiplied by random factors that the matrices behind them are
divided by, and so are the rows of `v_proj` and `up_proj` with the columns of `o_proj` and
`down_proj`.

    python benchmarks/twins.py MODEL FOLDER

writes the twin of a model to a folder that transformers and calmix open.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calmix.files import check_output_folder
from calmix.models.opening import open_model


@torch.no_grad()
def make_twin(model: Any, seed: int = 0) -> None:
    """Turn a Llama, Qwen2 or Gemma 3 of transformers into its twin, in place.

    Factors are 2^u, u uniform in [-1/2, 1/2]. Embeddings, output head and last norm are unchanged.
    """
    rng = torch.Generator().manual_seed(seed)
    for block in model.get_decoder().layers:
        attention, mlp = block.self_attn, block.mlp
        inner = getattr(block, "pre_feedforward_layernorm", block.post_attention_layernorm)
        readers = [attention.q_proj, attention.k_proj, attention.v_proj]
        for norm, some in ((block.input_layernorm, readers), (inner, [mlp.gate_proj, mlp.up_proj])):
            factor = _factors(norm.weight, rng)
            one = int("Gemma" in type(norm).__name__)  # whose gain is 1 + weight
            norm.weight.copy_((norm.weight.float() + one) * factor - one)
            for reader in some:
                reader.weight.copy_(reader.weight.float() / factor)
        value, heads = attention.v_proj, attention.num_key_value_groups
        factor = _factors(value.weight[:, 0], rng)
        repeated = factor.view(-1, 1, attention.head_dim).expand(-1, heads, -1).flatten()
        for first, last, columns in (
            (value, attention.o_proj, repeated),
            (mlp.up_proj, mlp.down_proj, None),
        ):
            rows = factor if columns is not None else _factors(first.weight[:, 0], rng)
            first.weight.copy_(first.weight.float() * rows[:, None])
            if first.bias is not None:
                first.bias.copy_(first.bias.float() * rows)
            last.weight.copy_(last.weight.float() / (rows if columns is None else columns))


def _factors(like: Tensor, rng: torch.Generator) -> Tensor:
    return (torch.rand(len(like), generator=rng) - 0.5).exp2().to(like.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    check_output_folder(options.folder, inputs=[options.model])
    opened = open_model(options.model)
    make_twin(opened.model)
    opened.model.save_pretrained(options.folder)
    opened.tokenizer.save_pretrained(options.folder)


if __name__ == "__main__":
    main()
