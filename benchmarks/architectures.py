"""What calmix does with every decoder-only architecture of the installed transformers.

    python benchmarks/architectures.py [KIND ...] [--write docs/architectures.md]

Builds a tiny random model of each, prunes it to 50 % with SparseGPT, and compares with a plain
loop: for one linear map after another, in the order the engine took them, a whole forward pass of
the model with the Gram matrix of that map's input in float64. No architecture is named here but
where its configuration needs a word of its own to be built small.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from common import machine
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM
from transformers.models.auto import modeling_auto

from calmix.errors import CalmixError
from calmix.models import find_blocks
from calmix.pruning import Unstructured, get_method
from calmix.pruning.engine import Run, run_through
from calmix.pruning.experts import ExpertTokens
from calmix.pruning.report import PruneReport

SAME = 0.999  # of the masks
SECONDS = 60  # of processor time for one architecture
HALF = Unstructured(0.5)
VOCABULARY = 320
# Whole numbers of a configuration by expressions on their names, the first that matches; larger
# ones become so small. Others keep what they are.
SMALL: dict[str, int] = {
    r"vocab": VOCABULARY,
    r"^(pad|bos|eos|sep|cls|eod|decoder_start)_token_id$": 2,
    r"position|n_ctx|max_seq_len|context_length|model_max_length": 256,
    r"conv|kernel|expand|top_?k|per_tok|n_group|hc_|_cycles|time0|time1": 2,
    r"^n_layers?$|^num_hidden_layers$|^num_layers$|decoder_layers|num_blocks|^depth$": 2,
    r"key_value_heads|kv_heads|n_head_kv|num_query_groups": 2,
    r"experts|zero_expert_num": 4,
    r"heads|^n_head$": 4,
    r"rank$": 16,
    r"state|head_dim|d_head|headdim|_head_size|rope_dim|nope_dim|rotary_dim|v_head": 8,
    r"sliding_window|attention_window|local_attention|chunk|window_size|block_size": 16,
    r"moe_intermediate|shared_.*size|expert_.*size|ffn_hidden": 32,
    r"intermediate|ffn|dff|dim_ff|d_inner|n_inner|d_ssm": 64,
    r"hidden|n_embd|embed|d_model|width|_dim$|embedding": 32,
    r"image_size": 32,
}


@dataclass
class Row:
    """What became of an architecture.

    Attributes:
        state: `whole`, `part`, `refused`, `no decoder` or a fault.
        pruned: share of the blocks' weights in linear maps that are pruned.
        same: share of the masks that are as the reference has them.
    """

    kind: str
    state: str
    why: str = ""
    pruned: float = 0.0
    same: float = 0.0
    experts: int = 0


class Products(TorchFunctionMode):
    """Sees every product with a weight that is looked for, by where it lies in memory."""

    def __init__(self, wanted: dict[int, str], shapes: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        self.wanted, self.shapes = wanted, shapes
        self.grams: dict[str, Tensor] = {}
        self.calls: dict[str, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm):
            self._see(args[0], args[1])
        elif func is torch.bmm:
            for x, weight in zip(args[0], args[1], strict=True):
                self._see(x[(x != 0).any(-1)], weight)
        elif func is torch.addmm:
            self._see(args[1], args[2])
        return func(*args, **(kwargs or {}))

    def _see(self, x: Tensor, weight: Tensor) -> None:
        name = self.wanted.get(weight.data_ptr())
        if name is None or x.shape[-1] != self.shapes[name][1]:
            return
        flat = x.reshape(-1, x.shape[-1]).double()
        self.grams[name] = self.grams.get(name, 0) + flat.T @ flat
        self.calls[name] = self.calls.get(name, 0) + 1


def reference(model: Any, ids: Tensor, report: PruneReport) -> dict[str, Tensor]:
    """Return the masks of a plain loop over whole forward passes, by layer."""
    found = find_blocks(model)
    layers = {p.name: p for index in range(len(found)) for p in found.prunables(index)}
    method, masks = get_method(report.method), {}
    with eager(model), torch.no_grad():
        for told in report.layers:
            layer = layers[told.name]
            whole = layer.whole()
            # A fused parameter's gate and up have one input: that of their expert's first weight.
            place = whole[layer.expert].data_ptr() if layer.fused else whole.data_ptr()
            watch = Products({place: layer.name}, {layer.name: layer.shape})
            with watch:
                model(ids, use_cache=False)
            if layer.name not in watch.grams:
                if told.tokens == 0:
                    continue
                raise LookupError(f"{layer.name} is not seen")
            gram = watch.grams[layer.name].float()
            solved = method.solve([layer.matrix()], gram, [HALF]).weights[0]
            layer.assign(solved)
            masks[layer.name] = solved == 0
    return masks


@contextmanager
def eager(model: Any) -> Iterator[None]:
    """Let experts run one after another."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    before = {key: getattr(c, "_experts_implementation", None) for key, c in configs.items()}
    for config in configs.values():
        config._experts_implementation = "eager"
    try:
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation = before[key]


def small_config(kind: type, own: dict[str, Any]) -> Any:
    """Return a small configuration of a class, with a block of every kind that the default has."""
    default = kind()
    told = default.to_dict()
    given: dict[str, Any] = {}
    for key, value in told.items():
        if isinstance(value, int) and not isinstance(value, bool):
            small = next((n for rule, n in SMALL.items() if re.search(rule, key)), value)
            given[key] = min(small, value)
    heads = "num_attention_heads", "num_key_value_heads"
    if heads[1] in told and told.get(heads[0]) == told[heads[1]]:
        given[heads[1]] = given[heads[0]]
    depth = told.get("num_hidden_layers")
    lists = {
        key: value for key, value in told.items()
        if isinstance(value, list) and depth and len(value) == depth
        and len(set(map(str, value))) < depth
    }  # fmt: skip
    if lists:
        kinds = list(zip(*(map(str, v) for v in lists.values()), strict=True))
        first = sorted({row: number for number, row in reversed(list(enumerate(kinds)))}.values())
        first = first if len(first) > 1 else [first[0], depth - 1]
        for key, value in lists.items():
            small = next((n for rule, n in SMALL.items() if re.search(rule, key)), None)
            picked = [value[number] for number in first]
            numbers = all(type(one) is int and one > 1 for one in picked) and small
            given[key] = [min(one, small) for one in picked] if numbers else picked
        given["num_hidden_layers"] = len(first)
    for name in getattr(kind, "sub_configs", {}):
        if (part := getattr(default, name, None)) is not None:
            given[name] = small_config(type(part), own.get(name, {}))
    for key in told:
        if key in ("transformers_version", "model_type", "architectures"):
            given.pop(key, None)
    parts = set(getattr(kind, "sub_configs", {}))
    return kind(**given | {key: value for key, value in own.items() if key not in parts})


def tiny(kind: str) -> Any:
    """Return a tiny random model in float32, its weights large enough to matter."""
    known = transformers.CONFIG_MAPPING[kind]
    config = small_config(known, OWN.get(kind, {}))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim in (2, 3) and parameter.is_floating_point():
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            elif not parameter.any():  # what is learnt from nothing lets nothing through
                parameter.fill_(0.5)
    return model.requires_grad_(False)


def decodes(kind: str) -> bool:
    """Tell whether an architecture is a decoder on its own."""
    config = transformers.CONFIG_MAPPING[kind]()
    encoders = (
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    )
    both = getattr(config, "is_encoder_decoder", False) is True
    return not both and not any(kind in names for names in encoders)


def measure(kind: str) -> Row:
    """Prune a tiny model of an architecture and hold it against the reference."""
    try:
        if not decodes(kind):
            return Row(kind, "no decoder")
        model = tiny(kind)
        known = min(VOCABULARY, model.get_input_embeddings().weight.shape[0] - 8)
        ids = torch.randint(3, known, (8, 32), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            model(ids[:1], use_cache=False)
    except Exception as error:
        return Row(kind, "not built", f"{type(error).__name__}: {str(error).strip()[:200]}")
    theirs = copy.deepcopy(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    try:
        found = find_blocks(model)
        # So small a smoothing that only experts without tokens are pruned on others'.
        tokens = ExpertTokens("routed", 1e-9)
        run = Run(model, found, get_method("sparsegpt"), HALF, "sequential", experts=tokens)
        run_through(run, ids, 5 * 32)
        report = run.report
    except CalmixError as error:
        return Row(kind, "refused", str(error))
    masks = reference(theirs, ids, report)
    layers = {p.name: p for index in range(len(found)) for p in found.prunables(index)}
    equal = [(layers[name].view() == 0) == mask for name, mask in masks.items()]
    same = float(torch.cat([part.flatten() for part in equal]).float().mean())
    pruned = {layers[told.name].parameter_id for told in report.layers}
    for name, parameter in model.named_parameters():
        if id(parameter) not in pruned and not torch.equal(parameter, before[name]):
            return Row(kind, "wrong", f"{name} was changed", same=same)
    shares: dict[str, int] = {}
    for dense in report.dense:
        if dense.reason != "router":
            what = dense.name.rsplit(".", 1)[-1] if dense.reason == "no linear map" else ""
            key = f"{dense.reason}{': ' if what else ''}{what}"
            shares[key] = shares.get(key, 0) + dense.weights
    whole = report.weights + report.dense_weights
    why = ", ".join(f"{key} ({value / whole:.1%})" for key, value in shares.items())
    state = "wrong" if same < SAME else "part" if shares else "whole"
    experts = sum(layer.tokens is not None for layer in report.layers)
    return Row(kind, state, why, report.weights / whole, same, experts)


def guarded(kind: str) -> Row:
    """Measure an architecture, whatever it does."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"not done after {SECONDS} s")

    signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        return measure(kind)
    except Exception as error:
        return Row(kind, "crashed", f"{type(error).__name__}: {str(error).strip()[:200]}")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


# What a configuration has to say of itself to be built small.
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1}
OWN: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
             "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 32}},
    "dots3_note": {"adapter_input_size": 32},
    "bailing_hybrid": {"num_expert_group": 2, "topk_group": 1, "num_experts_per_token": 2,
                       "q_lora_rank": 8, "linear_head_dim": 8, "qk_head_dim": 16},
    "bamba": MAMBA,
    "blt": {"encoder_hash_byte_group_vocab": 500},
    "cohere_compass_text": {"rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 1e4}
        for kind in ("full_attention", "sliding_attention")}},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_routed_experts": 4},
    "deepseek_v3": {"first_k_dense_replace": 1},
    "dory": {"n_input_layers": 4, "n_recurrent_layers": 4, "n_output_layers": 4,
             "num_hidden_layers": 12, "layer_types": ["full_attention", "mlp"] * 6},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
              "n_shared_experts": 1},
    "ernie4_5_moe": {"moe_k": 2},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2,
                     "layer_types": ["sliding_attention", "full_attention"] * 2,
                     "intermediate_size": [64] * 4, "activation_sparsity_pattern": [0.0] * 4},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": MAMBA,
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4": {"vision_config": {"image_size": 28, "patch_size": 14}},
    "llama4_text": {"moe_layers": [0, 1]},
    "longcat_flash": {"qk_head_dim": 16, "head_dim": 8},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8,
                       "indexer_budget": 16, "indexer_compress_ratio": 2, "ple_layer_ids": []},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "num_heads": 2, "chunk_size": 32},
    "zamba": {"num_hidden_layers": 4, "attention_hidden_size": 64, "attention_head_dim": 16,
              "layers_block_type": ["linear_attention", "hybrid"] * 2, "mamba_dt_rank": 4},
    "zamba2": {"num_hidden_layers": 4, "attention_hidden_size": 64, "attention_head_dim": 16,
               "layers_block_type": ["linear_attention", "hybrid"] * 2, "hybrid_layer_ids": [1, 3],
               "num_attention_heads": 4, "num_key_value_heads": 4, "n_mamba_heads": 4,
               "mamba_headdim": 16, "num_query_groups": 4, "kv_channels": 16},
}  # fmt: skip

OWN["qwen4_exp"] = {"text_config": OWN["qwen4_exp_text"]}

STATES = {
    "whole": "pruned", "part": "pruned in part", "refused": "refused", "not built": "not tried",
    "wrong": "WRONG", "crashed": "CRASHED",
}  # fmt: skip


def page(rows: list[Row]) -> str:
    """Return the table as a page of the documentation."""
    decoders = [row for row in rows if row.state != "no decoder"]
    pruned = [row for row in decoders if row.state in ("whole", "part")]
    others = ", ".join(row.kind for row in rows if row.state == "no decoder")
    lines = [
        "# Architectures",
        "",
        f"What calmix does with the {len(decoders)} decoder-only architectures that transformers "
        f"{transformers.__version__} names for causal language models: {len(pruned)} are pruned, "
        "wholly or in part. Made by `python benchmarks/architectures.py --write "
        f"docs/architectures.md` ({datetime.date.today()}, {machine()}).",
        "",
        "A tiny random model of each is pruned to 50 % with SparseGPT and held against a plain "
        "loop of whole forward passes with a Gram matrix in float64 for every linear map, and for "
        f"every expert: at least {SAME:.1%} of the masks have to be the same, and nothing else may "
        "have changed. No architecture is known to the engine by name. *Pruned*: all matrices of "
        "the blocks but routers. *In part*: some are no linear maps (depthwise convolutions, scan "
        "parameters), or are called more than once a pass, never, or from elsewhere too; they stay "
        "dense, and every prune tells of them (`dense` in `calmix.json`). Shares are of the tiny "
        "model's blocks. *Not tried*: no small model of it can be made or run on text alone.",
        "",
        "| architecture | outcome | pruned | experts' layers | masks as the reference | left "
        "dense, or why not |",
        "|---|---|---|---|---|---|",
    ]
    for row in decoders:
        done = row.state in ("whole", "part", "wrong")
        told = (
            [f"{row.pruned:.1%}", str(row.experts or ""), f"{row.same:.3%}"] if done else [""] * 3
        )
        why = next(iter(row.why.splitlines()), "").replace("|", "/")
        lines.append(f"| {row.kind} | {STATES[row.state]} | {' | '.join(told)} | {why} |")
    lines += ["", f"No decoders of their own, and left out: {others}.", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND")
    parser.add_argument("--write", type=Path, help="Markdown file to write")
    parser.add_argument("--json", type=Path, help="file of rows, gone on with")
    parser.add_argument("--tell", action="store_true", help="write from the rows there are")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(50)
    kinds = options.kinds or sorted(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    done: dict[str, dict[str, Any]] = {}
    if options.json is not None and options.json.is_file():
        done = json.loads(options.json.read_text(encoding="utf-8"))
    for kind in kinds:
        if options.tell or (kind in done and kind not in options.kinds):
            continue
        row = guarded(kind)
        print(f"{kind:24} {row.state:10} {row.pruned:6.1%} {row.same:8.4%} {row.why[:150]}",
              flush=True)  # fmt: skip
        done[kind] = vars(row)
        if options.json is not None:
            options.json.write_text(json.dumps(done, indent=1), encoding="utf-8")
    rows = [Row(**row) for _, row in sorted(done.items())]
    if options.write is not None:
        options.write.write_text(page(rows), encoding="utf-8")
    faults = [row.kind for row in rows if row.state in ("wrong", "crashed")]
    if faults:
        sys.exit(f"pruned wrongly, or not refused in one line: {', '.join(faults)}")


if __name__ == "__main__":
    main()
