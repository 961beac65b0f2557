"""Memory plans: what comes first when memory is short, and what is refused."""

import dataclasses

import pytest

from calmix.errors import InputError
from calmix.pruning import get_method
from calmix.pruning.budget import (
    GIB,
    Sizes,
    make_plan,
    parse_memory,
    paused_bytes,
    solver_bytes,
)
from calmix.pruning.solvers import refit

MIB = 2**20
LLAMA_8B = Sizes(
    block_bytes=436 * MIB,
    copies=False,
    outside_bytes=1002 * MIB,
    layers=[(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096),
            (14336, 4096), (4096, 14336)],
    hidden=4096,
    rows=128,
    length=2048,
    value_bytes=2,
    methods=[get_method("sparsegpt")],
)  # fmt: skip


def plan(budget, sizes=LLAMA_8B, held=GIB // 2, sequential=True):
    return make_plan(sizes, int(budget * GIB), held, 2048, sequential=sequential)


def test_with_plenty_everything_stays_paused_and_overlaps():
    made = plan(80)
    assert made.paused is None
    assert made.overlap
    assert made.micro_tokens == 2048
    assert made.needed < 80 * GIB


def test_less_memory_pauses_fewer_micro_batches():
    wide, narrow = plan(12), plan(6)
    assert 0 < narrow.paused < wide.paused < 128
    assert narrow.micro_tokens == wide.micro_tokens == 2048
    for made, budget in ((wide, 12), (narrow, 6)):
        assert made.needed <= budget * GIB


def test_hidden_states_take_what_is_left():
    states = 128 * 2048 * 4096 * 2
    wide = plan(80)
    assert wide.states == states
    without = dataclasses.replace(LLAMA_8B, methods=[get_method("magnitude")])
    assert plan(80, without).states == 0
    some = plan((wide.needed - states) / 0.95 / GIB)
    assert some.paused is None
    assert not some.overlap
    assert some.states < states
    assert plan(6).states < paused_bytes(LLAMA_8B, 2048)  # micro-batches that pause come first


def test_what_is_needed_is_told_and_is_enough():
    with pytest.raises(InputError, match=r"3\.00 GiB of memory cannot hold one block") as told:
        plan(3)
    needed = float(str(told.value).split(": ")[1].split(" GiB")[0])
    made = plan(needed + 0.01)
    assert made.paused == 0
    with pytest.raises(InputError):
        plan(needed - 0.3)


def test_rows_at_once_shrink_last():
    short = dataclasses.replace(LLAMA_8B, length=256, rows=1024)
    assert plan(5, short).micro_tokens == 2048
    wide = dataclasses.replace(short, hidden=65536, methods=[get_method("wanda")])
    assert plan(8, wide).micro_tokens == 2048
    assert plan(4, wide).micro_tokens < 2048


def test_a_little_more_in_the_process_changes_nothing():
    assert plan(6, held=300 * MIB) == plan(6, held=500 * MIB)


def test_several_targets_keep_the_dense_weights_beside():
    several = dataclasses.replace(LLAMA_8B, copies=True)
    assert plan(80, several).needed - plan(80).needed == LLAMA_8B.block_bytes


def test_other_methods_need_less():
    wanda = dataclasses.replace(LLAMA_8B, methods=[get_method("wanda")])
    assert solver_bytes(wanda) < solver_bytes(LLAMA_8B)
    magnitude = dataclasses.replace(
        LLAMA_8B, methods=[get_method("magnitude")], rows=0, length=0, outside_bytes=0
    )
    assert plan(3, magnitude, sequential=False).paused is None


@pytest.mark.parametrize(
    ("text", "value"),
    [("6GiB", 6 * GIB), ("1.5 gib", 3 * GIB // 2), ("512MB", 512 * 10**6), ("7000", 7000),
     ("2k", 2000), ("4Mi", 4 * MIB)],
)  # fmt: skip
def test_amounts_of_memory(text, value):
    assert parse_memory(text) == value


@pytest.mark.parametrize("text", ["", "much", "-1GiB", "6 GiBit", "0", "1e9"])
def test_what_is_no_amount(text):
    with pytest.raises(InputError, match="is not an amount of memory"):
        parse_memory(text)


@pytest.mark.parametrize(
    ("method", "memory"),
    [
        ("magnitude", 8 * 1500 * 40),
        ("wanda", 1500 * (16 + 8 * 40)),
        ("sparsegpt", 11 * 1500**2 + 8 * 1500 * 40),
        ("admm", 19 * 1500**2 + 20 * 1500 * 40),
        ("wanda,refit=7", 4 * 1500**2 + refit.memory(40, 1500)),
    ],
)
def test_memory_by_hand(method, memory):
    """40 outputs of 1,500 inputs."""
    assert get_method(method).memory(1500, 40) == memory
