"""Whether two models are a dense one and a pruning of it, looked at tensor by tensor."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from calmix.calibration import OpenTokenizer
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
    """A pruned model and the dense one it came from, nothing of either in memory.

    Attributes:
        pruned, dense: both, with their blocks on disk.
        masked: names in the pruned model of the linear maps whose zeros stay; one may be that of
            all experts.
        weights, zeros: how many they hold.
    """

    pruned: StreamedModel
    dense: StreamedModel
    masked: frozenset[str]
    weights: int
    zeros: int

    def stored(self, name: str) -> Tensor:
        """Return a parameter of the pruned model as it is stored."""
        return self.pruned.stored(name)


def compare(pruned: StreamedModel, dense: StreamedModel) -> Pair:
    """Return the pair, or refuse it.

    The pruned one may lack experts, as a drop leaves it.

    Raises:
        InputError: the models differ in architecture or shapes, their embeddings are of different
            models, or the pruned one is not sparse and has all experts.
    """
    kinds = [type(m.model).__name__ for m in (pruned, dense)]
    line = f"{pruned.name} was not pruned from {dense.name}"
    if kinds[0] != kinds[1]:
        raise InputError(f"{line}: it is a {kinds[0]}, and that a {kinds[1]}")
    own, other = ({n: tuple(p.shape) for n, p in m.model.named_parameters()}
                  for m in (pruned, dense))  # fmt: skip
    kept, count = (experts_of(m.model.config) for m in (pruned, dense))
    for name in dict.fromkeys([*own, *other]):
        if own.get(name) != other.get(name) and not _dropped(
            name, own.get(name), other.get(name), kept, count
        ):
            shapes = [s.get(name, "none") for s in (own, other)]
            raise InputError(f"{line}: {name} is {shapes[0]} there, and {shapes[1]} in the other")
    embedded = pruned.model.get_input_embeddings().weight
    named = next(n for n, p in pruned.model.named_parameters() if p is embedded)
    ours, theirs = (m.shards.read([m.names[named]])[m.names[named]] for m in (pruned, dense))
    apart = size = 0.0
    for rows, others in zip(ours.split(ROWS), theirs.split(ROWS), strict=True):
        apart += float((rows.float() - others.float()).square().sum())
        size += float(others.float().square().sum())
    del ours, theirs
    if not apart <= APART**2 * size:
        raise InputError(f"{line}: their embeddings are of different models")
    masked: list[str] = []
    weights = zeros = 0
    for index in range(len(pruned.blocks)):
        for name in dict.fromkeys(one.parameter_name for one in pruned.blocks.prunables(index)):
            value = pruned.stored(name)
            masked.append(name)
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
    """Tell whether a parameter differs as it does where some of the experts were dropped."""
    if kept >= count or other is None:
        return False
    if own is None:
        number = re.search(rf"\.{EXPERTS}\.(\d+)\.", name)
        return number is not None and int(number[1]) >= kept
    return own[1:] == other[1:] and (own[:1], other[:1]) == ((kept,), (count,))


def same_head(pair: Pair) -> bool:
    """Tell whether both models have the same output head, so that one serves for both."""
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
    types = [value.dtype for value in values[0]]
    return all(
        torch.equal(ours, theirs.to(dtype))
        for ours, theirs, dtype in zip(*values, types, strict=True)
    )


def check_tokenizers(pruned: OpenTokenizer, dense: OpenTokenizer) -> None:
    """Refuse models that do not read text alike.

    Raises:
        InputError: their tokenizers differ.
    """
    if pruned.tokenizer_fingerprint != dense.tokenizer_fingerprint:
        raise InputError(
            f"{pruned.name} has another tokenizer than {dense.name}: it was not pruned from it"
        )


def check_zeros(pair: Pair, name: str, value: Tensor) -> int:
    """Return how many zeros of the pruned weight there were; all must still be zero."""
    zero = pair.stored(name) == 0
    assert not value.cpu()[zero].any(), f"a zero of {name} has changed"
    return int(zero.sum())
