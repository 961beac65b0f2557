"""ADMM: mask and weights together, by alternating directions on the Gram matrix, then a refit.

Boza (arXiv 2401.02938) and ALPS (arXiv 2406.07831) split the problem into a least-squares step
and a projection onto sparse matrices. The form of the iteration, the schedule, the sampled
thresholds and the final conjugate gradients on a fixed mask are ours.

In scaled coordinates (see solvers/refit.py and `by_own_part`), with H the scaled Gram matrix plus
damping:

    minimise tr((W - X) H (W - X)^T) over X = Z, Z sparse

With T = X + U, the iterations X = (W H + rho (Z - U)) (H + rho)^-1, Z = project(X + U),
U = U + X - Z become one line (Douglas-Rachford splitting):

    Z = project(T),  T = Z + (T + W - 2 Z) Q,  Q = (H + rho)^-1 H

For unstructured patterns the share projected away rises to the target over the iterations, with
thresholds from a sample of the layer; the last projection is exact. N:M patterns are projected in
full from the start: a gradual schedule measured worse. Comparing within rows instead of the whole
layer loses 13 % more on the builtin model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from calmix.precision import add_rounded_product, bfloat16_products, rounded
from calmix.pruning.gram import Gram, inverse_factor, squared
from calmix.pruning.methods.base import Refit, Solution, Sparse, sampled
from calmix.pruning.patterns import Pattern, clear
from calmix.pruning.solvers.refit import Scaled, chunks, refit_layer, scale

RIDGE = 0.6  # added to unit square sums when an input is regressed on the others
OWN_SHARE = 1e-3  # minimum share of an input's square sum that counts as its own
SCHEDULE_POWER = 4  # of the schedule: the pruned share rises as 1 - (1 - t)^4
SAMPLE = 2**14  # weights sampled for a threshold


class Admm(Sparse):
    """Prune by alternating directions on the Gram matrix, and refit the kept weights."""

    name, title = "admm", "ADMM"
    paper = "arXiv 2401.02938, arXiv 2406.07831"
    statistic = Gram
    refits = True
    work = 15, 20  # scaled and reordered Gram matrix, factorisation; state, target, mask

    iterations: int = Field(default=24, ge=1, le=1000, description="Iterations to find the mask.")
    refit: Refit = 8
    rho: float = Field(  # below 0.8 the search overshoots
        default=1.0, gt=0, allow_inf_nan=False, description="Penalty weight of the splitting (rho)."
    )
    damping: float = Field(
        default=0.001,
        gt=0,
        allow_inf_nan=False,
        description="Fraction of each input's unexplained part added to the diagonal.",
    )

    def choose(
        self, weights: Sequence[Tensor], statistic: Tensor, patterns: Sequence[Pattern]
    ) -> Solution:
        """Prune and refit, both in coordinates scaled by `by_own_part`."""
        scaled, m = by_own_part(scale(statistic)), patterns[0].group
        gram, mean = scaled.gram, float(scaled.gram.diagonal().mean())
        # The j-th columns of all groups form one panel.
        order = torch.arange(len(gram), device=gram.device).view(-1, m).T.reshape(-1)
        ordered = gram if m == 1 else gram[order][:, order]
        factor = inverse_factor(ordered, (self.damping + self.rho) / mean)
        del ordered
        # Q = I - rho (H + rho)^-1. A raised damping only adds damping; the penalty is unchanged.
        used = self.damping + (factor.raised - 1) * (self.damping + self.rho)
        with bfloat16_products():  # like the steps that use it
            reflector = squared(factor.upper).mul_(-self.rho)
        del factor
        reflector.diagonal().add_(1)
        reflector = rounded(reflector)
        pairs = zip(weights, patterns, strict=True)
        starts = [self._search(one, order, scaled, reflector, pattern) for one, pattern in pairs]
        del reflector
        solved = [
            refit_layer(weight, starts.pop(0), scaled, steps=self.refit, damping=used)
            for weight in weights
        ]
        counts = self.counts(weights, patterns)
        return Solution(solved, counts, used, torch.float32, scaled.dead)

    def _search(
        self, weight: Tensor, order: Tensor, scaled: Scaled, reflector: Tensor, pattern: Pattern
    ) -> Tensor:
        """Return one layer's weights in their type, pruned but not refitted."""
        norm, semi = scaled.norm[order], pattern.group > 1
        target = weight[:, order].float().contiguous().mul_(norm)
        state = target.clone()
        for number in range(1, self.iterations + 1):
            if not semi:
                time = number / (self.iterations + 1)
                bound = _bound(state, pattern.sparsity * (1 - (1 - time) ** SCHEDULE_POWER))
            for rows in chunks(state):
                part = state[rows]
                if semi:
                    sparse = part.addcmul(part, _in_panels(part, pattern), value=-1)
                elif part.device.type == "cpu":
                    sparse = functional.hardshrink(part, bound.item())
                else:
                    sparse = torch.where(part.abs() > bound, part, 0)
                step = torch.add(part, target[rows]).sub_(sparse, alpha=2)
                add_rounded_product(sparse, step, reflector, part)
        del target
        mask = _in_panels(state, pattern) if semi else pattern.mask(state.abs()).to(state.dtype)
        state.mul_(scaled.inverse[order])
        # Weights of dead inputs are kept unchanged.
        state = torch.where(norm == 0, weight[:, order].float(), state)
        clear(state, mask)
        solved = torch.empty_like(weight, memory_format=torch.contiguous_format)
        solved[:, order] = state.to(weight.dtype)
        return solved


def by_own_part(scaled: Scaled) -> Scaled:
    """Rescale inputs so that the part unexplained by the other inputs has norm one; in place. Ours.

    With inputs of norm one, c_j = 1 / ((G + r)^-1)_jj - r is the squared residual of a ridge
    regression of input j on the others. It is small where inputs share a mean or one large
    direction. With penalty and threshold in units of the norms, the search would only see that
    shared part and end behind SparseGPT, whose saliency uses these c_j with r near zero.
    """
    gram = scaled.gram
    mean = float(gram.diagonal().mean())
    factor = inverse_factor(gram, RIDGE / mean)
    ridge = RIDGE * factor.raised
    own = factor.upper.square_().sum(0).reciprocal_().sub_(ridge).clamp_(OWN_SHARE, 1).sqrt_()
    del factor
    gram.div_(own[:, None]).div_(own)
    return Scaled(gram, scaled.norm * own, scaled.inverse / own, scaled.dead)


def _bound(state: Tensor, share: float) -> Tensor:
    """Return the magnitude that about `share` of a layer's entries do not exceed."""
    sample = sampled(state, SAMPLE).abs()
    count = round(share * len(sample))
    if not count:
        return sample.new_zeros(())
    if sample.device.type != "cpu":
        return sample.sort().values[count - 1]
    # NumPy selects with SIMD instructions: twenty times faster than kthvalue.
    return torch.from_numpy(np.partition(sample.numpy(), count - 1))[count - 1]


def _in_panels(state: Tensor, pattern: Pattern) -> Tensor:
    """Return 1.0 where an N:M pattern prunes, else 0.0; columns are in panel order."""
    panels = state.abs().view(len(state), pattern.group, -1).transpose(0, 1)
    mask = pattern.group_mask(panels)
    return mask.transpose(0, 1).to(state.dtype).reshape(state.shape)
