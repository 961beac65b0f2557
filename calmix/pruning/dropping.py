"""Drop whole experts: those whose outputs count least go (REAP, arXiv 2510.13999, section 3).

The score of an expert is the mean, over the tokens that are routed to it, of its gate times the
norm of its output. Gates are those of the chosen experts, made to sum to one. Every mixture loses
as many; where experts are chosen by group, every group does. The router loses their outputs, and
the configuration counts those that are left.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calmix.errors import InputError, ModelError
from calmix.models.blocks import DecoderBlocks, Mixture, experts_per_token
from calmix.models.shards import ShardWriter
from calmix.models.streaming import Files, StreamedModel
from calmix.pruning.engine import Dropped, Run
from calmix.pruning.experts import Routed, is_index
from calmix.pruning.layout import observe_block
from calmix.pruning.methods.wanda import Wanda
from calmix.pruning.patterns import Unstructured

COUNTS = (
    "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
    "num_routed_experts",
)  # fmt: skip
CHOOSES = ("router", "gate", "wg")


class ScorePass(Run):
    """A pass over the dense model that scores its experts, and changes nothing.

    Attributes:
        scores: of every expert, by mixture.
    """

    def __init__(self, model: Any, found: DecoderBlocks) -> None:
        super().__init__(model, found, Wanda(), Unstructured(0.5), "block")
        self.scores: dict[str, list[float]] = {}

    def _with_states(self, index: int) -> None:
        assert self._tiny is not None
        with torch.inference_mode(False):
            hidden, recorded = self._tiny
            seen = observe_block(self.found, index, recorded[index], hidden, self.written[0])
        handles = []
        sums: dict[str, Tensor] = {}
        for routed in (one for one in seen.inputs if isinstance(one, Routed)):
            if routed.kind in ("modules", "shared"):
                raise ModelError(
                    f"the gates of the experts in {routed.name} cannot be seen: --drop-experts "
                    "does not work with this architecture"
                )
            sums[routed.name] = torch.zeros(2, routed.mixture.count, dtype=torch.float64)
            handles.append(_scored(routed, sums[routed.name]))
        try:
            for number in range(len(self._calls)):
                self.states[number] = self._run(index, number)
        finally:
            for handle in handles:
                handle.remove()
        for name, (total, tokens) in sums.items():
            self.scores[name] = (total / tokens.clamp(min=1)).tolist()


def _scored(routed: Routed, sums: Tensor) -> Any:
    """Add to the sums (score, tokens; experts) whenever a mixture is called."""

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = [*args, *kwargs.values()]
        hidden = next(value for value in values if isinstance(value, Tensor))
        width = hidden.shape[-1]
        if routed.kind == "stacked":  # the gate is in the input
            used = (hidden.reshape(routed.mixture.count, -1, width) != 0).any(-1)
            made = module.forward(*args, **kwargs).reshape(*used.shape, -1)
            sums[0] += (made.double().norm(dim=-1) * used).sum(1).cpu()
            sums[1] += used.sum(1).cpu()
            return
        flat = hidden.reshape(-1, width)
        index = next(value for value in values if is_index(value))
        gates = next(
            value for value in values
            if isinstance(value, Tensor) and value.shape == index.shape and value is not index
        )  # fmt: skip
        gates = gates.double() / gates.double().sum(-1, keepdim=True)
        for expert in range(routed.mixture.count):
            token, place = torch.where(index == expert)
            if not len(token):
                continue
            own = flat[token][None] if hidden.ndim == 3 else flat[token]
            alone = index.new_full((len(token), 1), expert)
            made = module.forward(own, alone, flat.new_ones(len(token), 1))
            norms = made.reshape(len(token), -1).double().norm(dim=-1)
            sums[0, expert] += float((gates[token, place] * norms).sum())
            sums[1, expert] += len(token)

    return routed.module.register_forward_pre_hook(hook, with_kwargs=True)


def choose(
    scores: Sequence[float], share: float, groups: int = 1, *, chosen: int, name: str = "a mixture"
) -> list[int]:
    """Return the experts that are left, in order.

    Args:
        scores: of every expert.
        share: to be dropped, in (0, 1).
        groups: of experts next to one another that are chosen together.
        chosen: experts a token is sent to.
        name: of the mixture, for what is said.

    Raises:
        InputError: too few would be left, or none be dropped.
    """
    size = len(scores) // groups
    gone = round(share * size)
    left = size - gone
    if not gone:
        raise InputError(
            f"--drop-experts {share:g} drops none of the {len(scores)} experts of {name}"
        )
    if left * groups < chosen or (groups > 1 and left < 2):
        raise InputError(
            f"--drop-experts {share:g} leaves {left * groups} of the {len(scores)} experts of "
            f"{name}, and every token is sent to {chosen}: drop fewer"
        )
    kept: list[int] = []
    for first in range(0, len(scores), size):
        order = sorted(range(first, first + size), key=lambda expert: (-scores[expert], expert))
        kept += sorted(order[:left])
    return kept


def text_config(config: Any) -> Any:
    """Return what a configuration says of the decoder."""
    return config.get_text_config(decoder=True)


def chosen_experts(model: Any, scores: dict[str, list[float]], share: float) -> list[Dropped]:
    """Return which experts every mixture keeps.

    Raises:
        InputError: as `choose`, or mixtures differ in size.
    """
    chosen = experts_per_token(model.config)
    groups = getattr(text_config(model.config), "n_group", None) or 1
    if len({len(one) for one in scores.values()}) > 1:
        raise InputError("--drop-experts needs as many experts in every mixture")
    return [
        Dropped(name, own, choose(own, share, groups, chosen=chosen, name=name))
        for name, own in scores.items()
    ]


def cut(
    mixtures: Sequence[Mixture], dropped: dict[str, Dropped], tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return a block's tensors, by name in the model, without what belongs to dropped experts."""
    made = dict(tensors)
    for mixture in mixtures:
        kept, count = dropped[mixture.name].kept, mixture.count
        owner = mixture.name.rpartition(".")[0]
        for name, value in tensors.items():
            inside = name.removeprefix(f"{owner}.").split(".")
            own = name.startswith(f"{mixture.name}.")
            routes = name.startswith(f"{owner}.") and (
                any(part.endswith("router") or part in CHOOSES for part in inside[:-1])
                or inside[-1].endswith("correction_bias")
            )
            if (own or routes) and value.ndim and value.shape[0] == count:
                numbers = torch.tensor(kept, device="cpu" if value.is_meta else value.device)
                made[name] = (
                    value.new_empty(len(kept), *value.shape[1:]) if value.is_meta
                    else value.index_select(0, numbers)
                )  # fmt: skip
    return made


def write_dropped(source: StreamedModel, dropped: Sequence[Dropped], folder: Path) -> None:
    """Write a model without the dropped experts, block by block, as a folder that loads.

    Raises:
        ModelError: the architecture holds its experts in a way that cannot be cut.
        InputError: the disk is full.
    """
    by_name = {one.name: one for one in dropped}
    blocks = source.blocks
    files: Files = source.files()
    inside: set[str] = set()
    where = {name: file for file, held in files.items() for name in held}
    for index in range(len(blocks)):
        own = source.tensors(index)
        before, after = (
            source.as_stored(part) for part in (own, cut(blocks.mixtures(index), by_name, own))
        )
        inside |= before.keys()
        for name in before:
            files[where[name]].pop(name)
        for name, value in after.items():
            files[where[name]][name] = (value.dtype, tuple(value.shape))
    writer = ShardWriter(folder, files)
    for name in source.shards.places:
        if name not in inside:
            writer.write(source.shards.read([name]))
    for index in range(len(blocks)):
        source.fetch(index)
        writer.write(source.as_stored(cut(blocks.mixtures(index), by_name, source.tensors(index))))
        source.drop(index)
    before_config = source.model.config
    source.model.config = config = copy.deepcopy(before_config)
    told, count = text_config(config), len(dropped[0].scores)
    for key in COUNTS:
        if getattr(told, key, None) == count:
            setattr(told, key, len(dropped[0].kept))
    try:
        source.save(writer, folder)
    finally:
        source.model.config = before_config
    for path in source.folder.iterdir():
        if path.suffix in (".py", ".jinja") or path.name.endswith("processor_config.json"):
            shutil.copy(path, folder / path.name)
