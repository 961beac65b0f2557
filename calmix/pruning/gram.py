"""Statistics of a layer's inputs over calibration tokens: the Gram matrix, sum of x x^T, its
Cholesky factor and its diagonal.

Inputs may be half precision; sums are always float32. A Gram matrix rounded to half precision
is not positive definite, so half-precision products are never accumulated.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from calmix.errors import SolverError
from calmix.memory import LAYER_ENTRIES
from calmix.precision import bfloat16_products, large_products, widest

CONVERTED_TOKENS = 2048  # tokens converted to float32 at a time: they fit in the L2 cache
SQUARED_ROWS = 256  # the same for sums of squares, which read each value once
LEAF = 144  # columns of a block that LAPACK factorises on a CPU; elsewhere `ACCELERATOR_PANEL`
TRIANGLE_PANEL = 256  # columns of a triangle computed in one product, on a CPU
ACCELERATOR_PANEL = 2048  # elsewhere: each product launches a kernel, and large ones are fast
PROBES = 8  # random vectors that estimate the norm of a row's Gram matrix
MOST_SHRINKAGE = 1.0  # of the mean diagonal, added to the diagonal
OUTPUTS = 512  # rows of a layer processed at a time: a fast product, little extra memory
# Precision and multiple of the requested damping, tried in turn until the factor exists.
ATTEMPTS = (
    (torch.float32, 1),
    (torch.float32, 10),
    (torch.float64, 10),
    (torch.float64, 100),
)


class Statistic(ABC):
    """What a method needs of a layer's inputs: a float32 sum over all calibration tokens.

    Sums over several sets of tokens add up. The default is a vector.

    Args:
        columns: width of the input.
        device: of the inputs and the statistic.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self.sum = torch.zeros(self.shape(columns), device=device)

    @staticmethod
    def shape(columns: int) -> tuple[int, ...]:
        """Return the shape of the sum."""
        return (columns,)

    @abstractmethod
    def add(self, inputs: Tensor) -> None:
        """Add tokens: inputs of shape (..., columns), any float dtype."""

    def matrix(self) -> Tensor:
        """Return the sum; nothing is added afterwards."""
        return self.sum

    def merge(self, other: Statistic, share: float) -> None:
        """Add another sum, times a share."""
        self.sum.add_(other.sum, alpha=share)

    @classmethod
    def memory(cls, columns: int) -> int:
        """Return the size in bytes."""
        return 4 * math.prod(cls.shape(columns))


class Gram(Statistic):
    """Running sum of x x^T in float32; only the upper triangle is computed. Inputs are (...,
    tokens, columns): without a dimension of rows, all tokens are of one.

    Attributes:
        squares: estimate of the sum over rows of ||G_r||^2, G_r the Gram matrix of a row's tokens.
        rows: how many were added.
        merged: variance of the sum once another was added, else None.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        super().__init__(columns, device)
        self.squares = torch.zeros((), dtype=widest(device), device=device)
        self.rows = 0
        self.merged: float | None = None

    @staticmethod
    def shape(columns: int) -> tuple[int, ...]:
        return columns, columns

    @cached_property
    def _probes(self) -> Tensor:
        """Random signs, (columns, `PROBES`)."""
        columns, device = len(self.sum), self.sum.device
        rng = torch.Generator().manual_seed(columns)
        return (2.0 * torch.randint(0, 2, (columns, PROBES), generator=rng) - 1).to(device)

    def add(self, inputs: Tensor) -> None:
        if not inputs.numel():  # of an expert without tokens
            return
        rows = inputs.reshape(-1, *inputs.shape[-2:])
        for some in rows.split(max(1, CONVERTED_TOKENS // rows.shape[1])):
            x = some.float()
            projected = x.mT @ (x @ self._probes)
            self.squares += projected.square_().sum() / PROBES
        self.rows += len(rows)
        self.add_product(inputs)

    def add_product(self, inputs: Tensor) -> None:
        """Add tokens to the sum alone, when no shrinkage is asked for."""
        flat = inputs.reshape(-1, inputs.shape[-1])
        cpu = flat.device.type == "cpu"
        steps = _steps(flat.shape[1], cpu=cpu)
        # bfloat16 inputs lose nothing, nor does float16 in TF32.
        exact = (torch.bfloat16,) if cpu else (torch.bfloat16, torch.float16)
        with bfloat16_products(flat.dtype in exact):
            for start in range(0, len(flat), CONVERTED_TOKENS):
                x = flat[start : start + CONVERTED_TOKENS].float()
                for at, to in steps:
                    self.sum[at:to, at:].addmm_(x[:, at:to].T, x[:, at:])

    def shrinkage(self) -> float:
        """Return how much of its mean diagonal to add to the diagonal, by Ledoit and Wolf.

        Their estimate (2004, Lemma 3.2) of the best mean of a sample's second moments and a
        multiple of the identity, with rows of text as the independent units in place of tokens
        (ours): tokens of one row resemble each other, and a sum over few rows is less certain than
        its number of tokens suggests. To be called once `matrix` was.
        """
        whole = float(self.sum.square().sum(dtype=widest(self.sum.device)))
        even = float(self.sum.diagonal().sum()) ** 2 / len(self.sum)
        noise = self._variance(whole) if self.merged is None else self.merged
        if whole <= even:
            return MOST_SHRINKAGE
        share = min(max(noise / (whole - even), 0.0), 1.0)
        return min(share / (1 - share), MOST_SHRINKAGE) if share < 1 else MOST_SHRINKAGE

    def _variance(self, whole: float) -> float:
        """Return the expected squared error of the sum, whose squared norm is `whole`."""
        if self.rows < 2:  # unknown
            return whole
        return (float(self.squares) - whole / self.rows) * self.rows / (self.rows - 1)

    def merge(self, other: Statistic, share: float) -> None:
        assert isinstance(other, Gram)
        self.merged = 0.0
        for one, scale in ((self, 1.0), (other, share)):
            upper = one.sum.triu()
            whole = 2 * float(upper.square().sum()) - float(upper.diagonal().square().sum())
            self.merged += scale**2 * one._variance(whole)
        super().merge(other, share)

    def matrix(self) -> Tensor:
        """Return the symmetric sum, float32 (columns, columns): the running sum itself."""
        return mirrored(self.sum)

    def times(self, gram: Tensor) -> Tensor:
        """Return the sum of entrywise products with another Gram matrix; overwrites the sum."""
        total = torch.zeros((), dtype=widest(gram.device), device=gram.device)
        for at, to in _steps(len(gram), cpu=gram.device.type == "cpu"):
            part = self.sum[at:to, at:].mul_(gram[at:to, at:])
            inner, outer = part.tensor_split([to - at], dim=1)
            total += inner.sum(dtype=total.dtype) + 2 * outer.sum(dtype=total.dtype)
        return total


class Cross:
    """Running float32 sum of d x^T, of a layer's inputs in the dense model and its own.

    Args:
        columns: width of the input.
        device: of the inputs.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self.sum = torch.zeros(columns, columns, device=device)

    def add(self, dense: Tensor, inputs: Tensor) -> None:
        """Add tokens: (..., columns), any float dtype."""
        pair = [one.reshape(-1, one.shape[-1]) for one in (dense, inputs)]
        exact = inputs.dtype == torch.bfloat16
        with bfloat16_products(exact):
            for d, x in zip(*(one.split(CONVERTED_TOKENS) for one in pair), strict=True):
                self.sum.addmm_(d.float().T, x.float())

    def moves(self, weights: Sequence[Tensor], gram: Tensor, inverse: Tensor) -> list[Tensor]:
        """Return by how much each weight has to change, so that the layer's outputs are nearest to
        the dense model's: W (C - G) H^-1, float32. Overwrites the sum.

        Args:
            weights: (rows, columns) of any float type.
            gram: G, float32 (columns, columns), sum of x x^T.
            inverse: upper factor of H^-1, H the damped G (`Factor`).
        """
        apart = self.sum.sub_(gram)
        with large_products():
            return [weight.float() @ apart @ inverse.T @ inverse for weight in weights]


@contextmanager
def raised_diagonal(gram: Any, share: float) -> Iterator[None]:
    """Add a share of its mean to the diagonal of a Gram matrix, except at dead inputs."""
    if not share:
        yield
        return
    diagonal = gram.diagonal()
    exact = diagonal.clone()
    diagonal.add_(share * exact.mean()).masked_fill_(exact == 0, 0)
    try:
        yield
    finally:
        diagonal.copy_(exact)


class Squares(Statistic):
    """Running float32 sum of squares of each column: the diagonal of the Gram matrix."""

    def add(self, inputs: Tensor) -> None:
        flat = inputs.reshape(-1, inputs.shape[-1])
        for start in range(0, len(flat), SQUARED_ROWS):
            rows = flat[start : start + SQUARED_ROWS].to(torch.float32, copy=True)
            self.sum += rows.square_().sum(0)


def _panels(width: int, panel: int) -> list[tuple[int, int]]:
    """Return the start and end of each panel of a matrix."""
    return [(at, min(at + panel, width)) for at in range(0, width, panel)]


def _steps(columns: int, *, cpu: bool) -> list[tuple[int, int]]:
    """Return the row ranges of the upper triangle that one product computes."""
    half = TRIANGLE_PANEL if columns > TRIANGLE_PANEL else max(1, -(-columns // 2))
    return _panels(columns, half if cpu else ACCELERATOR_PANEL)


def mirrored(matrix: Tensor) -> Tensor:
    """Copy the upper triangle of a square matrix to its lower one, in place."""
    for at, to in _panels(
        len(matrix), TRIANGLE_PANEL if matrix.device.type == "cpu" else ACCELERATOR_PANEL
    ):
        square = matrix[at:to, at:to]
        square.triu_().add_(square.triu(1).T)
        matrix[to:, at:to] = matrix[at:to, to:].T
    return matrix


def squared(upper: Tensor) -> Tensor:
    """Return U^T U of an upper triangular U, skipping most of the zeros."""
    full = torch.empty_like(upper)
    for at, to in _steps(len(upper), cpu=upper.device.type == "cpu"):
        torch.mm(upper[:to, at:to].T, upper[:to, at:], out=full[at:to, at:])
    return mirrored(full)


def chunks(matrix: Tensor) -> list[slice]:
    """Return slices of the rows of a matrix, to process one at a time."""
    rows, columns = matrix.shape
    size = OUTPUTS if matrix.device.type == "cpu" else max(OUTPUTS, LAYER_ENTRIES // columns)
    return [slice(*ends) for ends in _panels(rows, size)]


def output_energy(parts: Iterable[Tensor], gram: Tensor) -> Tensor:
    """Return tr(W H W^T), the energy of a layer's output, as a 0-d tensor.

    Computed as the sum of entrywise products of H and W^T W, itself a Gram matrix: exact for
    bfloat16 weights even where products round their factors to bfloat16.

    Args:
        parts: the rows of W, some at a time, of any float type.
        gram: H, float32 (columns, columns), sum or mean of x x^T.
    """
    product = Gram(len(gram), gram.device)
    for rows in parts:
        product.add_product(rows)
    return product.times(gram)


def relative_error(weight: Tensor, changed: Tensor, gram: Tensor) -> float:
    """Return the share of a layer's output energy that is lost, tr(D H D^T) / tr(W H W^T).

    Gram matrices add: a mix's is the sum of its sources', weighted by share. The same weights can
    be compared on the Gram matrix of any other text.

    Args:
        weight: W, (rows, columns) of any float type.
        changed: the weights that replace W, rounded to its type; D is the difference.
        gram: H, float32 (columns, columns), sum or mean of x x^T, undamped.
    """
    pairs = zip(weight.split(CONVERTED_TOKENS), changed.split(CONVERTED_TOKENS), strict=True)
    differences = (dense.float() - sparse.to(weight.dtype) for dense, sparse in pairs)
    energies = torch.stack([output_energy(rows, gram) for rows in (differences, [weight])])
    lost, whole = energies.tolist()
    return max(lost, 0.0) / whole if whole else 0.0


@dataclass(frozen=True)
class Factor:
    """Upper Cholesky factor U of the inverse damped Gram matrix, H^-1 = U^T U.

    Attributes:
        upper: float32 (columns, columns).
        damping: amount added to the diagonal, as a share of its mean.
        dtype: precision of the factorisation that succeeded.
        dead: bool (columns,), inputs that were zero on every token.
        raised: the damping used, as a multiple of that requested.
    """

    upper: Tensor
    damping: float
    dtype: torch.dtype
    dead: Tensor
    raised: int = 1


def inverse_factor(gram: Tensor, damping: float = 0.01) -> Factor:
    """Factorise the inverse of a damped Gram matrix (SparseGPT, arXiv 2301.00774, section 3.3).

    H = R R^T with R upper triangular gives H^-1 = U^T U with U = R^-1; neither R nor H^-1 is
    ever formed. If H is not positive definite, the damping is raised tenfold, then the
    factorisation is repeated in float64, finally with a hundredfold damping.

    Args:
        gram: symmetric float32 (columns, columns).
        damping: share of the mean diagonal added to the diagonal.
    """
    diagonal = gram.diagonal()
    mean = diagonal.mean()
    if not mean > 0:
        raise SolverError("the inputs of this layer are zero on every calibration token")
    able = widest(gram.device) == torch.float64  # needed by the last attempts
    for dtype, raised in ATTEMPTS:
        share = raised * damping
        upper = gram.to(gram.device if able else torch.device("cpu"), dtype, copy=True)
        upper.diagonal().add_((share * mean).to(upper.device))
        with large_products():
            failed = torch.stack(list(_invert_factor(upper))).any()
        upper = upper.to(gram.device, torch.float32)
        # A sum is finite only if every entry is, and takes one pass.
        usable = torch.isfinite(upper.sum()) & (upper.diagonal() > 0).all()
        if usable.logical_and_(~failed.to(usable.device)):
            return Factor(upper, share, dtype, diagonal == 0, raised)
    raise SolverError(
        f"the Gram matrix is not positive definite even with damping {100 * damping:g}: "
        "use more calibration tokens, or more damping where the method has it (such as --method "
        "sparsegpt,damping=0.1)"
    )


def _invert_factor(h: Tensor) -> Iterator[Tensor]:
    """Overwrite a symmetric H with the upper U of H^-1 = U^T U; yield LAPACK's status of blocks.

    With H = [[A, B], [B^T, C]] and C = R_c R_c^T, the factor's corner is B U_c^T and the Schur
    complement of A is factorised in turn. LAPACK only sees small blocks: the rest is matrix
    products, several times faster than LAPACK on the whole matrix. Only the upper triangle is
    read, and products skip most entries below the diagonal: little more than 2/3 d^3 remain.
    """
    size = len(h)
    leaf, panel = (
        (LEAF, TRIANGLE_PANEL) if h.device.type == "cpu" else (ACCELERATOR_PANEL, ACCELERATOR_PANEL)
    )
    if size <= leaf:
        # LAPACK's factor is lower triangular: reversing rows and columns makes it upper.
        lower, failed = torch.linalg.cholesky_ex(h.flip(0, 1))
        identity = torch.eye(size, dtype=h.dtype, device=h.device)
        inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
        h.copy_(inverse.flip(0, 1))
        yield failed
        return
    half = size // 2
    a, b, c = h[:half, :half], h[:half, half:], h[half:, half:]
    left, right = _panels(half, panel), _panels(size - half, panel)
    yield from _invert_factor(c)
    corner = torch.empty_like(b)
    for at, to in right:
        torch.mm(b[:, at:], c[at:to, at:].T, out=corner[:, at:to])
    for at, to in left:
        a[at:to, at:].addmm_(corner[at:to], corner[at:].T, alpha=-1)
    yield from _invert_factor(a)
    for at, to in right:
        torch.mm(corner[:, :to], c[:to, at:to], out=b[:, at:to])
    for at, to in left:
        torch.mm(a[at:to, at:], b[at:], out=corner[at:to])
    torch.neg(corner, out=b)
    h[half:, :half] = 0
