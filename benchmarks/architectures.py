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
import json
import os
import re
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM
from transformers.models.auto import modeling_auto

from calmix.errors import CalmixError
from calmix.models import find_blocks
from calmix.pruning import Unstructured, get_method
from calmix.pruning.engine import PruneReport, Run, run_through
from calmix.pruning.experts import ExpertTokens

SAME = 0.999  # of the masks
SECONDS = 40  # of processor time for one architecture
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
    r"rank$|state|head_dim|d_head|headdim|_head_size|rope_dim|nope_dim|rotary_dim|v_head": 8,
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
    if heads[1] in told and told[heads[0]] == told[heads[1]]:
        given[heads[1]] = given[heads[0]]
    depth = told.get("num_hidden_layers")
    lists = {k: v for k, v in told.items() if isinstance(v, list) and depth and len(v) == depth}
    if lists:
        kinds = list(zip(*(map(str, v) for v in lists.values()), strict=True))
        first = sorted({row: number for number, row in reversed(list(enumerate(kinds)))}.values())
        first = first if len(first) > 1 else [first[0], depth - 1]
        given |= {key: [value[number] for number in first] for key, value in lists.items()}
        given["num_hidden_layers"] = len(first)
    for name in getattr(kind, "sub_configs", {}):
        if (part := getattr(default, name, None)) is not None:
            given[name] = small_config(type(part), own.get(name, {}))
    for key in told:
        if key in ("transformers_version", "model_type", "architectures"):
            given.pop(key, None)
    return kind(**given | {k: v for k, v in own.items() if not isinstance(v, dict)})


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
        ids = torch.randint(3, VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(1))
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
OWN: dict[str, dict[str, Any]] = {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND")
    parser.add_argument("--write", type=Path, help="Markdown file to write")
    parser.add_argument("--json", type=Path, help="file of rows, gone on with")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(50)
    kinds = options.kinds or sorted(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    done: dict[str, dict[str, Any]] = {}
    if options.json is not None and options.json.is_file():
        done = json.loads(options.json.read_text(encoding="utf-8"))
    for kind in kinds:
        if kind in done and kind not in options.kinds:
            continue
        row = guarded(kind)
        print(f"{kind:24} {row.state:10} {row.pruned:6.1%} {row.same:8.4%} {row.why[:150]}",
              flush=True)  # fmt: skip
        done[kind] = vars(row)
        if options.json is not None:
            options.json.write_text(json.dumps(done, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
