"""SparseGPT's loop over the columns of a block as one kernel, written in Triton.

Where starting a kernel takes longer than a column's arithmetic, the loop runs within one: a program
takes some outputs, holds their weights of the block in registers, and goes from column to column.
The reference is the plain loop in `calmix.pruning.methods.sparsegpt`, and what is used where Triton
is not installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from calmix.machine import tried

OUTPUTS = 32  # of one program
LARGEST = 8  # M of an N:M pattern: comparisons with each of a group are written out


def tile(size: int) -> tuple[int, int]:
    """Return the columns of a tile that holds so many, and the warps that share its registers.

    A thread has 32 values: with twice as many they spill into memory.
    """
    columns = 1 << (size - 1).bit_length()
    return columns, max(1, columns * OUTPUTS // (32 * 32))


@torch.library.custom_op("calmix::prune_columns", mutates_args=("weights", "mask"))
def prune_columns(
    weights: Tensor, mask: Tensor, upper: Tensor, inverse: Tensor, leverage: Tensor, m: int, go: int
) -> Tensor:
    """Prune one block of columns in place and return the scaled errors, of the same shape.

    Args:
        weights: float32 (columns, outputs), corrected in place; those that go are the caller's to
            clear.
        mask: float32, same shape: 1.0 where a weight goes; given, or filled if `m` is not 0.
        upper: float32 (columns, columns), that part of the factor.
        inverse: 1 / its diagonal, (columns, 1).
        leverage: what weights are multiplied by to compare them, (columns, 1).
        m: size of the groups in which a mask is chosen; 0 if it is given.
        go: how many of each group go.
    """
    from calmix.pruning.solvers.kernel import columns

    size, outputs = weights.shape
    whole, warps = tile(size)
    errors = torch.empty_like(weights)
    assert weights.stride(1) == mask.stride(1) == errors.stride(1) == 1
    with torch.cuda.device_of(weights):  # Triton starts on the current one
        columns[(-(-outputs // OUTPUTS),)](
            weights, mask, errors, upper, inverse.contiguous(), leverage.contiguous(),
            size, outputs, weights.stride(0), mask.stride(0), errors.stride(0), *upper.stride(),
            SIZE=whole, OUTPUTS=OUTPUTS, M=m or 1, GO=go, GIVEN=m == 0,
            num_warps=warps, enable_fp_fusion=True,  # whatever a version of Triton does by itself
        )  # fmt: skip
    return errors


@prune_columns.register_fake
def _(
    weights: Tensor, mask: Tensor, upper: Tensor, inverse: Tensor, leverage: Tensor, m: int, go: int
) -> Tensor:
    return torch.empty_like(weights)


def usable(device: torch.device, size: int, m: int, go: int, check: Callable[..., bool]) -> bool:
    """Tell whether the kernel runs on a device, and does there what the plain loop does."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    return tried("the kernel for SparseGPT", device, check, size, m, go)
