"""Drop whole experts, least important first (REAP, arXiv 2510.13999, section 3).

An expert's score is the mean, over the tokens routed to it, of its gate times the norm of its
output. The gates of a token's experts are normalised to sum to one. Every mixture loses the same
number; with grouped routing, every group does. The router loses the dropped outputs, and the
configuration gets the new expert count. Multi-token prediction layers, which transformers does not
build, have unscored experts that would no longer match that count: they are removed.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calmix.errors import InputError, ModelError
from calmix.models.blocks import EXPERTS, ROUTERS, DecoderBlocks, Mixture, experts_per_token
from calmix.models.shards import write_file
from calmix.models.streaming import StreamedModel
from calmix.precision import widest
from calmix.pruning.engine import Run
from calmix.pruning.experts import Routed, call_tensors
from calmix.pruning.methods import Look
from calmix.pruning.report import Dropped
from calmix.pruning.trace import SharedInput

EXPERT_COUNTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_routed_experts",
)
NEXT = "num_nextn_predict_layers"


class ScorePass(Run):
    """A pass over the dense model that scores its experts and changes nothing.

    Attributes:
        scores: of every expert, by mixture.
    """

    def __init__(self, model: Any, blocks: DecoderBlocks) -> None:
        super().__init__(model, blocks, Look())
        self.scores: dict[str, list[float]] = {}
        for mixture in (one for index in range(len(blocks)) for one in blocks.mixtures(index)):
            owner = model.get_submodule(mixture.name.rpartition(".")[0])
            table = any(b.ndim > 1 and b.dtype == torch.int64 for b in owner.buffers())
            if table or any(len(layer.whole()) != mixture.count for layer in mixture.layers):
                raise ModelError(
                    f"{mixture.name} has a table of the experts' numbers, or experts without "
                    "weights: --drop-experts does not support this architecture"
                )

    def _through(self, index: int, inputs: list[SharedInput | Routed]) -> None:
        sums: dict[str, Tensor] = {}
        traced = {one.name: one for one in inputs if isinstance(one, Routed)}
        with ExitStack() as hooks:
            for mixture in self.blocks.mixtures(index):
                routed = traced.get(mixture.name)
                if routed is None or routed.kind == "shared":
                    raise ModelError(
                        f"the gates of the experts in {mixture.name} cannot be traced: "
                        "--drop-experts does not support this architecture"
                    )
                where, size = routed.device, (2, routed.mixture.count)
                sums[routed.name] = torch.zeros(size, dtype=widest(where), device=where)
                score = partial(_score, routed, sums[routed.name])
                hook = routed.module.register_forward_pre_hook(score, with_kwargs=True)
                hooks.enter_context(hook)
            for number in range(len(self._batches)):
                self.states[number] = self._run(index, number)
        for name, part in sums.items():
            total, tokens = part.cpu()
            self.scores[name] = (total / tokens.clamp(min=1)).tolist()


def _score(
    routed: Routed, sums: Tensor, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Add a call of a mixture to the sums (score and tokens; experts)."""
    hidden, index, tensors = call_tensors((args, kwargs))
    width, count = hidden.shape[-1], routed.mixture.count
    if index is None:  # stacked: the gate is in the input
        used = (hidden.reshape(count, -1, width) != 0).any(-1)
        outputs = module.forward(*args, **kwargs).reshape(*used.shape, -1)
        sums[0] += (outputs.to(sums.dtype).norm(dim=-1) * used).sum(1)
        sums[1] += used.sum(1)
        return
    flat = hidden.reshape(-1, width)
    gates = next(one for one in tensors if one.shape == index.shape and one is not index)
    gates = gates.to(sums.dtype)
    gates = gates / gates.sum(-1, keepdim=True)
    for expert in range(count):
        token, place = torch.where(index == expert)
        if not len(token):
            continue
        routed_here = flat[token][None] if hidden.ndim == 3 else flat[token]
        only = index.new_full((len(token), 1), expert)
        outputs = module.forward(routed_here, only, flat.new_ones(len(token), 1))
        norms = outputs.reshape(len(token), -1).to(sums.dtype).norm(dim=-1)
        sums[0, expert] += (gates[token, place] * norms).sum()
        sums[1, expert] += len(token)


def experts_of(config: Any) -> int:
    """Return the number of experts per mixture in a configuration; 0 without experts."""
    text = config.get_text_config(decoder=True)
    return next((int(n) for key in EXPERT_COUNTS if (n := getattr(text, key, None))), 0)


def chosen_experts(config: Any, scores: dict[str, list[float]], share: float) -> list[Dropped]:
    """Return the experts each mixture keeps: the best scores, equally many in every group if the
    configuration has groups."""
    chosen, text = experts_per_token(config), config.get_text_config(decoder=True)
    groups = getattr(text, "n_group", None) or 1
    reach = min(groups, getattr(text, "topk_group", None) or groups)
    first, count = next((name, len(each)) for name, each in scores.items())
    if any(len(each) != count for each in scores.values()):
        raise InputError("--drop-experts needs the same number of experts in every mixture")
    size = count // groups
    left = size - round(share * size)
    if left == size:
        raise InputError(f"--drop-experts {share:g} drops none of the {count} experts of {first}")
    if left * reach < chosen or (groups > 1 and left < 2):
        within = f" in {reach} of {groups} groups" if groups > 1 else ""
        raise InputError(
            f"--drop-experts {share:g} leaves {left * groups} of the {count} experts of {first}, "
            f"and every token is routed to {chosen}{within}: drop fewer"
        )
    dropped = []
    for name, each in scores.items():
        grouped = np.array(each).reshape(-1, size)
        best = np.sort(np.argsort(-grouped, axis=1, kind="stable")[:, :left])
        retained = best + size * np.arange(len(best))[:, None]
        dropped.append(Dropped(name, each, retained.ravel().tolist()))
    return dropped


def cut(
    mixtures: Sequence[Mixture], dropped: dict[str, Dropped], tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return a block's tensors, by name in the model, without those of dropped experts."""
    shortened = dict(tensors)
    for mixture in mixtures:
        owner = mixture.name.rpartition(".")[0]
        for name, value in tensors.items():
            inside = name.removeprefix(f"{owner}.").split(".")
            routes = name.startswith(f"{owner}.") and (
                any(part.endswith("router") or part in ROUTERS for part in inside[:-1])
                or inside[-1].endswith(("correction_bias", "expert_bias"))
            )
            per_expert = routes or name.startswith(f"{mixture.name}.")
            axis = int(routes and value.shape[:1] == (1,))  # ERNIE's bias has groups first
            if per_expert and value.shape[axis : axis + 1] == (mixture.count,):
                retained = torch.tensor(dropped[mixture.name].kept, device=value.device)
                shortened[name] = value.index_select(axis, retained)
    return shortened


def unscored(source: StreamedModel) -> set[str]:
    """Return the name prefixes of layers with experts that the opened model lacks."""
    layers = (re.match(r".*?\.\d+\.", name) for name in source.unknown if f".{EXPERTS}." in name)
    return {layer[0] for layer in layers if layer}


def write_dropped(source: StreamedModel, dropped: Sequence[Dropped], folder: Path) -> None:
    """Write a model without the dropped experts, block by block, to a loadable folder.

    Changes the expert count in the source's configuration.
    """
    by_name = {one.name: one for one in dropped}
    layers = tuple(unscored(source))
    taken = {name for name in source.unknown if name.startswith(layers)}
    for index, (file, names) in enumerate(source.layout.items()):
        if index < len(source.blocks):
            source.fetch(index)
            own = source.tensors(index)
            taken |= source.as_stored(own).keys()
            stored = source.as_stored(cut(source.blocks.mixtures(index), by_name, own))
            source.drop(index)
        else:
            stored = source.rest([name for name in names if name not in taken])
        if stored:
            write_file(folder / file, stored)
    config, count = source.config.get_text_config(decoder=True), len(dropped[0].scores)
    for key in EXPERT_COUNTS:
        if getattr(config, key, None) == count:
            setattr(config, key, len(dropped[0].kept))
    if layers and getattr(config, NEXT, None):
        setattr(config, NEXT, 0)
    source.save_config(folder)
    for code in source.folder.glob("*.py"):
        shutil.copy(code, folder / code.name)
