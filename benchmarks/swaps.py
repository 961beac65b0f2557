"""Whether a mask gets better by swaps of kept and pruned weights, before a refit and after it.

    python benchmarks/swaps.py [--model ...] [--every 7] [--rows 16] [--target 0.6] [--swaps 100]
        [--sample 128]

Layers of every k-th block are pruned on Gram matrices of the dense model, and so many rows of each
looked at. With D the weights that a mask removes and C = D G, pruning u and restoring p in one row
changes its loss by

    2 w_u c_u + w_u^2 G_uu - 2 w_p c_p + w_p^2 G_pp - 2 w_u w_p G_up

and the best of the pairs of 32 by 32 whose own terms are least is taken while it is negative, N:M
within groups of M. Masks are those of a saliency or a solver, on weights as they came. Printed is
the mean share of output energy lost, on the same Gram matrices and on those of held-out rows: of
the mask as it is (`mask`), with a refit (`refit`), after swaps alone and with a refit behind them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import commit, machine
from keep_more import MIX
from safetensors.torch import load_file
from torch import Tensor

import calmix
from calmix.analysis.predict import every_block, keep_grams
from calmix.models import find_blocks
from calmix.pruning.gram import Gram, relative_error
from calmix.pruning.methods import get_method
from calmix.pruning.patterns import SemiStructured, as_pattern
from calmix.pruning.solvers.refit import refit

AT_ONCE = 32  # candidates of each side
METHODS = ("wanda", "ria", "sparsegpt", "admm")
WAYS = ("mask", "refit", "swaps", "both")


def swapped(weight: Tensor, kept: Tensor, gram: Tensor, most: int, m: int) -> tuple[Tensor, float]:
    """Return a better mask of kept weights, and swaps a row.

    Args:
        weight: float32 (rows, columns), as it came.
        kept: bool of the same shape; rows keep as many as they have.
        gram: float32 (columns, columns).
        most: swaps a row.
        m: of an N:M pattern, whose groups keep as many as they have; 1 otherwise.
    """
    kept, square = kept.clone(), weight.square() * gram.diagonal()
    linear = (weight * ~kept) @ gram
    rows = torch.arange(len(weight))
    count = min(AT_ONCE, int(kept.sum(1).min()), int((~kept).sum(1).min()))
    swaps = 0
    for _ in range(most):
        change = 2 * weight * linear
        prune = (change + square).masked_fill(~kept, torch.inf)
        restore = (square - change).masked_fill(kept, torch.inf)
        cost_u, u = prune.topk(count, largest=False)
        cost_p, p = restore.topk(count, largest=False)
        each = cost_u[:, :, None] + cost_p[:, None, :]
        pair = weight.gather(1, u)[:, :, None] * weight.gather(1, p)[:, None, :]
        each -= 2 * pair * gram[u[:, :, None], p[:, None, :]]
        if m > 1:
            each.masked_fill_(u[:, :, None] // m != p[:, None, :] // m, torch.inf)
        best, at = each.flatten(1).min(1)
        better = rows[best < -1e-6 * square.sum(1)]
        if not len(better):
            break
        out, back = u[better, at[better] // count], p[better, at[better] % count]
        kept[better, out], kept[better, back] = False, True
        gone, came = weight[better, out, None] * gram[out], weight[better, back, None] * gram[back]
        linear[better] += gone - came
        swaps += len(better)
    return kept, swaps / len(weight)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--calibration", default=MIX)
    parser.add_argument("--every", type=int, default=7)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--target", default="0.6")
    parser.add_argument("--swaps", type=int, default=100)
    parser.add_argument("--sample", type=int, default=128)
    options = parser.parse_args()
    target = options.target
    pattern = as_pattern(target)
    m = pattern.m if isinstance(pattern, SemiStructured) else 1
    opened = calmix.open_model(options.model)
    drawn = calmix.resolve(options.calibration, opened, rows=2 * options.rows, length=512)
    halves = drawn.ids[0::2], drawn.ids[1::2]
    only = every_block(opened, options.every)
    with tempfile.TemporaryDirectory() as folder:
        grams, others = (load_file(keep_grams(opened, ids, only, Path(folder))) for ids in halves)
    found = find_blocks(opened.model)
    layers = {one.name: one for at in range(len(found)) for one in found.prunables(at)}
    lost = {method: {way: [0.0, 0.0] for way in WAYS} for method in METHODS}
    moved, seconds, total = dict.fromkeys(METHODS, 0.0), dict.fromkeys(METHODS, 0.0), 0
    for inputs, gram in grams.items():
        gram, other = gram * halves[0].numel(), others[inputs]
        for name in inputs.split(","):
            whole, total = layers[name].view().detach().float(), total + 1
            chosen = torch.linspace(0, len(whole) - 1, min(options.sample, len(whole))).long()
            weight = whole[chosen]
            for key in METHODS:
                method = get_method(key, **({"refit": 0} if key == "admm" else {}))
                statistic = gram.clone() if method.needs is Gram else gram.diagonal().clone()
                (first,) = method.solve([whole], statistic, [pattern]).weights
                first = first[chosen]
                began = time.perf_counter()
                kept, swaps = swapped(weight, first != 0, gram, options.swaps, m)
                seconds[key] += time.perf_counter() - began
                moved[key] += swaps
                starts = {"mask": first, "swaps": weight * kept}
                made = dict(starts)
                for way, start in zip(("refit", "both"), starts.values(), strict=True):
                    (made[way],) = refit([weight], [start], gram)
                for way in WAYS:
                    for at, of in enumerate((gram, other)):
                        lost[key][way][at] += float(relative_error(weight, made[way], of))
            print(f"{name} done", file=sys.stderr, flush=True)
    print(f"{machine()}, commit {commit()}")
    print(f"{options.model}, {target}, {total} layers, {options.rows} x 512\n")
    print(f"{'':<11}" + "".join(f"{way:>17}" for way in WAYS) + "   swaps a row  s")
    for key in METHODS:
        cells = (f"{lost[key][w][0] / total:8.4f} {lost[key][w][1] / total:8.4f}" for w in WAYS)
        print(f"{key:<11}" + "".join(cells) + f"{moved[key] / total:12.1f} {seconds[key]:5.0f}")


if __name__ == "__main__":
    main()
