"""Statistics of a layer's inputs over calibration tokens: the Gram matrix, sum of x x^T, with its
factor, and its diagonal.

Inputs may be half precision; sums are always float32. A Gram matrix rounded to half precision
is not positive definite, so no half-precision product is ever accumulated.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calmix.errors import SolverError

CHUNK = 2048  # tokens converted to float32 at a time: they stay in the second-level cache
ROWS = 256  # the same for sums of squares, which read every value once
LEAF = 144  # columns of a block that LAPACK factorises
PANEL = 256  # columns of the upper triangle computed in one product


@contextmanager
def bfloat16_products(allowed: bool = True) -> Iterator[None]:
    """Let float32 products round their inputs to bfloat16 where the machine has units for it."""
    # One setting a backend: torch refuses to read what is for all of them once one differs.
    mkldnn: Any = torch.backends.mkldnn
    backends: dict[Any, str] = {mkldnn.matmul: "bf16", torch.backends.cuda.matmul: "tf32"}
    before = {backend: backend.fp32_precision for backend in backends}
    for backend, fast in backends.items():
        backend.fp32_precision = fast if allowed else "ieee"
    try:
        yield
    finally:
        for backend, precision in before.items():
            backend.fp32_precision = precision


@dataclass(frozen=True)
class Work:
    """What something takes, in the units a machine's rates are measured in.

    Attributes:
        gram: FLOP of products with float32 sums from the model's type, or as fast as those.
        factor: FLOP of factorisations in float32.
        products: FLOP of float32 products.
        steps: steps that wait for one another, each a few calls.
        cached: bytes through element-wise work on what stays in cache.
        memory: bytes read from and written to main (or the device's) memory.
    """

    gram: float = 0
    factor: float = 0
    products: float = 0
    steps: float = 0
    cached: float = 0
    memory: float = 0


class Statistic(ABC):
    """What a method is told of a layer's inputs, gathered over all calibration tokens.

    Args:
        columns: width of the input.
        device: where inputs and statistic lie.
    """

    @abstractmethod
    def __init__(self, columns: int, device: torch.device) -> None: ...

    @abstractmethod
    def add(self, inputs: Tensor) -> None:
        """Add tokens: inputs of shape (..., columns), any float dtype."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """Return the statistic; nothing is added afterwards."""

    @classmethod
    def memory(cls, columns: int) -> int:
        """Return the bytes it takes; by default a few vectors."""
        return 16 * columns

    @classmethod
    def work(cls, columns: int, tokens: int, *, cpu: bool) -> Work:
        """Return what gathering it takes; by default every value is read once in float32."""
        return Work(cached=4 * columns * tokens)


def triangle(width: int, panel: int) -> float:
    """Share of a square matrix that is left when panels of rows leave out what lies below them."""
    starts = range(0, width, panel)
    return sum(min(panel, width - at) * (width - at) for at in starts) / width**2


class Gram(Statistic):
    """Running sum of x x^T in float32; on a CPU only the upper triangle is computed."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self._sum = torch.zeros(columns, columns, device=device)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Add tokens: inputs of shape (..., columns), any float dtype."""
        flat = inputs.reshape(-1, inputs.shape[-1])
        self.tokens += len(flat)
        columns = flat.shape[1]
        if flat.device.type == "cuda" and flat.dtype != torch.float32:
            self._sum += torch.mm(flat.T, flat, out_dtype=torch.float32)
            return
        panel = _panel(columns)
        # Inputs that are bfloat16 values anyway lose nothing.
        with bfloat16_products(flat.dtype == torch.bfloat16):
            for start in range(0, len(flat), CHUNK):
                x = flat[start : start + CHUNK].float()
                for at in range(0, columns, panel):
                    self._sum[at : at + panel, at:].addmm_(x[:, at : at + panel].T, x[:, at:])

    def matrix(self) -> Tensor:
        """Return the symmetric sum, float32 (columns, columns): the running sum itself."""
        full = self._sum
        for at in range(0, len(full), PANEL):
            square = full[at : at + PANEL, at : at + PANEL]
            square.triu_().add_(square.triu(1).T)
            full[at + PANEL :, at : at + PANEL] = full[at : at + PANEL, at + PANEL :].T
        return full

    @classmethod
    def memory(cls, columns: int) -> int:
        """Return the bytes of the sum."""
        return 4 * columns**2

    @classmethod
    def work(cls, columns: int, tokens: int, *, cpu: bool) -> Work:
        """2 N d^2, of which a CPU computes the upper triangle."""
        share = triangle(columns, _panel(columns)) if cpu else 1.0
        return Work(gram=2 * tokens * columns**2 * share)


def _panel(columns: int) -> int:
    """Return how many rows of the upper triangle come from one product."""
    return PANEL if columns > PANEL else max(1, -(-columns // 2))


class Squares(Statistic):
    """Running sum of squares of every column in float32: the diagonal of the Gram matrix."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self._sum = torch.zeros(columns, device=device)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Add tokens: inputs of shape (..., columns), any float dtype."""
        flat = inputs.reshape(-1, inputs.shape[-1])
        self.tokens += len(flat)
        for start in range(0, len(flat), ROWS):
            rows = flat[start : start + ROWS].to(torch.float32, copy=True)
            self._sum += rows.square_().sum(0)

    def matrix(self) -> Tensor:
        """Return the sums, float32 (columns,)."""
        return self._sum


@dataclass(frozen=True)
class Factor:
    """Upper Cholesky factor U of the inverse damped Gram matrix, H^-1 = U^T U.

    Attributes:
        upper: float32 (columns, columns).
        damping: what was added to the diagonal, as a share of its mean.
        dtype: precision of the factorisation that succeeded.
        dead: bool (columns,), inputs that were zero on every token.
    """

    upper: Tensor
    damping: float
    dtype: torch.dtype
    dead: Tensor


def inverse_factor(gram: Tensor, damping: float = 0.01) -> Factor:
    """Factorise the inverse of a damped Gram matrix (SparseGPT, arXiv 2301.00774, section 3.3).

    H = R R^T with R upper triangular gives H^-1 = U^T U with U = R^-1; neither R nor H^-1 is
    ever formed. If H is not positive definite the damping is raised tenfold, then the work is
    repeated in float64, at last with a hundredfold damping; H^-1 is never replaced by anything
    else.

    Args:
        gram: symmetric float32 (columns, columns).
        damping: share of the mean diagonal added to the diagonal.

    Raises:
        SolverError: the matrix is not finite, is zero, or no attempt succeeded.
    """
    diagonal = gram.diagonal()
    if not torch.isfinite(diagonal).all():
        raise SolverError("the inputs of this layer are not finite")
    mean = diagonal.mean()
    if mean <= 0:
        raise SolverError("the inputs of this layer are zero on every calibration token")
    attempts = [
        (torch.float32, damping),
        (torch.float32, 10 * damping),
        (torch.float64, 10 * damping),
        (torch.float64, 100 * damping),
    ]
    for dtype, share in attempts:
        upper = gram.to(dtype, copy=True)
        upper.diagonal().add_(share * mean)
        failed = torch.stack(list(_invert_factor(upper))).any()
        if failed:
            continue
        upper = upper.float()
        # A sum is finite only if every entry is, and is had in one pass.
        if torch.isfinite(upper.sum()) and (upper.diagonal() > 0).all():
            return Factor(upper, share, dtype, diagonal == 0)
    raise SolverError(
        f"the Gram matrix is not positive definite even with damping {100 * damping:g}: "
        "use more calibration tokens or a larger --damping"
    )


def _invert_factor(h: Tensor) -> Iterator[Tensor]:
    """Overwrite a symmetric H by the upper U of H^-1 = U^T U; yield what LAPACK says of blocks.

    With H = [[A, B], [B^T, C]] and C = R_c R_c^T, the factor's corner is B U_c^T and what is
    left of A is factorised in turn. LAPACK sees small blocks only: the rest is matrix products,
    several times faster than its factorisation of the whole. Only the upper triangle is read.
    """
    size = len(h)
    if size <= LEAF:
        # LAPACK's factor is lower triangular: reversing the order of rows and columns turns it.
        lower, failed = torch.linalg.cholesky_ex(h.flip(0, 1))
        identity = torch.eye(size, dtype=h.dtype, device=h.device)
        inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
        h.copy_(inverse.flip(0, 1))
        yield failed
        return
    half = size // 2
    a, b, c = h[:half, :half], h[:half, half:], h[half:, half:]
    yield from _invert_factor(c)
    corner = b @ c.T
    a.addmm_(corner, corner.T, alpha=-1)
    yield from _invert_factor(a)
    torch.mm(a, corner @ c, out=b).neg_()
    h[half:, :half] = 0
