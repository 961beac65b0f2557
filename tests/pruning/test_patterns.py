import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calmix import SemiStructured, Unstructured
from calmix.pruning.methods import get_method
from calmix.pruning.patterns import as_pattern, smallest
from tests.pruning.toy import Elsewhere, refused


def stable_mask(score, count, axis):
    """Textbook: a stable sort, so that of equal scores the lower index comes first."""
    rank = score.argsort(axis=axis, kind="stable").argsort(axis=axis, kind="stable")
    return rank < count


SEEDS = st.integers(0, 10_000)


@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 6), SEEDS, st.floats(0, 1))
def test_smallest_breaks_ties_by_index(groups, size, levels, seed, share):
    score = np.random.default_rng(seed).integers(0, levels, (groups, size)).astype(np.float32)
    count = round(share * size)
    marked = smallest(torch.from_numpy(score), count).numpy()
    assert marked.dtype == bool
    assert (marked.sum(1) == count).all()
    assert (marked == stable_mask(score, count, 1)).all()
    elsewhere = smallest(torch.from_numpy(score).as_subclass(Elsewhere), count)
    assert (elsewhere.numpy() == marked).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_smallest_on_an_accelerator(dtype):
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(4, 1001, generator=generator).to(dtype)
    score[0], score[1] = -score[0].abs(), score[1].abs()
    score[2, :500] = torch.tensor([0.0, 1e-45, -1e-45, 3e38, -3e38]).repeat(100).to(dtype)
    score = score.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    for count in (1, 2, 400, 1000, 1001):
        expected = smallest(score.float(), count)
        assert torch.equal(smallest(score.as_subclass(Elsewhere), count), expected), count


@given(st.integers(2, 20), SEEDS, st.data())
def test_n_m_mask_matches_stable_sort(m, seed, data):
    count = data.draw(st.integers(1, m - 1))
    score = np.random.default_rng(seed).integers(0, 4, (m, 7)).astype(np.float32)
    marked = SemiStructured(m - count, m).group_mask(torch.from_numpy(score)).numpy()
    assert (marked == stable_mask(score, count, 0)).all()


def test_pattern_parsing_and_count():
    assert Unstructured(0.6).count(576 * 128) == round(0.6 * 576 * 128)
    assert Unstructured(0.5).count(3) == 2
    assert as_pattern(" 1 : 4 ") == SemiStructured(1, 4)
    assert (SemiStructured(1, 4).sparsity, repr(SemiStructured(1, 4).count(12))) == (0.75, "9")
    # Groups of a pattern do not end where a method's groups do.
    assert get_method("sparsegpt").count(SemiStructured(5, 12), 10, 384) == 2240
    for texts, says in (
        (("2/4", "2:", "", ":4", "a:b", "2:4:8"), "is neither a sparsity"),
        (("0:4", "4:4", "5:4"), "at least 1 and less than M"),
        (("0", "1", "-0.5", "1.5", "nan"), "between 0 and 1"),
    ):
        for text in texts:
            refused(says, as_pattern, text)
