"""A mixture of experts with real text in it: which tokens experts should be pruned on.

    python benchmarks/upcycled.py WORK [--readout READOUT.py] [--rows N] [--conditions N]

SmolLM2-135M is upcycled to Mixtral's shape: each block's feed-forward is copied into four experts
with small seeded differences, behind a random router that sends every token to two. As gates add
up to one, it computes nearly what the dense model computes. It is pruned to 50 and 60 % with every
expert on its routed tokens alone, on all tokens, or on its own smoothed with all, calibrated on one
source and on a mix. READOUT is a file as keep_more.py takes it; without, a quick suite stands in.
Every condition is kept in WORK/results.json as it is done; run again, it goes on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from common import Readout, commit, machine
from transformers import AutoModelForCausalLM, MixtralConfig

from calmix.errors import InputError
from calmix.files import write_json
from calmix.models import open_model
from calmix.pruning.checkpoint import prune_checkpoints
from calmix.specs import prune_request

MODEL = "builtin:smollm2-135m"
EXPERTS, CHOSEN = 4, 2
APART = 0.05  # of a matrix's standard deviation, by which experts differ
SOURCES = {
    "one source": "encyclopedia",
    "mix": "uniform:python-stdlib,encyclopedia,math-solutions,stories",
}


def upcycle(folder: Path) -> None:
    """Write the upcycled model, with the dense one's tokenizer."""
    opened = open_model(MODEL)
    dense, told = opened.model, opened.model.config
    config = MixtralConfig(
        vocab_size=told.vocab_size,
        hidden_size=told.hidden_size,
        intermediate_size=told.intermediate_size,
        num_hidden_layers=told.num_hidden_layers,
        num_attention_heads=told.num_attention_heads,
        num_key_value_heads=told.num_key_value_heads,
        rms_norm_eps=told.rms_norm_eps,
        max_position_embeddings=told.max_position_embeddings,
        head_dim=dense.model.layers[0].self_attn.head_dim,
        rope_parameters=told.rope_parameters,
        sliding_window=None,
        tie_word_embeddings=told.tie_word_embeddings,
        num_local_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        bos_token_id=told.bos_token_id,
        eos_token_id=told.eos_token_id,
        pad_token_id=told.pad_token_id,
    )
    made = AutoModelForCausalLM.from_config(config, dtype=dense.dtype)
    made.load_state_dict(dense.state_dict(), strict=False)
    seed = torch.Generator().manual_seed(0)

    def near(weight: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(weight.shape, generator=seed)
        return (weight.float() + APART * weight.float().std() * noise).to(weight.dtype)

    with torch.no_grad():
        for old, new in zip(dense.model.layers, made.model.layers, strict=True):
            new.mlp.gate.weight.copy_(
                torch.randn(new.mlp.gate.weight.shape, generator=seed) * told.hidden_size**-0.5
            )
            for expert in range(EXPERTS):
                both = [near(old.mlp.gate_proj.weight), near(old.mlp.up_proj.weight)]
                new.mlp.experts.gate_up_proj[expert].copy_(torch.cat(both))
                new.mlp.experts.down_proj[expert].copy_(near(old.mlp.down_proj.weight))
    made.save_pretrained(folder)
    opened.tokenizer.save_pretrained(folder)


def coverage(folder: Path) -> dict[str, Any]:
    """Return what a checkpoint's manifest tells of tokens by expert, over all blocks."""
    done = json.loads((folder / "calmix.json").read_text(encoding="utf-8"))["pruning"]
    tokens = [count for mixture in done["experts"] for count in mixture["tokens"]]
    errors = [layer["error"] for layer in done["layers"] if layer["error"] is not None]
    least = {
        source: min(min(mixture["sources"][source]) for mixture in done["experts"])
        for source in done["experts"][0]["sources"]
    }
    return {
        "least": min(tokens),
        "most": max(tokens),
        "by_source": least,
        "error": sum(errors) / len(errors),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--readout", type=Path)
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.6])
    parser.add_argument("--conditions", type=int, help="do so many and end")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    dense = options.work / "upcycled"
    if not (dense / "config.json").is_file():
        upcycle(options.work / "making")
        (options.work / "making").rename(dense)
    kept = options.work / "results.json"
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    read = Readout(options.readout)
    wanted = [(s, c) for s in options.sparsities for c in SOURCES]
    for sparsity, calibration in wanted[: options.conditions]:
        name = f"{options.method} {sparsity:g} {calibration} {options.rows}"
        if name in results:
            continue
        output = options.work / name.replace(" ", "-")
        request = prune_request(
            method=options.method,
            sparsity=sparsity,
            calibration=SOURCES[calibration],
            rows=options.rows,
            length=options.length,
        )
        try:
            prune_checkpoints(str(dense), {output: request}, resume=True)
            results[name] = coverage(output) | {"kept": read.kept(dense, output)}
            shutil.rmtree(output)
        except InputError as error:
            results[name] = {"refused": str(error)}
        write_json(kept, results)
        print(f"{name}: done", flush=True)
    print(f"{datetime.date.today()}, commit {commit()}, {machine()}\n")
    heads = next((list(one["kept"]) for one in results.values() if "kept" in one), [])
    print(f"| condition | tokens an expert | error | {' | '.join(heads)} |")
    print("|---" * (3 + len(heads)) + "|")
    for name, one in results.items():
        if "refused" in one:
            print(f"| {name} | refused: {one['refused']} |")
            continue
        shown = " | ".join(f"{one['kept'][head]:.1f}" for head in heads)
        print(f"| {name} | {one['least']} to {one['most']} | {one['error']:.4f} | {shown} |")


if __name__ == "__main__":
    main()
