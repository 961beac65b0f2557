"""Every decoder-only architecture of the installed transformers, on the path users take.

    python benchmarks/architectures.py [KIND ...] [--json FILE] [--write docs/lab/architectures.csv]

A tiny random model of each is saved as bfloat16 safetensors with a tokenizer, and pruned, scored,
recovered and packed from that folder, as the verbs do it. `CHECKS` says what each result is held
against. An architecture runs in a process of its own; `--json` keeps every row once it is done, and
the same command goes on from there. No architecture is named here but where its configuration
needs a word of its own to be built small.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PreTrainedTokenizerFast,
)
from transformers.models.auto import modeling_auto

from calmix import memory
from calmix.deploy import pack as packed
from calmix.errors import CalmixError
from calmix.evaluation.likelihood import row_nll
from calmix.evaluation.scorer import Scorer
from calmix.models.blocks import Prunable, find_blocks, first_tensor
from calmix.models.opening import open_model
from calmix.pruning import checkpoint, engine
from calmix.pruning.checkpoint import prune_checkpoint
from calmix.pruning.methods import get_method
from calmix.pruning.patterns import Unstructured
from calmix.pruning.report import PruneReport
from calmix.pruning.requests import prune_request, recover_request
from calmix.pruning.work import States
from calmix.recovery.blocks import relative_error
from calmix.recovery.checkpoint import recover

SAME = 0.995  # of the masks: of two weights that tie either may go, and what follows differs
SECONDS = 120  # of processor time for one architecture
STILL = 600  # seconds without a check that ends, after which it is ended
HALF = Unstructured(0.5)
VOCABULARY = 320
ROWS, LENGTH, LONG = 8, 32, 80  # rows and tokens of a calibration set, tokens of a long row
# Whole numbers of a configuration by expressions on their names, the first that matches; larger
# ones become so small. Others keep what they are.
SMALL: dict[str, int] = {
    r"vocab": VOCABULARY,
    r"^(pad|bos|eos|sep|cls|eod|decoder_start)_token_id$": 2,
    r"position|n_ctx|max_seq_len|context_length|model_max_length": 256,
    r"index_topk": 16,  # of fewer many would tie, at zero
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
# Numbers that would change nothing as they are by default, or hardly anything, by name: so much.
FLOATS = {
    r"(?<!dim)_multipliers?$|logits?_scal(e|ing)$|a_factor$|scaling_factor$|^route_scale$": 0.5,
    r"soft_?cap(ping)?$": 2.0,
}


@dataclass
class Row:
    """What became of an architecture.

    Attributes:
        state: `swept`, `no decoder`, or `not built` with the reason in `why`.
        pruned: share of the blocks' weights in linear maps that are pruned.
        same: share of the masks that are as the reference has them.
        experts: layers that are an expert's.
        dense: what stays dense, and its share.
        dtype: bfloat16, or float32 where transformers does not run the model in bfloat16.
        checks: by name `ok`, or in one line what went wrong.
    """

    kind: str
    state: str = "swept"
    why: str = ""
    pruned: float = 0.0
    same: float = 0.0
    experts: int = 0
    dense: str = ""
    dtype: str = ""
    checks: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


class WrongError(Exception):
    """A result is not what it is held against."""


class MissingError(Exception):
    """What is to be looked at was not made."""


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


@torch.no_grad()
def reference(model: Any, ids: Tensor, report: PruneReport) -> dict[str, Tensor]:
    """Return the masks of a plain loop over whole forward passes, by layer."""
    layers, method = linear_maps(model), get_method(report.method)
    masks = {}
    with eager(model):
        for told in report.layers:
            layer = layers[told.name]
            whole = layer.whole()
            # A fused parameter's gate and up have one input: that of their expert's first weight.
            place = whole.data_ptr() if layer.expert is None else whole[layer.expert].data_ptr()
            watch = Products({place: layer.name}, {layer.name: layer.shape})
            with watch:
                model(ids, use_cache=False)
            if layer.name not in watch.grams:
                if told.tokens == 0:
                    continue
                raise LookupError(f"{layer.name} is not seen")
            gram = watch.grams[layer.name].float()
            solved = method.solve([layer.view().float()], gram, [HALF]).weights[0]
            layer.view().copy_(solved)
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
        mattering = next((n for rule, n in FLOATS.items() if re.search(rule, key)), None)
        if mattering is not None and (value is None or (type(value) is float and value)):
            given[key] = mattering
        elif mattering is not None and isinstance(value, list) and type(value[0]) is float:
            given[key] = [mattering] * len(value)
    heads = "num_attention_heads", "num_key_value_heads"
    if heads[1] in told and told.get(heads[0]) == told[heads[1]]:
        given[heads[1]] = given[heads[0]]
    depth = told.get("num_hidden_layers")
    lists = {
        key: value
        for key, value in told.items()
        if isinstance(value, list)
        and depth
        and len(value) == depth
        and len(set(map(str, value))) < depth
    }
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


def tiny(kind: str) -> tuple[Any, Any]:
    """Return a tiny random model in bfloat16, its weights large enough to matter, and its words.

    Of a model of images or sound too it is the whole, as its folder on the hub holds it.
    """
    config = small_config(transformers.CONFIG_MAPPING[kind], OWN.get(kind, {}))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    if type(model.config) is not type(config) and kind not in TEXT_ALONE:
        model = AutoModelForMultimodalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim in (2, 3) and parameter.is_floating_point():
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            elif not parameter.any():  # what is learnt from nothing lets nothing through
                parameter.fill_(0.5)
    return model.requires_grad_(False), config


def save(kind: str, folder: Path) -> None:
    """Save a tiny model with a tokenizer of bytes."""
    model, config = tiny(kind)
    model.save_pretrained(folder)
    config.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    known = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=known, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


def load(folder: Path, dtype: torch.dtype) -> Any:
    """Load a model with nothing but transformers."""
    made, told = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    if lost := [*told["missing_keys"], *told["mismatched_keys"]]:
        raise WrongError(f"transformers does not find {lost[0]} in {folder.name}")
    return made.eval().requires_grad_(False)


def linear_maps(model: Any) -> dict[str, Prunable]:
    """Return all linear maps of a model's blocks, by name."""
    found = find_blocks(model)
    return {p.name: p for index in range(len(found)) for p in found.prunables(index)}


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


class Sweep:
    """One architecture in a folder: what its checks share.

    Args:
        kind: its name in transformers.
        folder: an empty one.
    """

    def __init__(self, kind: str, folder: Path) -> None:
        self.row = Row(kind)
        self.dense, self.whole, self.pruned = (folder / n for n in ("dense", "whole", "pruned"))
        self.folder = folder
        save(kind, self.dense)
        generator = torch.Generator().manual_seed(1)
        text = folder / "text.txt"
        letters = torch.randint(33, 127, (2 * ROWS * LENGTH,), generator=generator)
        text.write_text("".join(map(chr, letters.tolist())))
        self.drawn: dict[str, Any] = {
            "calibration": str(text),
            "rows": ROWS,
            "length": LENGTH,
            "leakage": "off",
        }
        self.long = torch.randint(3, 259, (2, LONG), generator=generator)
        model = load(self.dense, torch.float32)
        # So small that only experts without tokens are pruned on others'.
        engine.SMOOTHING = 1e-9
        with torch.no_grad():
            model(self.long, use_cache=False)
            try:
                load(self.dense, torch.bfloat16)(self.long, use_cache=False)
                self.row.dtype = "bfloat16"
            except RuntimeError:
                self.row.dtype = "float32"
        self.dtype = getattr(torch, self.row.dtype)
        self.ids = torch.empty(0)
        self.report: PruneReport | None = None

    def prune(self, output: Path, dtype: str, *, files: bool = False) -> PruneReport:
        """Prune the model as the command line does, in two micro-batches."""

        def drawn(made: Any) -> None:
            self.ids = made.ids

        how = {"sparsity": 0.5, "statistics": "plain"}
        request = prune_request(method="sparsegpt", **how, **self.drawn)
        room = mock.patch.object(
            checkpoint, "States", lambda folder, device, *_: States(folder, device)
        )
        few = mock.patch.object(memory, "tokens_at_once", return_value=5 * LENGTH)
        with room if files else mock.MagicMock(), few:
            return prune_checkpoint(str(self.dense), output, request, dtype=dtype, started=drawn)

    def masks(self) -> None:
        """A prune to 50 % with SparseGPT in float32 makes at least 99.5 % of the mask that a plain
        loop of whole forward passes makes, with a Gram matrix in float64 for every linear map and
        every expert. It changes no other weight.
        """
        row = self.row
        report = self.report = self.prune(self.whole, "float32")
        dense, pruned = load(self.dense, torch.float32), load(self.whole, torch.float32)
        before = {name: p.clone() for name, p in dense.named_parameters()}
        shares: dict[str, int] = {}
        for one in report.dense:
            if one.reason != "router":
                what = one.name.rsplit(".", 1)[-1] if one.reason == "no linear map" else ""
                key = f"{one.reason}{': ' if what else ''}{what}"
                shares[key] = shares.get(key, 0) + one.weights
        whole = report.weights + report.dense_weights
        row.dense = ", ".join(f"{key} ({value / whole:.1%})" for key, value in shares.items())
        row.pruned = report.weights / whole
        row.experts = sum(layer.tokens is not None for layer in report.layers)
        masks, layers = reference(dense, self.ids, report), linear_maps(pruned)
        equal = [(layers[name].view() == 0) == mask for name, mask in masks.items()]
        row.same = float(torch.cat([part.flatten() for part in equal]).float().mean())
        if row.same < SAME:
            raise WrongError(f"{1 - row.same:.2%} of the masks differ")
        touched = {layers[told.name].parameter_name for told in report.layers}
        for name, parameter in pruned.named_parameters():
            if name not in touched and not torch.equal(parameter, before[name]):
                raise WrongError(f"{name} was changed")

    def states(self) -> None:
        """A prune in bfloat16 writes the same bytes with hidden states in files and in memory."""
        other = self.folder / "files"
        self.prune(self.pruned, self.row.dtype)
        self.prune(other, self.row.dtype, files=True)
        for path in self.pruned.glob("*.safetensors"):
            if path.read_bytes() != (other / path.name).read_bytes():
                raise WrongError("weights differ")

    def attention(self) -> None:
        """Logits of rows longer than every window, chunk and index of the model equal those that
        transformers' own attention gives.
        """
        own = load(self.dense, torch.float32)
        opened = open_model(str(self.dense), dtype="float32")
        with torch.no_grad():
            wanted = own(self.long, use_cache=False).logits
            made = opened.model(self.long, use_cache=False).logits
        apart = float((made - wanted).norm() / wanted.norm())
        if not apart < 1e-4:
            raise WrongError(f"logits differ by {apart:.1e}")

    def scorer(self) -> None:
        """Log-likelihoods of full rows and of requests equal log-softmax of the logits of the
        model's own forward, in float32 and in bfloat16. No token of a model that is scored sees
        what follows it.
        """
        for dtype, most in {self.row.dtype: 5e-2, "float32": 1e-3}.items():
            opened = open_model(str(self.dense), dtype=dtype)
            with torch.no_grad():
                likely = opened.model(self.long, use_cache=False).logits.float().log_softmax(-1)
            wanted = -likely[:, :-1].gather(2, self.long[:, 1:, None])[..., 0]
            apart = float((row_nll(opened.model, self.long) - wanted).abs().mean())
            if not apart < most:
                raise WrongError(f"{apart:.1e} nats a token apart in {dtype}")
        with torch.no_grad():
            shorter = opened.model(self.long[:, :-8], use_cache=False).logits.log_softmax(-1)
        # Of a quarter of the tokens: an index breaks ties another way where rows are shorter.
        apart = float((shorter - likely[:, :-8]).abs().mean(-1).quantile(0.25))
        if not apart < 1e-3:
            raise WrongError(f"what follows a token moves it by {apart:.1e} nats")
        # No token twice: a choice among equal ones would depend on how many rows run together.
        words = "".join(dict.fromkeys((self.folder / "text.txt").read_text()))
        asked = [(words[:size], words[at : at + 3]) for size in (24, 12) for at in (50, 60, 70)]
        answers = Scorer(opened).loglikelihood([("task", *one) for one in asked])
        for (context, rest), value in zip(asked, answers, strict=True):
            ids = opened.tokenizer(context + rest, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                likely = opened.model(ids[:, :-1], use_cache=False).logits[0].log_softmax(-1)
            wanted = likely.gather(1, ids[0, 1:, None])[-len(rest) :].sum()
            if not abs(value - float(wanted)) < 1e-2:
                raise WrongError(f"a request's log-likelihood is {value:.3f}, not {wanted:.3f}")

    def recovered(self, method: str) -> tuple[Any, Any, Any, Any]:
        """Recover by a way; return the report, and dense, pruned and made model."""
        self.needs_pruned()
        output = self.folder / method
        request = recover_request(method=method, epochs=1, batch=4, **self.drawn)
        report = recover(str(self.pruned), str(self.dense), request, output, dtype=self.row.dtype)
        made = [load(one, self.dtype) for one in (self.dense, self.pruned, output)]
        return report, *made

    def needs_pruned(self) -> None:
        if not self.pruned.is_dir():
            raise MissingError

    def distill(self) -> None:
        """A step of distillation in bfloat16 starts from the KL divergence of the two models' own
        logits.
        """
        report, dense, pruned, _ = self.recovered("distill")
        rows = self.ids[report.held_out]
        with torch.no_grad():
            p, q = (
                m(rows, use_cache=False).logits.float().log_softmax(-1) for m in (dense, pruned)
            )
        wanted = float((p.exp() * (p - q)).sum(-1).mean())
        if not abs(report.before - wanted) < 0.05 * wanted:
            raise WrongError(f"the loss is {report.before:.4f}, not {wanted:.4f}")

    def blocks(self) -> None:
        """A step of recovery in every block, in bfloat16, starts and ends with the errors that the
        models' own blocks make.
        """
        report, dense, pruned, made = self.recovered("blocks")
        rows = self.ids[report.held_out]
        first, before, last = (outputs(m, rows) for m in (dense, pruned, made))
        for told, own, name, at in (
            (report.curve[0]["before"], before, "first", 0),
            (report.curve[-1]["after"], last, "last", -1),
        ):
            wanted = float(relative_error(own[at], first[at])) / rows.numel()
            if not abs(told - wanted) < 0.05 * wanted:
                raise WrongError(f"the {name} block's error is {told:.4f}, not {wanted:.4f}")

    def pack(self) -> None:
        """A pack of the pruned model unpacks byte for byte, and `calmix.load` returns its tensors
        and logits.
        """
        self.needs_pruned()
        pack, back = self.folder / "pack", self.folder / "back"
        packed.pack(self.pruned, pack)
        packed.unpack(pack, back)
        for path in self.pruned.iterdir():
            if path.read_bytes() != (back / path.name).read_bytes():
                raise WrongError(f"{path.name} differs")
        own, made = load(self.pruned, self.dtype), packed.load(pack, dtype=self.dtype)
        values = made.state_dict()
        for name, value in own.state_dict().items():
            if not (value.dtype == values[name].dtype and torch.equal(value, values[name])):
                raise WrongError(f"{name} differs")
        with torch.no_grad():
            if not torch.equal(*(m(self.long, use_cache=False).logits for m in (own, made))):
                raise WrongError("logits differ")

    def zeros(self) -> None:
        """Every layer has as many zeros as reported, and they are still zero after both
        recoveries.
        """
        self.needs_pruned()
        pruned = linear_maps(load(self.pruned, self.dtype))
        others = [self.folder / name for name in ("distill", "blocks")]
        if self.report is None or not all(one.is_dir() for one in others):
            raise MissingError
        made = [linear_maps(load(one, self.dtype)) for one in others]
        for told in self.report.layers:
            zero = pruned[told.name].view() == 0
            if int(zero.sum()) < told.pruned:
                raise WrongError(f"{told.name} has too few")
            if any(one[told.name].view()[zero].any() for one in made):
                raise WrongError(f"some of {told.name} are not")


@torch.no_grad()
def outputs(model: Any, ids: Tensor) -> list[Tensor]:
    """Return the hidden states behind every block."""
    made: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda module, args, result: made.append(first_tensor(result)))
        for block in find_blocks(model).blocks
    ]
    model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return made


CHECKS = ("masks", "states", "attention", "scorer", "distill", "blocks", "pack", "zeros")


def sweep(kind: str, folder: Path, tell: Callable[[Row], None] = lambda row: None) -> Row:
    """Take an architecture through all checks, whatever it does.

    Args:
        kind: its name in transformers.
        folder: an empty one to work in.
        tell: called with the row whenever a check is over.
    """
    began = time.perf_counter()
    try:
        if not decodes(kind):
            return Row(kind, "no decoder")
        made = Sweep(kind, folder)
    except Exception as error:
        return Row(kind, "not built", one_line(error))
    for name in CHECKS:
        try:
            getattr(made, name)()
            outcome = "ok"
        except MissingError:
            outcome = "not reached"
        except WrongError as error:
            outcome = f"wrong: {error}"
        except CalmixError as error:
            outcome = f"refused: {error}"
        except Exception as error:
            outcome = f"crashed: {one_line(error)}"
        made.row.checks[name] = outcome.replace(f"{folder}/", "")
        made.row.seconds = time.perf_counter() - began
        tell(made.row)
    return made.row


def one_line(error: BaseException) -> str:
    """Return what an error says, without the lines behind the first."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')[:200]}"


# What a configuration has to say of itself to be built small.
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1}
OWN: dict[str, dict[str, Any]] = {
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 32},
    },
    "dots3_note": {"audio_config": {"adapter_input_size": 32}},
    "bailing_hybrid": {
        "num_expert_group": 2,
        "topk_group": 1,
        "num_experts_per_token": 2,
        "q_lora_rank": 8,
        "linear_head_dim": 8,
        "qk_head_dim": 16,
    },
    "bamba": MAMBA,
    "bert-generation": {"is_decoder": True},
    "blt": {"encoder_hash_byte_group_vocab": 500},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_routed_experts": 4},
    "deepseek_v3": {"first_k_dense_replace": 1},
    "dots3_note_text": {
        "per_layer_config": {
            2: {
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "q_lora_rank": 16,
                "kv_lora_rank": 16,
                "qk_nope_head_dim": 8,
                "v_head_dim": 8,
                "qk_rope_head_dim": 8,
            }
        }
    },
    "dory": {
        "n_input_layers": 4,
        "n_recurrent_layers": 4,
        "n_output_layers": 4,
        "num_hidden_layers": 12,
        "layer_types": ["full_attention", "mlp"] * 6,
    },
    "dots1": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
    },
    "emu3": {"vocabulary_map": {"<image>": 4, "<|extra_200|>": 5, "<|visual token 000000|>": 6}},
    "ernie4_5_moe": {"moe_k": 2},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [64] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
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
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 2,
        "ple_layer_ids": [],
    },
    "xlstm": {
        "hidden_size": 64,
        "embedding_dim": 64,
        "num_heads": 2,
        "chunk_size": 32,
        "qk_dim_factor": 1.0,
        "max_inference_chunksize": 256,
    },
    "zamba": {
        "num_hidden_layers": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "mamba_dt_rank": 4,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "num_query_groups": 4,
        "kv_channels": 16,
    },
}

OWN["qwen4_exp"] = {"text_config": OWN["qwen4_exp_text"]}
OWN["dots3_note"]["text_config"] = OWN["dots3_note_text"]
ALONE = {  # why a model does not run on text alone
    "gemma3n": "its tower for images needs the package timm",
    "gemma4_assistant": "it drafts for another model, whose states it needs",
    "gemma4_unified_assistant": "it drafts for another model, whose states it needs",
}
TEXT_ALONE = ("emu3",)  # of which transformers finds no text in the whole


def cells(row: Row) -> list[str]:
    """Return a row of the table."""
    outcomes = [row.checks.get(name, "not reached").partition(":")[0] for name in CHECKS]
    return [row.kind, f"{row.pruned:.1%}", str(row.experts or ""), *outcomes, row.dense]


def reasons(row: Row) -> str:
    """Return why an architecture does not pass every check, each reason once."""
    found: dict[str, list[str]] = {}
    for name, told in row.checks.items():
        if told not in ("ok", "not reached"):
            found.setdefault(told, []).append(name)
    return "; ".join(f"{', '.join(names)} {told}" for told, names in found.items())


def _apart(kind: str, pipe: Any) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    with tempfile.TemporaryDirectory() as folder:
        pipe.send(sweep(kind, Path(folder), pipe.send))


def apart(kind: str) -> Row:
    """Sweep an architecture in a process of its own, which may crash or hang."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_apart, args=(kind, theirs))
    process.start()
    theirs.close()
    row = Row(kind, "not built", "ended before any check")
    try:
        while ours.poll(STILL):
            row = ours.recv()
        process.kill()
    except EOFError:
        pass
    process.join()
    if process.exitcode and row.state == "swept":
        lost = next(name for name in CHECKS if name not in row.checks)
        row.checks[lost] = f"crashed: ended by signal {-process.exitcode}"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND")
    parser.add_argument("--write", type=Path, help="CSV file to write")
    parser.add_argument("--json", type=Path, help="file of rows, gone on with")
    parser.add_argument("--tell", action="store_true", help="write from the rows there are")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(50)
    transformers.logging.disable_progress_bar()
    kinds = options.kinds or sorted(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    done: dict[str, dict[str, Any]] = {}
    if options.json is not None and options.json.is_file():
        done = json.loads(options.json.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:  # what is imported on the way serves all
        sweep("llama", Path(folder))
    for kind in kinds:
        if options.tell or (kind in done and kind not in options.kinds):
            continue
        row = apart(kind)
        told = f"{row.seconds:5.1f} s {row.pruned:6.1%} {reasons(row) or row.why or 'ok'}"
        print(f"{kind:24} {row.state:10} {told}", flush=True)
        done[kind] = asdict(row)
        if options.json is not None:
            options.json.write_text(json.dumps(done, indent=1), encoding="utf-8")
    rows = [Row(**row) for _, row in sorted(done.items())]
    if options.write is not None:
        heads = ["architecture", "pruned", "experts' layers", *CHECKS, "left dense"]
        with options.write.open("w", encoding="utf-8", newline="") as file:
            lines = [cells(row) for row in rows if row.state == "swept"]
            csv.writer(file, lineterminator="\n").writerows([heads, *lines])
    words = ("wrong", "crashed")
    if faults := [row.kind for row in rows if any(w in reasons(row) for w in words)]:
        sys.exit(f"wrong, or not refused in one line: {', '.join(faults)}")


if __name__ == "__main__":
    main()
