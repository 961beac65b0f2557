"""Large products, and the solvers made of them: as PyTorch makes them, and as calmix asks for them.

    python benchmarks/products.py [--repeats 5]

Two Markdown tables. Rates are of square matrices, with the largest error of an entry beside
float64 over the largest entry. Solvers work on the Gram matrix of correlated inputs and random
weights of as many rows; seconds are processor time, `lost` is the share of output energy, in per
cent.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from common import commit, machine
from torch import Tensor

from calmix import precision
from calmix.pruning.gram import relative_error
from calmix.pruning.methods import get_method
from calmix.pruning.patterns import Unstructured

ORDERS = (576, 1536, 2048)
METHODS = ("sparsegpt", "admm", "wanda,refit=10")


def fastest(work: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Return processor seconds of the fastest of some runs, and what it makes."""
    seconds = []
    made = work()
    for _ in range(repeats):
        began = time.process_time()
        made = work()
        seconds.append(time.process_time() - began)
    return min(seconds), made


def as_pytorch() -> Any:
    """Let every product be made as PyTorch makes it, unless it may be rounded on the way."""
    return patch.object(precision, "_bfloat16_alone", lambda: False)


def rate(order: int, product: Callable[[Tensor, Tensor], Tensor], repeats: int) -> str:
    torch.manual_seed(0)
    left, right = torch.randn(order, order), torch.randn(order, order)
    exact = left.double() @ right.double()
    seconds, made = fastest(lambda: product(left, right), repeats)
    off = ((made - exact).abs().max() / exact.abs().max()).item()
    return f"{2e-9 * order**3 / seconds:.0f} | {off:.0e}"


def may_round(left: Tensor, right: Tensor) -> Tensor:
    with precision.bfloat16_products():
        return left @ right


def halves(left: Tensor, right: Tensor) -> Tensor:
    return left.bfloat16() @ right.bfloat16()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="the fastest is taken")
    repeats = parser.parse_args().repeats
    print(f"{machine()}, commit {commit()}\n")
    print("| order | float32: GFLOP/s | error | may be rounded | error | bfloat16 | error |")
    print("|---|---|---|---|---|---|---|")
    for order in ORDERS:
        cells = [rate(order, way, repeats) for way in (torch.mm, may_round, halves)]
        print(f"| {order} | {' | '.join(cells)} |")
    print("\n| order | method | as PyTorch: s | lost | as calmix: s | lost |")
    print("|---|---|---|---|---|---|")
    for order in ORDERS:
        torch.manual_seed(0)
        x = torch.randn(3 * order, order) @ (torch.randn(order, order) / order**0.5)
        gram, weight = x.T @ x, torch.randn(order, order).bfloat16()
        for name in METHODS:
            method, cells = get_method(name), []
            for way in (as_pytorch(), nullcontext()):
                with way, precision.bfloat16_products(allowed=False):
                    seconds, solved = fastest(
                        lambda: method.solve([weight], gram.clone(), [Unstructured(0.6)]),  # noqa: B023
                        repeats,
                    )
                lost = float(relative_error(weight, solved.weights[0], gram))
                cells += [f"{seconds:.2f}", f"{100 * lost:.2f}"]
            print(f"| {order} | {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
