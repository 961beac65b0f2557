"""Drop whole experts: those whose outputs count least go (REAP, arXiv 2510.13999, section 3).

The score of an expert is the mean, over the tokens that are routed to it, of its gate times the
norm of its output. Gates are those of the chosen experts, made to sum to one. Every mixture loses
as many; where experts are chosen by group, every group does. The router loses their outputs, and
the configuration counts those that are left. Layers that predict further tokens, which transformers
does not build, have as many experts as it counts and none that were scored: they go.
"""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calmix.errors import InputError, ModelError
from calmix.models.blocks import EXPERTS, ROUTERS, DecoderBlocks, Mixture, experts_per_token
from calmix.models.shards import ShardWriter
from calmix.models.streaming import Files, StreamedModel
from calmix.precision import widest
from calmix.pruning import distributed
from calmix.pruning.engine import Run
from calmix.pruning.experts import Routed, is_index
from calmix.pruning.methods import Look
from calmix.pruning.patterns import Unstructured
from calmix.pruning.report import Dropped
from calmix.pruning.trace import observe_block

COUNTS = (
    "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
    "num_routed_experts",
)  # fmt: skip
NEXT = "num_nextn_predict_layers"
MARK = 256.0  # what an expert gives where its gate is looked for: large beside other outputs


class ScorePass(Run):
    """A pass over the dense model that scores its experts, and changes nothing.

    Attributes:
        scores: of every expert, by mixture.
    """

    def __init__(self, model: Any, found: DecoderBlocks) -> None:
        super().__init__(model, found, Look(), Unstructured(0.5), "block")
        self.scores: dict[str, list[float]] = {}

    def _with_states(self, index: int) -> None:
        assert self._tiny is not None
        with torch.inference_mode(False):
            hidden, recorded = self._tiny
            seen = observe_block(self.found, index, recorded[index], hidden, self.written[0])
        handles = []
        sums: dict[str, Tensor] = {}
        for routed in (one for one in seen.inputs if isinstance(one, Routed)):
            if routed.kind == "shared":
                raise _unseen(routed.name)
            device = routed.device
            sums[routed.name] = torch.zeros(
                2, routed.mixture.count, dtype=widest(device), device=device
            )
            handles.append(_scored(routed, sums[routed.name]))
        try:
            for number in range(len(self._calls)):
                self.states[number] = self._run(index, number)
        finally:
            for handle in handles:
                handle.remove()
        for name, own in sums.items():
            total, tokens = distributed.total(own, self._device(index)).cpu()
            self.scores[name] = (total / tokens.clamp(min=1)).tolist()


def _scored(routed: Routed, sums: Tensor) -> Any:
    """Add to the sums (score, tokens; experts) whenever a mixture is called."""

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if routed.kind == "modules":
            made, gates = _marked(routed, args, kwargs)
            whole = gates.sum(-1, keepdim=True).where(gates.any(-1, keepdim=True), 1.0)
            sums[0] += (made / whole).sum(0)
            sums[1] += (gates != 0).sum(0)
            return
        values = [*args, *kwargs.values()]
        hidden = next(value for value in values if isinstance(value, Tensor))
        width = hidden.shape[-1]
        if routed.kind == "stacked":  # the gate is in the input
            used = (hidden.reshape(routed.mixture.count, -1, width) != 0).any(-1)
            made = module.forward(*args, **kwargs).reshape(*used.shape, -1)
            sums[0] += (made.to(sums.dtype).norm(dim=-1) * used).sum(1)
            sums[1] += used.sum(1)
            return
        flat = hidden.reshape(-1, width)
        index = next(value for value in values if is_index(value))
        gates = next(
            value for value in values
            if isinstance(value, Tensor) and value.shape == index.shape and value is not index
        )  # fmt: skip
        gates = gates.to(sums.dtype)
        gates = gates / gates.sum(-1, keepdim=True)
        for expert in range(routed.mixture.count):
            token, place = torch.where(index == expert)
            if not len(token):
                continue
            own = flat[token][None] if hidden.ndim == 3 else flat[token]
            alone = index.new_full((len(token), 1), expert)
            made = module.forward(own, alone, flat.new_ones(len(token), 1))
            norms = made.reshape(len(token), -1).to(sums.dtype).norm(dim=-1)
            sums[0, expert] += (gates[token, place] * norms).sum()
            sums[1, expert] += len(token)

    return routed.module.register_forward_pre_hook(hook, with_kwargs=True)


def _unseen(name: str) -> ModelError:
    return ModelError(
        f"the gates of the experts in {name} cannot be seen: --drop-experts does not work with "
        "this architecture"
    )


def _marked(routed: Routed, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return gate times norm of the output, and gate, of every token and expert, (tokens, experts).

    For experts that are modules of their own, whose gates stay within the module around them: it
    runs with experts that give one number each, in an output of their own, and what it returns
    then holds the gates. What it adds beside its experts is taken off.

    Raises:
        ModelError: it does more with its experts' outputs than add them up, times a gate.
    """
    experts: list[Any] = list(routed.mixture.experts or ())
    norms: list[list[Tensor]] = [[] for _ in experts]
    like: list[Tensor] = []

    def run(given: Callable[[int, Tensor], Tensor | None] | None) -> Tensor:
        """Run the module with experts that give `given(expert, inputs)`, or what they are for."""
        with ExitStack() as stack:
            for number, expert in enumerate(experts):
                before, real = expert.__dict__.get("forward"), expert.forward

                def forward(*inputs: Any, number: int = number, real: Any = real) -> Tensor:
                    if len(inputs) != 1:
                        raise _unseen(routed.name)
                    if given is None:
                        made: Tensor = real(*inputs)
                        like[:] = [made.new_empty(0, made.shape[-1])]
                        norms[number].append(made.to(widest(made.device)).norm(dim=-1))
                        return made
                    (empty,) = like
                    marks = empty.new_zeros(*inputs[0].shape[:-1], empty.shape[-1])
                    value = given(number, marks[..., number])
                    if value is not None:
                        marks[..., number] = value.to(marks.dtype)
                    return marks

                def undo(expert: Any = expert, before: Any = before) -> None:
                    expert.__dict__.pop("forward")
                    if before is not None:
                        expert.__dict__["forward"] = before

                expert.__dict__["forward"] = forward
                stack.callback(undo)
            made = routed.module.forward(*args, **kwargs)
        found: Tensor = made if isinstance(made, Tensor) else made[0]
        return found.reshape(-1, found.shape[-1]).to(widest(found.device))

    run(None)
    if not like or len(experts) > like[0].shape[-1]:
        raise _unseen(routed.name)
    most = max(float(one.max()) for own in norms for one in own if one.numel()) or 1.0
    waiting = [iter(own) for own in norms]
    beside = run(lambda number, marks: None)
    gates = run(lambda number, marks: torch.full_like(marks, MARK)) - beside
    made = run(lambda number, marks: next(waiting[number]) * (MARK / most)) - beside
    seen = torch.tensor([sum(one.numel() for one in own) for own in norms])
    used = (gates[:, : len(experts)] != 0).sum(0).cpu()
    if (used > seen).any() or not used.any() or gates[:, len(experts) :].any():
        raise _unseen(routed.name)
    return made[:, : len(experts)] * (most / MARK), gates[:, : len(experts)] / MARK


def choose(
    scores: Sequence[float],
    share: float,
    groups: int = 1,
    *,
    chosen: int,
    reach: int | None = None,
    name: str = "a mixture",
) -> list[int]:
    """Return the experts that are left, in order.

    Args:
        scores: of every expert.
        share: to be dropped, in (0, 1).
        groups: of experts next to one another that are chosen together.
        chosen: experts a token is sent to.
        reach: groups they may be of; None for all.
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
    reach = min(groups, reach or groups)
    if left * reach < chosen or (groups > 1 and left < 2):
        within = f" in {reach} of {groups} groups" if groups > 1 else ""
        raise InputError(
            f"--drop-experts {share:g} leaves {left * groups} of the {len(scores)} experts of "
            f"{name}, and every token is sent to {chosen}{within}: drop fewer"
        )
    kept: list[int] = []
    for first in range(0, len(scores), size):
        order = sorted(range(first, first + size), key=lambda expert: (-scores[expert], expert))
        kept += sorted(order[:left])
    return kept


def text_config(config: Any) -> Any:
    """Return what a configuration says of the decoder."""
    return config.get_text_config(decoder=True)


def experts_of(config: Any) -> int:
    """Return how many experts a configuration gives every mixture; 0 without."""
    told = text_config(config)
    return next((int(n) for key in COUNTS if (n := getattr(told, key, None))), 0)


def chosen_experts(model: Any, scores: dict[str, list[float]], share: float) -> list[Dropped]:
    """Return which experts every mixture keeps.

    Raises:
        InputError: as `choose`, or mixtures differ in size.
    """
    chosen = experts_per_token(model.config)
    groups = getattr(text_config(model.config), "n_group", None) or 1
    reach = getattr(text_config(model.config), "topk_group", None)
    if len({len(one) for one in scores.values()}) > 1:
        raise InputError("--drop-experts needs as many experts in every mixture")
    return [
        Dropped(name, own, choose(own, share, groups, chosen=chosen, reach=reach, name=name))
        for name, own in scores.items()
    ]


def cut(
    mixtures: Sequence[Mixture], dropped: dict[str, Dropped], tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return a block's tensors, by name in the model, without what belongs to dropped experts."""
    made = dict(tensors)
    renamed: dict[str, Tensor] = {}
    for mixture in mixtures:
        kept, count = dropped[mixture.name].kept, mixture.count
        fused = mixture.experts is None
        owner = mixture.name.rpartition(".")[0] if fused else mixture.name
        for name, value in tensors.items():
            inside = name.removeprefix(f"{owner}.").split(".")
            own = fused and name.startswith(f"{mixture.name}.")
            if not fused and name.startswith(f"{owner}.{EXPERTS}."):
                del made[name]
                if (number := int(inside[1])) in kept:
                    inside[1] = str(kept.index(number))
                    renamed[".".join([owner, *inside])] = value
                continue
            routes = name.startswith(f"{owner}.") and (
                any(part.endswith("router") or part in ROUTERS for part in inside[:-1])
                or inside[-1].endswith("correction_bias")
            )
            if (own or routes) and value.ndim and value.shape[0] == count:
                numbers = torch.tensor(kept, device="cpu" if value.is_meta else value.device)
                made[name] = (
                    value.new_empty(len(kept), *value.shape[1:]) if value.is_meta
                    else value.index_select(0, numbers)
                )  # fmt: skip
    return made | renamed


def unscored(source: StreamedModel) -> set[str]:
    """Return the layers with experts that the model as it is opened lacks, as names begin."""
    found = (re.match(r".*?\.\d+\.", name) for name in source.unknown if f".{EXPERTS}." in name)
    return {layer[0] for layer in found if layer}


def write_dropped(source: StreamedModel, dropped: Sequence[Dropped], folder: Path) -> None:
    """Write a model without the dropped experts, block by block, as a folder that loads.

    Raises:
        ModelError: the architecture holds its experts in a way that cannot be cut.
        InputError: the disk is full.
    """
    by_name = {one.name: one for one in dropped}
    blocks = source.blocks
    files: Files = source.files()
    where = {name: file for file, held in files.items() for name in held}
    layers = tuple(unscored(source))
    inside = {name for name in source.unknown if name.startswith(layers)}
    for name in inside:
        files[where[name]].pop(name)
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
    writer = ShardWriter(folder, {file: held for file, held in files.items() if held})
    for name in source.shards.places:
        if name not in inside:
            writer.write(source.shards.read([name]))
    for index in range(len(blocks)):
        source.fetch(index)
        writer.write(source.as_stored(cut(blocks.mixtures(index), by_name, source.tensors(index))))
        source.drop(index)
    before_config = source.config
    source.config = config = copy.deepcopy(before_config)
    told, count = text_config(config), len(dropped[0].scores)
    for key in COUNTS:
        if getattr(told, key, None) == count:
            setattr(told, key, len(dropped[0].kept))
    if layers and getattr(told, NEXT, None):
        setattr(told, NEXT, 0)
    try:
        source.save(writer, folder)
    finally:
        source.config = before_config
    for path in source.folder.iterdir():
        if path.suffix in (".py", ".jinja") or path.name.endswith("processor_config.json"):
            shutil.copy(path, folder / path.name)
