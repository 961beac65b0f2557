"""Solvers, statistics and patterns on a simulated device: types, shapes, devices, reads."""

import itertools

import pytest
import torch

from calmix.pruning.gram import Gram
from calmix.pruning.methods import get_method
from calmix.pruning.patterns import SemiStructured, Unstructured
from tests.device.traced import tracing
from tests.pruning.toy import SPARSE
from tests.tiny import quick

CUDA = torch.device("cuda")
PATTERNS = [Unstructured(0.6), SemiStructured(2, 4), SemiStructured(16, 32)]
METHODS = [*SPARSE, "sparsegpt,refit=11", "wanda,refit=1"]


@pytest.mark.parametrize(
    "how",
    quick(
        [("sparsegpt", torch.bfloat16, PATTERNS[0])]
        + [(name, torch.bfloat16, PATTERNS[1]) for name in (*SPARSE, "wanda,refit=1")],
        itertools.product(METHODS, [torch.bfloat16, torch.float32], PATTERNS),
    ),
    ids=str,
)
def test_solve_reads_few_numbers(how):
    """Nothing that is made on the way lies elsewhere: where nobody says, it would be on the CPU."""
    name, dtype, pattern = how
    method = get_method("admm,iterations=2" if name == "admm" else name)
    with tracing("cpu") as traced, torch.inference_mode():

        def made(*shape, dtype=torch.float32):
            return torch.randn(*shape, dtype=dtype, device=CUDA)

        weights = [made(rows, 160, dtype=dtype) for rows in (24, 40)]
        weights.append(made(160, 8, dtype=dtype).T)
        needs = method.needs
        statistic = None if needs is None else made(*(160,) * (2 if needs is Gram else 1))
        solved = method.solve(weights, statistic, [pattern] * 3)
        assert {weight.device.type for weight in solved.weights} == {"cuda"}
        assert [w.shape for w in solved.weights] == [w.shape for w in weights]
        assert set(traced.reads) <= {"tolist", "_local_scalar_dense"}
        assert traced.reads.total() <= 25
        assert not traced.copies, traced.copies
