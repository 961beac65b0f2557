"""Solvers, statistics and patterns on a device that is not there: types, shapes, devices, reads."""

import itertools
from unittest import mock

import pytest
import torch

from benchmarks.traced import tracing
from calmix.pruning import gram
from calmix.pruning.engine import solve
from calmix.pruning.gram import Gram, Squares
from calmix.pruning.methods import get_method
from calmix.pruning.patterns import SemiStructured, Unstructured, smallest
from tests.pruning.toy import SPARSE, Means
from tests.tiny import quick

CUDA = torch.device("cuda")
PATTERNS = [Unstructured(0.6), SemiStructured(2, 4), SemiStructured(16, 32)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def on_device(*tensors):
    return all(tensor.device.type == "cuda" for tensor in tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [Gram, Squares, Means])
def test_statistics_stay_on_the_device(kind, dtype):
    with tracing(None) as traced:
        sums = kind(96, CUDA)
        for length in (40, 7):
            sums.add(torch.randn(3, length, 96, dtype=dtype, device=CUDA))
        made = sums.matrix()
        assert on_device(made)
        assert made.dtype == torch.float32
    assert not traced.reads
    assert not traced.copies


def test_a_gram_matrix_is_summed_in_place(monkeypatch):
    """No product is as large as the sum itself: a wide layer's would take gigabytes."""
    places, addmm = [], torch.addmm

    def told(*given, **options):
        assert options["out_dtype"] == torch.float32
        places.append(options["out"]._base)
        return addmm(*given, **options)

    monkeypatch.setattr(torch, "addmm", told)
    with tracing() as traced:
        sums = Gram(4096, CUDA)
        traced.operations.clear()
        sums.add(torch.randn(1, 8, 4096, dtype=torch.bfloat16))
        assert traced.operations == {"randn": 1, "addmm": 2}  # two panels of the upper triangle
        assert [place is sums.matrix() for place in places] == [True, True]


@pytest.mark.parametrize("fails", [RuntimeError("no such kernel\nhere"), None], ids=str)
def test_without_products_that_sum_in_float32_inputs_are_widened(fails):
    def agree(device, dtype):
        if fails is not None:
            raise fails
        return False

    with tracing() as traced, mock.patch.object(gram, "_sums_agree", agree):
        sums = Gram(96, CUDA)
        with pytest.warns(UserWarning, match="products of float16 is not used on cuda:0: ") as told:
            sums.add(torch.randn(2, 8, 96, dtype=torch.float16))
        assert str(told[0].message).endswith("wrong" if fails is None else "no such kernel")
        assert sums.matrix().dtype == torch.float32
    assert traced.operations["addmm_"] == 1


def test_sums_in_place_are_tried_on_a_part_of_a_matrix(monkeypatch):
    """A library may read what it has written already, or forget what was there."""

    def right(to, left, right, *, out_dtype, out):
        out.copy_(to + left.float() @ right.float())

    def forgetful(to, left, right, *, out_dtype, out):
        out.copy_(left.float() @ right.float())

    for dtype in (torch.bfloat16, torch.float16):
        monkeypatch.setattr(torch, "addmm", right)
        assert gram._sums_agree(torch.device("cpu"), dtype)
        monkeypatch.setattr(torch, "addmm", forgetful)
        assert not gram._sums_agree(torch.device("cpu"), dtype)


@pytest.mark.parametrize(
    "how",
    quick([(torch.bfloat16, PATTERNS[0]), (torch.float32, PATTERNS[1])],
          itertools.product([torch.bfloat16, torch.float32], PATTERNS)),
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", [*SPARSE, "sparsegpt,refit=11", "wanda,refit=1"])
def test_a_solve_reads_a_few_numbers_and_copies_nothing(name, how):
    """Layers of several sizes.

    Nothing that is made on the way lies elsewhere: where nobody says, it would be on the CPU.
    """
    (dtype, pattern), method = how, get_method("admm,iterations=2" if name == "admm" else name)
    with tracing(None) as traced, torch.inference_mode():

        def made(*shape, dtype=torch.float32):
            return torch.randn(*shape, dtype=dtype, device=CUDA)

        weights = [made(rows, 192, dtype=dtype) for rows in (24, 40)]
        weights.append(made(192, 8, dtype=dtype).T)
        needs = method.needs
        statistic = None if needs is None else made(*(192,) * (2 if needs is Gram else 1))
        solved = solve(method, "layer", weights, statistic, [pattern] * 3)
        assert on_device(*solved.weights)
        assert [w.shape for w in solved.weights] == [w.shape for w in weights]
        assert set(traced.reads) <= {"tolist", "_local_scalar_dense"}
        assert traced.reads.total() <= 25
        assert not traced.copies, traced.copies
        assert [isinstance(error, float) for error in solved.errors] == [needs is Gram] * 3


@pytest.mark.parametrize("pattern", PATTERNS[:2], ids=str)
def test_a_block_of_columns_is_one_kernel(pattern):
    with tracing(kernel=True) as traced:
        weights = [torch.randn(rows, 192, dtype=torch.bfloat16) for rows in (24, 40)]
        solved = get_method("sparsegpt").solve(weights, torch.randn(192, 192), [pattern] * 2)
        assert on_device(*solved.weights)
    assert traced.operations["prune_columns"] == 2
    assert traced.operations["linalg_solve_triangular"] == 1  # of the factor
    assert traced.reads == {"_local_scalar_dense": 4}  # of the factor
    assert not traced.copies


def test_the_error_of_a_large_layer_starts_few_kernels():
    with tracing() as traced:
        weight = torch.randn(14336, 4096, dtype=torch.bfloat16)
        traced.operations.clear()
        assert gram.relative_error(weight, weight.clone(), torch.randn(4096, 4096)) >= 0
    assert traced.operations.total() < 100
    assert traced.reads == {"tolist": 1}


@pytest.mark.parametrize("score", [(5, 64), (1, 5000), (3, 2)])
def test_masks_are_made_without_the_host(score):
    with tracing() as traced:
        values = torch.rand(score)
        assert on_device(smallest(values, 2), smallest(values, score[1] - 1), smallest(values, 0))
        assert Unstructured(0.5).mask(values).shape == score
        assert SemiStructured(1, 2).mask(values).dtype == torch.bool
    assert not traced.reads
    assert not traced.copies
