"""What a recovery spares to stay within its memory: the plan, and runs that follow a small one."""

import math
from functools import partial

import pytest
import torch

from calmix.models.streaming import StreamedModel
from calmix.recovery import job
from calmix.recovery.memory import make_plan
from tests.forks import stopped
from tests.recovery.stopper import arm
from tests.recovery.test_recover import METHODS, command, manifest, place
from tests.tiny import hashes, quick, save_tiny_model

__all__ = ["place"]  # a fixture


@pytest.mark.parametrize(("kind", "widths"), [
    ("llama", 2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64)),
    ("mixtral", 2 * (32 + 32) + 2 * (32 + 16) + 2 * 3 * (32 + 64)),  # two of four experts
])  # fmt: skip
def test_what_is_needed_and_what_is_spared_first(tmp_path, kind, widths):
    """What changes no number is spared first, then rows; by the formulas of the documentation."""
    model = StreamedModel(str(save_tiny_model(tmp_path / kind, kind)))
    block = sum(p.numel() for p in model.blocks.blocks[0].parameters())
    whole = 2 * block + 320 * 32 + 32  # embeddings and the last norm
    for method in METHODS:

        def made(room, method=method):
            return make_plan(model, method, torch.float32, 16, [4, 2, 1], room)

        plan, plans = made(math.inf), []
        while not plans or plan != plans[-1]:
            plans.append(plan)
            plan = made(plan.needed - 1)
        assert made(plans[1].needed) == plans[1]
        assert [(one.rows, one.sparing) for one in plans[:2]] == [(4, False), (4, True)]
        assert (plans[-1].rows, plans[-1].sparing) == (1, True)
        assert [one.needed for one in plans] == sorted((o.needed for o in plans), reverse=True)
        activations = 64 * (6 * 32 + widths) * 4
        for one, blocks_kept, copies in ((plans[0], 2, 4), (plans[1], 1, 2)):
            wanted = block * (20 + 4 * copies) + 5 * activations
            if method == "distill":
                trained = whole - 320 * 32
                logits = 5 * 4 * 64 * 320
                between = 2 * 64 * 32 * 4
                wanted = 4 * whole + 20 * trained + between + logits
                wanted += (2 + blocks_kept) * activations
            assert one.needed == wanted
    model.close()


@pytest.mark.parametrize("method", quick(["blocks"], METHODS))
def test_it_goes_on_with_as_many_rows_at_a_time(calmix, place, tmp_path, monkeypatch, method):
    monkeypatch.setattr(
        job, "make_plan", lambda *of: make_plan(*of[:-1], 0)
    )  # as if none were free
    within = ("--epochs", 1, "--max-memory", "64GiB")
    assert calmix(*command(place, tmp_path / "whole", method, *within)).code == 0
    stopped(partial(arm, "counted", 1), *command(place, tmp_path / "cut", method, *within))
    monkeypatch.setattr(job, "make_plan", make_plan)
    calmix(*command(place, tmp_path / "cut", method, *within[:2], "--resume")).ok()
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")
    # The same but for the order of sums; without a bound as many run at a time as may.
    assert calmix(*command(place, tmp_path / "plenty", method, *within[:2])).code == 0
    few, many = (manifest(tmp_path / name)["recovery"] for name in ("cut", "plenty"))
    assert few["rows_at_once"] == 1 < many["rows_at_once"]
    assert few["after"] == pytest.approx(many["after"], rel=0.02)
