"""Solvers, statistics and patterns on a simulated device: types, shapes, devices, reads."""

import itertools

import pytest
import torch

from calmix.pruning import gram
from calmix.pruning.gram import Gram
from calmix.pruning.methods import get_method
from calmix.pruning.patterns import SemiStructured, Unstructured, smallest
from tests.device.traced import tracing
from tests.pruning.toy import SPARSE
from tests.tiny import quick

CUDA = torch.device("cuda")
PATTERNS = [Unstructured(0.6), SemiStructured(2, 4), SemiStructured(16, 32)]


def on_device(*tensors):
    return all(tensor.device.type == "cuda" for tensor in tensors)


@pytest.mark.parametrize(
    "how",
    quick(
        [("sparsegpt", torch.bfloat16, PATTERNS[0]), ("sparsegpt", torch.float32, PATTERNS[1])]
        + [(name, torch.bfloat16, PATTERNS[1]) for name in SPARSE if name != "sparsegpt"]
        + [("wanda,refit=1", torch.bfloat16, PATTERNS[1])],
        itertools.product(
            [*SPARSE, "sparsegpt,refit=11", "wanda,refit=1"],
            [torch.bfloat16, torch.float32],
            PATTERNS,
        ),
    ),
    ids=str,
)
def test_solve_reads_few_numbers(how):
    """Layers of several sizes.

    Nothing that is made on the way lies elsewhere: where nobody says, it would be on the CPU.
    """
    name, dtype, pattern = how
    method = get_method("admm,iterations=2" if name == "admm" else name)
    with tracing(None) as traced, torch.inference_mode():

        def made(*shape, dtype=torch.float32):
            return torch.randn(*shape, dtype=dtype, device=CUDA)

        weights = [made(rows, 192, dtype=dtype) for rows in (24, 40)]
        weights.append(made(192, 8, dtype=dtype).T)
        needs = method.needs
        statistic = None if needs is None else made(*(192,) * (2 if needs is Gram else 1))
        solved = method.solve(weights, statistic, [pattern] * 3)
        assert on_device(*solved.weights)
        assert [w.shape for w in solved.weights] == [w.shape for w in weights]
        assert set(traced.reads) <= {"tolist", "_local_scalar_dense"}
        assert traced.reads.total() <= 25
        assert not traced.copies, traced.copies


def test_error_of_a_large_layer_uses_few_kernels():
    with tracing() as traced:
        weight = torch.randn(14336, 4096, dtype=torch.bfloat16)
        traced.operations.clear()
        assert gram.relative_error(weight, weight.clone(), torch.randn(4096, 4096)) >= 0
    assert traced.operations.total() < 100
    assert traced.reads == {"tolist": 1}


@pytest.mark.parametrize("score", [(5, 64), (1, 5000), (3, 2)])
def test_masks_need_no_host_reads(score):
    with tracing() as traced:
        values = torch.rand(score)
        assert on_device(smallest(values, 2), smallest(values, score[1] - 1), smallest(values, 0))
        assert Unstructured(0.5).mask(values).shape == score
        assert SemiStructured(1, 2).mask(values).dtype == torch.bool
    assert not traced.reads
    assert not traced.copies
