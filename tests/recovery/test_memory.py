"""Memory plans of recovery, and runs under a small limit."""

import math
from functools import partial

import pytest

from calmix.memory import plan_recovery
from calmix.models.streaming import StreamedModel
from calmix.recovery import running
from calmix.recovery.training import trained_weights
from tests.forks import stopped
from tests.recovery.conftest import METHODS, arm, command, manifest
from tests.tiny import hashes, quick, save_tiny_model


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_memory_is_saved_before_rows(tmp_path, kind):
    model = StreamedModel(str(save_tiny_model(tmp_path / kind, kind)))
    for method in METHODS:
        trained = trained_weights(model.model, method)

        def made(room, trained=trained):
            return plan_recovery(model, 16, [4, 2, 1], room, trained)

        plan, plans = made(math.inf), []
        while not plans or plan != plans[-1]:
            plans.append(plan)
            plan = made(plan[-1] - 1)
        assert made(plans[1][-1]) == plans[1]
        rows, sparing, needed = zip(*plans, strict=True)
        assert (rows[:2], sparing[:2]) == ((4, 4), (False, True))
        assert (rows[-1], sparing[-1]) == (1, True)
        assert list(needed) == sorted(needed, reverse=True)
    model.close()


def test_tied_head_counts_once(tmp_path):
    needed = []
    for tied in (False, True):
        folder = save_tiny_model(tmp_path / f"{tied}", "llama", tie_word_embeddings=tied)
        model = StreamedModel(str(folder))
        trained = trained_weights(model.model, "distill")
        needed.append(plan_recovery(model, 16, [1], math.inf, trained)[-1])
        head = model.model.get_output_embeddings().weight.nbytes
        model.close()
    assert needed[0] - needed[1] == head


@pytest.mark.parametrize("method", quick(["blocks"], METHODS))
def test_resume_keeps_rows_per_step(calmix, place, tmp_path, monkeypatch, method):
    drawn = ("--calibration", place / "text.txt", "--rows", 12, "--length", 32, "--leakage", "off")

    def request(name, *more):
        return command(place, tmp_path / name, method, *drawn, "--epochs", 1, *more)

    within = ("--max-memory", "64GiB")
    with monkeypatch.context() as patched:  # as if none were free
        patched.setattr(running, "plan_recovery", lambda *of: plan_recovery(*of[:3], 0, of[4]))
        calmix(*request("whole", *within)).ok()
        stopped(partial(arm, "counted", 1), *request("cut", *within))
    calmix(*request("cut", "--resume")).ok()
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")
    # The same but for the order of sums; without a bound as many run at a time as may.
    calmix(*request("plenty")).ok()
    few, many = (manifest(tmp_path / name)["recovery"] for name in ("cut", "plenty"))
    assert few["rows_at_once"] == 1 < many["rows_at_once"]
    assert few["after"] == pytest.approx(many["after"], rel=0.02)
