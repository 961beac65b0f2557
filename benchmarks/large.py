"""A model larger than memory: a random LLaMA-3.1-8B-shaped checkpoint pruned within a budget.

    python benchmarks/large.py --folder DIR [--max-memory 6GiB] [--kill-after 3]

DIR needs about 40 GB. The checkpoint (16 GB, written shard by shard) is made once. The prune runs
in a process of its own, whose peak resident memory is what the operating system says of it; with
`--kill-after N` it is ended by SIGKILL once N blocks are done, and resumed. Calibration is 8 rows
of 512 random tokens unless told otherwise. Prints seconds a block and peaks.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from common import commit, machine
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast

SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}


def write_model(folder: Path, blocks: int) -> None:
    """Write a random checkpoint, a file a block, unless it is there."""
    if (folder / "model.safetensors.index.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.for_model("llama", num_hidden_layers=blocks, dtype="bfloat16", **SHAPE)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=words, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    width, inner, vocabulary = (
        SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["vocab_size"],
    )  # fmt: skip
    shared = width * SHAPE["num_key_value_heads"] // SHAPE["num_attention_heads"]
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, str] = {}

    def matrix(rows: int, columns: int) -> torch.Tensor:
        values = torch.randn(rows, columns, generator=generator)
        return values.mul_(columns**-0.5).bfloat16()

    def keep(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, {"format": "pt"})
        weights.update(dict.fromkeys(tensors, name))

    keep("model-outside.safetensors", {
        "model.embed_tokens.weight": matrix(vocabulary, width),
        "lm_head.weight": matrix(vocabulary, width),
        "model.norm.weight": torch.ones(width).bfloat16(),
    })  # fmt: skip
    for index in range(blocks):
        at = f"model.layers.{index}."
        keep(f"model-{index:05d}.safetensors", {
            at + "self_attn.q_proj.weight": matrix(width, width),
            at + "self_attn.k_proj.weight": matrix(shared, width),
            at + "self_attn.v_proj.weight": matrix(shared, width),
            at + "self_attn.o_proj.weight": matrix(width, width),
            at + "mlp.gate_proj.weight": matrix(inner, width),
            at + "mlp.up_proj.weight": matrix(inner, width),
            at + "mlp.down_proj.weight": matrix(width, inner),
            at + "input_layernorm.weight": torch.ones(width).bfloat16(),
            at + "post_attention_layernorm.weight": torch.ones(width).bfloat16(),
        })  # fmt: skip
        print(f"wrote block {index + 1} of {blocks}", file=sys.stderr, flush=True)
    index_file = {"metadata": {}, "weight_map": weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))


def run(command: list[str], work: Path, kill_after: int | None) -> tuple[float, list[float], bool]:
    """Run a prune; return its peak resident GiB, when each block was done, and if it was killed."""
    process = subprocess.Popen(command)
    began, times, done = time.perf_counter(), [], 0
    while True:
        # The status of a child tells its peak only when it has ended.
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        if ended:
            break
        try:
            now = json.loads((work / "progress.json").read_text())["done"]
        except (OSError, ValueError):
            now = 0
        if now > done:
            done = now
            times.append(time.perf_counter() - began)
            print(f"block {done}: {times[-1]:.1f} s", file=sys.stderr, flush=True)
            if kill_after is not None and done >= kill_after:
                process.send_signal(signal.SIGKILL)
                kill_after = None
        time.sleep(0.2)
    killed = os.WIFSIGNALED(status)
    if not killed and os.waitstatus_to_exitcode(status):
        sys.exit(f"the prune ended with {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss / 2**20, times, killed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--max-memory", default="6GiB")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--kill-after", type=int)
    options = parser.parse_args()
    model, output = options.folder / f"model-{options.blocks}", options.folder / "pruned"
    write_model(model, options.blocks)
    text = options.folder / "text.txt"
    generator = torch.Generator().manual_seed(1)
    letters = torch.randint(97, 123, (4 * options.rows * options.length,), generator=generator)
    text.write_text("".join(map(chr, letters.tolist())))
    command = [
        sys.executable, "-m", "calmix", "prune", str(model), "-o", str(output), "--calibration",
        str(text), "--rows", str(options.rows), "--length", str(options.length), "--sparsity",
        "0.6", "--method", options.method, "--dtype", "bfloat16", "--leakage", "off",
        "--max-memory", options.max_memory, "--overwrite",
    ]  # fmt: skip
    size = sum(p.stat().st_size for p in model.glob("*.safetensors")) / 2**30
    print(f"commit {commit()}, {machine()}")
    print(f"{options.blocks} blocks, {size:.1f} GiB of weights, {options.rows} x {options.length} "
          f"tokens, {options.method} 60 %, --max-memory {options.max_memory}\n")  # fmt: skip
    work = output.with_name(output.name + ".unfinished")
    peak, times, killed = run(command, work, options.kill_after)
    steps = [b - a for a, b in itertools.pairwise(times)]
    each = sum(steps) / len(steps) if steps else float("nan")
    print(f"peak resident memory {peak:.2f} GiB; {each:.1f} s a block ({len(times)} blocks seen)")
    if killed:
        print("killed, then resumed:")
        peak, times, _ = run([*command, "--resume"], work, None)
        print(f"peak resident memory {peak:.2f} GiB; finished {times[-1]:.0f} s after the resume")


if __name__ == "__main__":
    main()
