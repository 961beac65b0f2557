"""Drop whole experts: those whose outputs count least go (REAP, arXiv 2510.13999, section 3).

The score of an expert is the mean, over the tokens that are routed to it, of its gate times the
norm of its output. Gates are those of the chosen experts, made to sum to one. Every mixture loses
as many; where experts are chosen by group, every group does. The router loses their outputs, and
the configuration counts those that are left. Layers that predict further tokens, which transformers
does not build, have as many experts as it counts and none that were scored: they go.
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
from calmix.pruning import distributed
from calmix.pruning.engine import Run
from calmix.pruning.experts import Routed, given_tensors
from calmix.pruning.methods import Look
from calmix.pruning.patterns import Unstructured
from calmix.pruning.report import Dropped
from calmix.pruning.trace import SharedInput

COUNTS = (
    "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
    "num_routed_experts",
)  # fmt: skip
NEXT = "num_nextn_predict_layers"


class ScorePass(Run):
    """A pass over the dense model that scores its experts, and changes nothing.

    Attributes:
        scores: of every expert, by mixture.
    """

    def __init__(self, model: Any, found: DecoderBlocks) -> None:
        super().__init__(model, found, Look(), Unstructured(0.5), "block")
        self.scores: dict[str, list[float]] = {}

    def _two_pass(self, index: int, inputs: list[SharedInput | Routed]) -> None:
        sums: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            for routed in (one for one in inputs if isinstance(one, Routed)):
                if routed.kind not in ("indexed", "stacked"):
                    raise ModelError(
                        f"the gates of the experts in {routed.name} cannot be seen: --drop-experts "
                        "does not work with this architecture"
                    )
                where, size = routed.device, (2, routed.mixture.count)
                sums[routed.name] = torch.zeros(size, dtype=widest(where), device=where)
                score = partial(_score, routed, sums[routed.name])
                hook = routed.module.register_forward_pre_hook(score, with_kwargs=True)
                hooks.enter_context(hook)
            for number in range(len(self._batches)):
                self.states[number] = self._run(index, number)
        for name, own in sums.items():
            total, tokens = torch.stack(distributed.everyone(own.cpu())).sum(0)
            self.scores[name] = (total / tokens.clamp(min=1)).tolist()


def _score(
    routed: Routed, sums: Tensor, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Add what a mixture is called with to the sums (score, tokens; experts)."""
    hidden, index, tensors = given_tensors((args, kwargs))
    width, count = hidden.shape[-1], routed.mixture.count
    if index is None:  # stacked: the gate is in the input
        used = (hidden.reshape(count, -1, width) != 0).any(-1)
        made = module.forward(*args, **kwargs).reshape(*used.shape, -1)
        sums[0] += (made.to(sums.dtype).norm(dim=-1) * used).sum(1)
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
        own = flat[token][None] if hidden.ndim == 3 else flat[token]
        alone = index.new_full((len(token), 1), expert)
        made = module.forward(own, alone, flat.new_ones(len(token), 1))
        norms = made.reshape(len(token), -1).to(sums.dtype).norm(dim=-1)
        sums[0, expert] += (gates[token, place] * norms).sum()
        sums[1, expert] += len(token)


def experts_of(config: Any) -> int:
    """Return how many experts a configuration gives every mixture; 0 without."""
    own = config.get_text_config(decoder=True)
    return next((int(n) for key in COUNTS if (n := getattr(own, key, None))), 0)


def chosen_experts(config: Any, scores: dict[str, list[float]], share: float) -> list[Dropped]:
    """Return which experts every mixture keeps: those of the best scores, of every group as many
    where a configuration has groups."""
    chosen, own = experts_per_token(config), config.get_text_config(decoder=True)
    groups = getattr(own, "n_group", None) or 1
    reach = min(groups, getattr(own, "topk_group", None) or groups)
    first, count = next((name, len(each)) for name, each in scores.items())
    if any(len(each) != count for each in scores.values()):
        raise InputError("--drop-experts needs as many experts in every mixture")
    size = count // groups
    left = size - round(share * size)
    if left == size:
        raise InputError(f"--drop-experts {share:g} drops none of the {count} experts of {first}")
    if left * reach < chosen or (groups > 1 and left < 2):
        within = f" in {reach} of {groups} groups" if groups > 1 else ""
        raise InputError(
            f"--drop-experts {share:g} leaves {left * groups} of the {count} experts of {first}, "
            f"and every token is sent to {chosen}{within}: drop fewer"
        )
    made = []
    for name, each in scores.items():
        grouped = np.array(each).reshape(-1, size)
        best = np.sort(np.argsort(-grouped, axis=1, kind="stable")[:, :left])
        kept = best + size * np.arange(len(best))[:, None]
        made.append(Dropped(name, each, kept.ravel().tolist()))
    return made


def cut(
    mixtures: Sequence[Mixture], dropped: dict[str, Dropped], tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return a block's tensors, by name in the model, without what belongs to dropped experts."""
    made = dict(tensors)
    for mixture in mixtures:
        owner = mixture.name.rpartition(".")[0]
        for name, value in tensors.items():
            inside = name.removeprefix(f"{owner}.").split(".")
            routes = name.startswith(f"{owner}.") and (
                any(part.endswith("router") or part in ROUTERS for part in inside[:-1])
                or inside[-1].endswith("correction_bias")
            )
            own = routes or name.startswith(f"{mixture.name}.")
            if own and value.ndim and value.shape[0] == mixture.count:
                kept = torch.tensor(dropped[mixture.name].kept, device=value.device)
                made[name] = value.index_select(0, kept)
    return made


def unscored(source: StreamedModel) -> set[str]:
    """Return the layers with experts that the model as it is opened lacks, as names begin."""
    found = (re.match(r".*?\.\d+\.", name) for name in source.unknown if f".{EXPERTS}." in name)
    return {layer[0] for layer in found if layer}


def write_dropped(source: StreamedModel, dropped: Sequence[Dropped], folder: Path) -> None:
    """Write a model without the dropped experts, block by block, as a folder that loads.

    The source's own configuration counts those that are left from then on.
    """
    by_name = {one.name: one for one in dropped}
    layers = tuple(unscored(source))
    taken = {name for name in source.unknown if name.startswith(layers)}
    for index, (file, names) in enumerate(source.layout.items()):
        if index < len(source.blocks):
            source.fetch(index)
            own = source.tensors(index)
            taken |= source.as_stored(own).keys()
            left = source.as_stored(cut(source.blocks.mixtures(index), by_name, own))
            source.drop(index)
        else:
            left = source.rest([name for name in names if name not in taken])
        if left:
            write_file(folder / file, left)
    told, count = source.config.get_text_config(decoder=True), len(dropped[0].scores)
    for key in COUNTS:
        if getattr(told, key, None) == count:
            setattr(told, key, len(dropped[0].kept))
    if layers and getattr(told, NEXT, None):
        setattr(told, NEXT, 0)
    source.save_config(folder)
    for path in source.folder.iterdir():
        if path.suffix in (".py", ".jinja") or path.name.endswith("processor_config.json"):
            shutil.copy(path, folder / path.name)
