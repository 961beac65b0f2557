"""The kernel of `calmix.pruning.solvers.columns`. Imported only where Triton is installed."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def columns(  # type: ignore[no-untyped-def]
    weights, mask, errors, upper, inverse, leverage, size, outputs,
    weight_step, mask_step, error_step, upper_step, upper_along,
    SIZE: tl.constexpr, OUTPUTS: tl.constexpr, M: tl.constexpr, GO: tl.constexpr,
    GIVEN: tl.constexpr,
):  # fmt: skip
    """Prune a block of columns of some outputs. Tiles are (columns, outputs).

    The column at hand is read out of a tile as the sum of what is zero elsewhere. Of the factor's
    row only what lies behind the diagonal is read: columns that are done stay as they are.
    """
    column = tl.arange(0, SIZE)
    at = (tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)).to(tl.int64)
    inside = (column < size)[:, None] & (at < outputs)[None, :]
    far = column.to(tl.int64)[:, None]
    tile = tl.load(weights + far * weight_step + at[None, :], mask=inside, other=0.0)
    if GIVEN:
        goes = tl.load(mask + far * mask_step + at[None, :], mask=inside, other=0.0)
    else:
        goes = tl.zeros_like(tile)
        scale = tl.load(leverage + column, mask=column < size, other=0.0)
    for group in range(0, size, M):
        if not GIVEN:
            # An entry's place in its group: how many come before it, ties by column.
            score = tl.abs(tile * scale[:, None])
            place = tl.zeros([SIZE, OUTPUTS], tl.int32)
            for one in tl.static_range(M):
                other = tl.sum(tl.where((column == group + one)[:, None], score, 0.0), 0)[None, :]
                tied = (other == score) & (group + one < column)[:, None]
                place += ((other < score) | tied).to(tl.int32)
            own = (column >= group) & (column < group + M)
            goes = tl.where(own[:, None], (place < GO).to(tl.float32), goes)
        for j in range(group, group + M):
            held = tl.sum(tl.where((column == j)[:, None], tile * goes, 0.0), 0)
            wrong = held * tl.load(inverse + j)
            tl.store(errors + j * error_step + at, wrong, mask=at < outputs)
            behind = (column > j) & (column < size)
            row = tl.load(upper + j * upper_step + column * upper_along, mask=behind, other=0.0)
            tile -= row[:, None] * wrong[None, :]
    tl.store(weights + far * weight_step + at[None, :], tile, mask=inside)
    if not GIVEN:
        tl.store(mask + far * mask_step + at[None, :], goes, mask=inside)
