"""What a recovery spares to stay within its memory: the plan, and runs that follow a small one."""

import math
from collections import namedtuple
from functools import partial

import pytest

from calmix.recovery import job
from calmix.recovery.memory import Sizes, make_plan, needed_bytes
from tests.forks import stopped
from tests.recovery.stopper import arm
from tests.recovery.test_recover import METHODS, command, manifest, place
from tests.tiny import hashes, quick

__all__ = ["place"]  # a fixture
Held = namedtuple("Held", "rss")
SIZES = Sizes(
    weights=10_000, trained=1_000, outside=2_000, blocks=8, hidden=16, widths=200,
    vocabulary=500, value_bytes=2,
)  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_what_changes_no_number_is_spared_first_then_rows(method):
    def made(room):
        return make_plan(method, SIZES, 32, [4, 2, 1], room)

    plan, plans = made(math.inf), []
    while not plans or plan != plans[-1]:
        plans.append(plan)
        plan = made(plan.needed - 1)
    assert plans[:2] == [made(plans[0].needed), made(plans[1].needed)]
    assert [(one.rows, one.sparing) for one in plans[:2]] == [(4, False), (4, True)]
    assert (plans[-1].rows, plans[-1].sparing) == (1, True)
    assert [one.needed for one in plans] == sorted((one.needed for one in plans), reverse=True)
    assert made(0) == plans[-1]  # what takes least, for the message


def test_the_formulas_are_those_of_the_documentation():
    sizes = Sizes(1000, 100, 300, 4, 8, 60, 50, 2)
    activations = 16 * (6 * 8 + 60) * 2
    passed = 1000 * 2 + 100 * 18 + 4 * 16 * 8 * 2 + 5 * 4 * 16 * 50
    for method, sparing, wanted in (
        ("blocks", False, 100 * (16 + 2 + 4 * 2) + 5 * activations),
        ("blocks", True, 100 * (16 + 2 + 2 * 2) + 5 * activations),
        ("distill", False, passed + 6 * activations),
        ("distill", True, passed + 3 * activations),
    ):
        assert needed_bytes(method, sizes, 16, sparing=sparing) == wanted


@pytest.fixture
def small(monkeypatch):
    """As if next to nothing were free."""
    monkeypatch.setattr(job, "make_plan", lambda *of: make_plan(*of[:-1], 0))


@pytest.mark.parametrize("method", quick(["blocks"], METHODS))
def test_it_goes_on_with_as_many_rows_at_a_time(
    calmix, place, tmp_path, monkeypatch, small, method
):
    within = ("--epochs", 1, "--max-memory", "64GiB")
    assert calmix(*command(place, tmp_path / "whole", method, *within)).code == 0
    stopped(partial(arm, "counted", 1), *command(place, tmp_path / "cut", method, *within))
    monkeypatch.setattr(job, "make_plan", make_plan)
    calmix(*command(place, tmp_path / "cut", method, *within[:2], "--resume")).ok()
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")
    # The same but for the order of sums; without a bound as many run at a time as may.
    monkeypatch.undo()
    assert calmix(*command(place, tmp_path / "plenty", method, *within[:2])).code == 0
    few, many = (manifest(tmp_path / name)["recovery"] for name in ("cut", "plenty"))
    assert few["rows_at_once"] == 1 < many["rows_at_once"]
    assert few["after"] == pytest.approx(many["after"], rel=0.02)
