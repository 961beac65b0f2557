"""A model larger than memory: a random checkpoint of a large model's shape pruned in a budget.

    python benchmarks/large.py --folder DIR [--shape llama-3.1-8b] [--blocks 32]
        [--max-memory 6GiB] [--kill-after 3]

Shapes: llama-3.1-8b (16 GB, DIR needs about 40), mixtral-8x7b (2.9 GB a block), qwen3-30b-a3b
(1.2 GB a block), small-mixture (27 MB a block of 32 experts, each with a number of tokens of its
own); the checkpoint is written shard by shard, once, experts one by one as on the hub. The prune
runs in a process of its own, whose peak resident memory is what the operating system says of it;
with `--kill-after N` it is ended by SIGKILL once N blocks are done, and resumed. Calibration is 8
rows of 512 random tokens unless told otherwise. Prints seconds a block, resident memory after the
first block and the last, and peaks, beside what `prune --dry-run` expects; ends with an error if
`--max-memory` was exceeded.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil
import torch
from common import commit, machine
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from calmix.memory import parse_memory

SHAPES = {
    "llama-3.1-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
    "small-mixture": {
        "model_type": "qwen3_moe",
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "moe_intermediate_size": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
}


def block_shapes(shape: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a block by their names in hub checkpoints, experts one by one."""
    width, inner, heads = (
        shape["hidden_size"],
        shape["intermediate_size"],
        shape["num_attention_heads"],
    )
    head = shape.get("head_dim", width // heads)
    shared = head * shape["num_key_value_heads"]
    found: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (head * heads, width),
        "self_attn.k_proj.weight": (shared, width),
        "self_attn.v_proj.weight": (shared, width),
        "self_attn.o_proj.weight": (width, head * heads),
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
    }
    if shape["model_type"] == "llama":
        parts = {"mlp.": ("gate_proj", "up_proj", "down_proj")}
    elif shape["model_type"] == "mixtral":
        found["block_sparse_moe.gate.weight"] = (shape["num_local_experts"], width)
        parts = {
            f"block_sparse_moe.experts.{number}.": ("w1", "w3", "w2")
            for number in range(shape["num_local_experts"])
        }
    else:
        inner = shape["moe_intermediate_size"]
        found["mlp.gate.weight"] = (shape["num_experts"], width)
        found |= {f"self_attn.{name}_norm.weight": (head,) for name in "qk"}
        parts = {
            f"mlp.experts.{number}.": ("gate_proj", "up_proj", "down_proj")
            for number in range(shape["num_experts"])
        }
    for at, (gate, up, down) in parts.items():
        found |= {
            f"{at}{gate}.weight": (inner, width),
            f"{at}{up}.weight": (inner, width),
            f"{at}{down}.weight": (width, inner),
        }
    return found


def write_model(folder: Path, blocks: int, shape: dict[str, Any]) -> None:
    """Write a random checkpoint, a file a block, unless it is there."""
    if (folder / "model.safetensors.index.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.for_model(num_hidden_layers=blocks, dtype="bfloat16", **shape)
    config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    config.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=words, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    width, vocabulary = shape["hidden_size"], shape["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, str] = {}

    def values(size: tuple[int, ...]) -> torch.Tensor:
        if len(size) == 1:
            return torch.ones(size).bfloat16()
        return torch.randn(size, generator=generator).mul_(size[-1] ** -0.5).bfloat16()

    def keep(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
        made = {key: values(size) for key, size in shapes.items()}
        save_file(made, folder / name, {"format": "pt"})
        weights.update(dict.fromkeys(made, name))

    keep(
        "model-outside.safetensors",
        {
            "model.embed_tokens.weight": (vocabulary, width),
            "lm_head.weight": (vocabulary, width),
            "model.norm.weight": (width,),
        },
    )
    for index in range(blocks):
        own = {f"model.layers.{index}.{name}": size for name, size in block_shapes(shape).items()}
        keep(f"model-{index:05d}.safetensors", own)
        print(f"wrote block {index + 1} of {blocks}", file=sys.stderr, flush=True)
    index_file = {"metadata": {}, "weight_map": weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))


def run(command: list[str], work: Path, kill_after: int | None) -> tuple[float, list[float], bool]:
    """Run a prune; return its peak resident GiB, when each block was done, and if it was killed."""
    process = subprocess.Popen(command)
    began, times, done, held = time.perf_counter(), [], 0, list[float]()
    while True:
        # The status of a child tells its peak only when it has ended.
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        if ended:
            break
        try:
            now = json.loads((work / "work.json").read_text())["kept"].get("done", 0)
        except (OSError, ValueError):
            now = 0
        if now > done:
            done = now
            times.append(time.perf_counter() - began)
            held.append(psutil.Process(process.pid).memory_info().rss / 2**30)
            print(f"block {done}: {times[-1]:.1f} s", file=sys.stderr, flush=True)
            if kill_after is not None and done >= kill_after:
                process.send_signal(signal.SIGKILL)
                kill_after = None
        time.sleep(0.2)
    killed = os.WIFSIGNALED(status)
    if not killed and os.waitstatus_to_exitcode(status):
        sys.exit(f"the prune ended with {os.waitstatus_to_exitcode(status)}")
    if held:
        print(
            f"resident memory {held[0]:.2f} GiB after the first block, {held[-1]:.2f} GiB after "
            f"block {done}"
        )
    return usage.ru_maxrss / 2**20, times, killed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--max-memory", default="6GiB")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--kill-after", type=int)
    options = parser.parse_args()
    model = options.folder / f"{options.shape}-{options.blocks}"
    output = options.folder / "pruned"
    # Elsewhere: a child of this process would begin with its peak on its own account.
    writing = multiprocessing.get_context("spawn").Process(
        target=write_model, args=(model, options.blocks, SHAPES[options.shape])
    )
    writing.start()
    writing.join()
    if writing.exitcode:
        sys.exit("the model could not be written")
    text = options.folder / "text.txt"
    generator = torch.Generator().manual_seed(1)
    letters = torch.randint(97, 123, (4 * options.rows * options.length,), generator=generator)
    text.write_text("".join(map(chr, letters.tolist())))
    command = [
        sys.executable,
        "-m",
        "calmix",
        "prune",
        str(model),
        "-o",
        str(output),
        "--calibration",
        str(text),
        "--rows",
        str(options.rows),
        "--length",
        str(options.length),
        "--sparsity",
        "0.6",
        "--method",
        options.method,
        "--dtype",
        "bfloat16",
        "--leakage",
        "off",
        "--max-memory",
        options.max_memory,
        "--overwrite",
    ]
    dry = subprocess.run(
        [*command, "--dry-run", "--json"], capture_output=True, text=True, check=True
    )
    planned = json.loads(dry.stdout)
    memory, expected = max(p["memory"] for p in planned), sum(p["seconds"] for p in planned)
    size = sum(p.stat().st_size for p in model.glob("*.safetensors")) / 2**30
    print(f"commit {commit()}, {machine()}")
    print(
        f"{options.blocks} blocks, {size:.1f} GiB of weights, {options.rows} x {options.length} "
        f"tokens, {options.method} 60 %, --max-memory {options.max_memory}\n"
    )
    work = output.with_name(output.name + ".unfinished")
    began = time.perf_counter()
    peak, times, killed = run(command, work, options.kill_after)
    seconds = time.perf_counter() - began
    steps = [b - a for a, b in itertools.pairwise(times)]
    each = sum(steps) / len(steps) if steps else float("nan")
    print(
        f"peak resident memory {peak:.2f} GiB; {each:.1f} s a block ({len(times)} blocks seen), "
        f"{seconds:.0f} s in all"
    )
    print(f"planned: {memory / 2**30:.2f} GiB, {expected:.0f} s in all")
    most = peak
    if killed:
        print("killed, then resumed:")
        peak, times, _ = run([*command, "--resume"], work, None)
        print(f"peak resident memory {peak:.2f} GiB; finished {times[-1]:.0f} s after the resume")
    if max(most, peak) > (bound := parse_memory(options.max_memory) / 2**30):
        sys.exit(f"more than --max-memory, {bound:.2f} GiB, was taken")


if __name__ == "__main__":
    main()
