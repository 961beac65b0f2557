"""Calibration rows that are not fitted: they judge what a solver did, and whether it helped.

A solver's error on its own rows says how closely it fits them: in wide layers it can be half of
that on other text. One row in 16 is therefore left out of every Gram matrix. A layer whose
corrected weights lose more on these rows than without correction is left uncorrected.

They also say how far a layer's weights should move to make up for the errors of the layers before
it: half of what would bring its outputs nearest to the dense model's (ours; all of it fits the
outputs better, and the model worse).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from calmix.precision import bfloat16_products
from calmix.pruning.gram import Factor
from calmix.pruning.methods import Method, Solution
from calmix.pruning.methods.base import Quantiser, Saliency, Sparse, by_kind
from calmix.pruning.methods.ggml import Ggml
from calmix.pruning.methods.wanda import Wanda
from calmix.pruning.patterns import Pattern

SHARE = 16  # one in so many rows is held out, of experts one in so many tokens
STORED_TOKENS = 1024  # stored of them per input
JUDGING_TOKENS = 64  # that can judge a layer
SAMPLED_OUTPUTS = 64  # outputs of a layer solved without correction, to compare
# Error on these tokens over that on the fitted ones, from which layers are compared.
DOUBTFUL = 1.25
MOVE_SHARE = 0.5  # of the moves that would be best for a layer's outputs
PER_MOVE = 8  # tokens for each input from which layers make up for the errors of earlier ones
PER_INPUT = 4  # tokens for each input of a layer: twice as many lose another 5 to 12 % less (ours)


def held_out_rows(rows: int, sources: Sequence[str] = ()) -> list[int]:
    """Return the rows held out, spread over the sources; none of fewer than 16."""
    order = sorted(range(rows), key=lambda row: sources[row]) if sources else [*range(rows)]
    return sorted(order[SHARE // 2 :: SHARE]) if rows >= SHARE else []


def widest_to_move(tokens: int) -> int:
    """Return the most inputs of a layer for which there are tokens enough to make up for the errors
    of earlier ones."""
    return tokens // PER_MOVE


def rows_needed(columns: int, length: int, per_input: int = PER_INPUT) -> int:
    """Return the rows of `length` tokens that a layer with so many inputs needs."""
    return -(-per_input * columns // length)


class HeldOut:
    """Inputs of a layer on tokens that are not fitted, weighted as the others are.

    Args:
        spacing: one token in so many is stored.
    """

    def __init__(self, spacing: int = 1) -> None:
        self.spacing = spacing
        self._parts: list[Tensor] = []
        self._dense: list[Tensor] = []  # the same inputs in the dense model, if they are known

    def add(self, inputs: Tensor, dense: Tensor | None = None) -> None:
        """Add tokens: inputs of shape (..., columns), any float dtype."""
        for parts, one in ((self._parts, inputs), (self._dense, dense)):
            if one is not None:
                parts.append(one.reshape(-1, one.shape[-1])[:: self.spacing].clone())

    @property
    def judges(self) -> bool:
        """Whether there are enough tokens to judge a layer."""
        return sum(map(len, self._parts)) >= JUDGING_TOKENS

    def error(self, weight: Tensor, changed: Tensor) -> float:
        """Return the share of the output energy on these tokens that is lost.

        Args:
            weight, changed: (rows, columns), wanted and stored.
        """
        lost, whole = torch.zeros(2, device=weight.device).unbind()
        dense = weight.float()
        change = dense - changed
        with bfloat16_products():
            for part in self._parts:
                inputs = part.float()
                lost += (inputs @ change.T).square_().sum()
                whole += (inputs @ dense.T).square_().sum()
        return float(lost / whole) if whole else 0.0

    def apart(self, weight: Tensor, changed: Tensor) -> float:
        """Return the squared distance of the outputs on these tokens from the dense model's.

        Args:
            weight, changed: (rows, columns), dense and stored.
        """
        lost, dense = torch.zeros((), device=weight.device), weight.float()
        change = dense - changed
        with bfloat16_products():
            for at, part in enumerate(self._parts):
                outputs = part.float() @ change.T
                if self._dense:  # subtracted first: products are rounded
                    outputs += (self._dense[at].float() - part.float()) @ dense.T
                lost += outputs.square_().sum()
        return float(lost)

    def share(self, weights: Sequence[Tensor], moves: Sequence[Tensor]) -> float:
        """Return which share of their moves (`Cross.moves`) layers of one input should make; 0 if
        there are too few tokens."""
        along, whole = torch.zeros(2, device=weights[0].device).unbind()
        if not self.judges:
            return 0.0
        with bfloat16_products():
            for part, dense in zip(self._parts, self._dense, strict=True):
                inputs, missing = part.float(), dense.float() - part.float()
                for weight, move in zip(weights, moves, strict=True):
                    moved = inputs @ move.T
                    along += (moved * (missing @ weight.float().T)).sum()
                    whole += moved.square_().sum()
        return MOVE_SHARE * min(max(float(along / whole), 0.0), 1.0) if whole else 0.0


def uncorrected(
    method: Method, weights: Sequence[Tensor], squares: Tensor, patterns: Sequence[Pattern]
) -> Solution | None:
    """Return layers pruned by Wanda or rounded, where no weight makes up for another's error; None
    if this is not known of a method.

    Args:
        squares: sum of squares of each input, (columns,).
    """
    if isinstance(method, Sparse):
        masking = method if isinstance(method, Saliency) else Wanda()
        solved = by_kind(masking.choose, weights, squares, patterns)
        if not method.bits:
            return solved
        return method.rounded(solved, _diagonal_factor(squares, method.rounding_damping))
    if isinstance(method, Ggml):
        return method.solve_alone(weights, squares, patterns)
    if isinstance(method, Quantiser):
        return method.solve_factored(weights, _diagonal_factor(squares, method.damping), patterns)
    return None


def _diagonal_factor(squares: Tensor, damping: float) -> Factor:
    """Return the factor of a Gram matrix whose inputs do not depend on one another."""
    own = (squares + damping * squares.mean()).rsqrt()
    return Factor(torch.diag(own), damping, torch.float32, squares == 0)


def checked(
    method: Method,
    weights: Sequence[Tensor],
    solution: Solution,
    squares: Tensor,
    patterns: Sequence[Pattern],
    held_out: HeldOut,
    doubtful: Sequence[int],
) -> tuple[Solution, list[int]]:
    """Return the solution, and which of the doubtful layers are replaced by uncorrected ones, which
    lose less on tokens that were not fitted.

    Some outputs of each layer are compared first.
    """
    if not doubtful:
        return solution, []
    steps = [-(-len(weights[at]) // SAMPLED_OUTPUTS) for at in doubtful]
    some = [weights[at][::step] for at, step in zip(doubtful, steps, strict=True)]
    plain = uncorrected(method, some, squares, [patterns[at] for at in doubtful])
    if plain is None:
        return solution, []
    replaced = list[int]()
    solved, pruned, grids = [*solution.weights], [*solution.pruned], [*solution.grids]
    for number, at in enumerate(doubtful):
        weight, sample = weights[at], some[number]
        sample_distance = held_out.apart(sample, plain.weights[number])
        if held_out.apart(sample, solved[at][:: steps[number]]) <= sample_distance:
            continue
        alone = uncorrected(method, [weight], squares, [patterns[at]])
        assert alone is not None
        if held_out.apart(weight, solved[at]) > held_out.apart(weight, alone.weights[0]):
            replaced.append(at)
            [solved[at]], [pruned[at]] = alone.weights, alone.pruned
            grids[at : at + 1] = alone.grids
    return replace(solution, weights=solved, pruned=pruned, grids=grids), replaced
