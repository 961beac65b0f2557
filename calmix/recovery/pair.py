"""A pruned model and the dense one it was pruned from, looked at tensor by tensor."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from calmix.errors import InputError
from calmix.evaluation.likelihood import behind
from calmix.models.blocks import EXPERTS
from calmix.models.streaming import StreamedModel
from calmix.pruning.expert_pruning import experts_of

LEAST = 0.01  # share of zeros below which a model is not sparse
APART = 0.5  # relative distance of embeddings beyond which a model is another one
ROWS = 4096  # of the embeddings that are compared at a time


@dataclass(frozen=True)
class Pair:
    """A pruned model and the dense one it came from, their blocks on disk.

    `masked` are the names in the pruned model of the linear maps whose zeros stay (one may be that
    of all experts), `weights` and `zeros` how many they hold.
    """

    pruned: StreamedModel
    dense: StreamedModel
    masked: frozenset[str]
    weights: int
    zeros: int


def compare(pruned: StreamedModel, dense: StreamedModel) -> Pair:
    """Return the pair, or refuse it. The pruned one may lack experts, as dropping them does."""
    kinds = [type(m.model).__name__ for m in (pruned, dense)]
    line = f"{pruned.name} was not pruned from {dense.name}"
    if kinds[0] != kinds[1]:
        raise InputError(f"{line}: it is a {kinds[0]}, the dense model a {kinds[1]}")
    own, other = ({n: tuple(p.shape) for n, p in m.model.named_parameters()}
                  for m in (pruned, dense))  # fmt: skip
    kept, count = (experts_of(m.model.config) for m in (pruned, dense))
    for name in dict.fromkeys([*own, *other]):
        shapes = own.get(name), other.get(name)
        if shapes[0] != shapes[1] and not (kept < count and _dropped(name, *shapes, kept, count)):
            here, there = (shape or "none" for shape in shapes)
            raise InputError(f"{line}: {name} is {here}, and {there} in the dense model")
    if not _near(pruned, dense):
        raise InputError(f"{line}: their embeddings are of different models")
    masked = {
        one.parameter_name
        for index in range(len(pruned.blocks))
        for one in pruned.blocks.prunables(index)
    }
    weights = zeros = 0
    for name in masked:
        value = pruned.stored(name)
        weights += value.numel()
        zeros += int((value == 0).sum())
    if zeros < LEAST * weights and kept == count:
        raise InputError(
            f"{pruned.name} is not sparse ({zeros / weights:.2%} of its linear maps' weights are "
            "zero): prune it first"
        )
    return Pair(pruned, dense, frozenset(masked), weights, zeros)


def _dropped(
    name: str, own: tuple[int, ...] | None, other: tuple[int, ...] | None, kept: int, count: int
) -> bool:
    """Whether a parameter differs as it does where some of the experts were dropped."""
    if own is None:
        number = re.search(rf"\.{EXPERTS}\.(\d+)\.", name)
        return number is not None and int(number[1]) >= kept
    return other is not None and own == (kept, *own[1:]) and other == (count, *own[1:])


def _near(pruned: StreamedModel, dense: StreamedModel) -> bool:
    """Whether the embeddings of both models are about the same."""
    embedded = pruned.model.get_input_embeddings().weight
    named = next(n for n, p in pruned.model.named_parameters() if p is embedded)
    ours, theirs = (m.shards.read([m.names[named]])[m.names[named]] for m in (pruned, dense))
    apart = size = 0.0
    for rows, others in zip(ours.split(ROWS), theirs.split(ROWS), strict=True):
        apart += float((rows.float() - others.float()).square().sum())
        size += float(others.float().square().sum())
    return apart <= APART**2 * size


def same_head(pair: Pair) -> bool:
    """Whether both models have the same output head, so that one serves for both."""
    values = []
    for streamed in (pair.pruned, pair.dense):
        own = {id(p): n for n, p in streamed.model.named_parameters(remove_duplicate=False)}
        head, embedding = (
            [own[id(p)] for p in part.parameters()]
            for part in (streamed.model.get_output_embeddings(),
                         streamed.model.get_input_embeddings())
        )  # fmt: skip
        # What the files do not hold is tied to the embedding.
        stored = [streamed.names.get(n) or streamed.names[embedding[0]] for n in head]
        stored += [streamed.names[n] for n in behind(streamed.model) if n in streamed.names]
        values.append([streamed.shards.read([name])[name] for name in stored])
    return all(
        torch.equal(ours, theirs.to(ours.dtype)) for ours, theirs in zip(*values, strict=True)
    )
