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
    method=get_method("sparsegpt"),
)  # fmt: skip


def plan(budget, sizes=LLAMA_8B, held=GIB // 2, sequential=True, **changed):
    sizes = dataclasses.replace(sizes, **changed)
    return make_plan(sizes, int(budget * GIB), held, 2048, sequential=sequential)


def test_what_is_spared_first_where_memory_is_short():
    """Hidden states in memory, then overlap and paused micro-batches, and at last rows at once."""
    states = 128 * 2048 * 4096 * 2
    plenty = plan(80)
    assert (plenty.paused, plenty.overlap, plenty.micro_tokens) == (None, True, 2048)
    assert plenty.needed < 80 * GIB
    assert plenty.states == states
    some = plan((plenty.needed - states) / 0.95 / GIB)
    assert (some.paused, some.overlap) == (None, False)
    assert some.states < states
    wide, narrow = plan(12), plan(6)
    assert 0 < narrow.paused < wide.paused < 128
    assert narrow.micro_tokens == wide.micro_tokens == 2048
    assert narrow.states < paused_bytes(LLAMA_8B, 2048)
    for made, budget in ((wide, 12), (narrow, 6)):
        assert made.needed <= budget * GIB
    short = {"length": 256, "rows": 1024}
    assert plan(5, **short).micro_tokens == 2048
    short |= {"hidden": 65536, "method": get_method("wanda")}
    assert plan(8, **short).micro_tokens == 2048
    assert plan(4, **short).micro_tokens < 2048


def test_what_is_needed_is_told_and_is_enough():
    with pytest.raises(InputError, match=r"3\.00 GiB of memory cannot hold one block") as told:
        plan(3)
    needed = float(str(told.value).split(": ")[1].split(" GiB")[0])
    assert plan(needed + 0.01).paused == 0
    with pytest.raises(InputError):
        plan(needed - 0.3)


def test_what_decides_the_plan():
    assert plan(6, held=300 * MIB) == plan(6, held=500 * MIB)  # rounded up
    assert plan(80, copies=True).needed - plan(80).needed == LLAMA_8B.block_bytes
    wanda, magnitude = (get_method(name) for name in ("wanda", "magnitude"))
    assert solver_bytes(dataclasses.replace(LLAMA_8B, method=wanda)) < solver_bytes(LLAMA_8B)
    assert plan(80, method=magnitude).states == 0
    alone = {"method": magnitude, "rows": 0, "length": 0, "outside_bytes": 0}
    assert plan(3, sequential=False, **alone).paused is None


def test_amounts_of_memory():
    for text, value in {
        "6GiB": 6 * GIB, "1.5 gib": 3 * GIB // 2, "512MB": 512 * 10**6, "7000": 7000, "2k": 2000,
        "4Mi": 4 * MIB,
    }.items():  # fmt: skip
        assert parse_memory(text) == value
    for text in ("", "much", "-1GiB", "6 GiBit", "0", "1e9"):
        with pytest.raises(InputError, match="is not an amount of memory"):
            parse_memory(text)
