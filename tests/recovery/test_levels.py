"""Recovery of quantised models: levels move, while grids and the zeros of a mask stay."""

from functools import partial

import pytest
import torch

from calmix.errors import InputError
from calmix.pruning.solvers.grids import SCALES_FOLDER, Grid, read_blocks, read_grids
from calmix.recovery.training import Masters
from tests.forks import stopped
from tests.recovery.conftest import arm, command, manifest
from tests.tiny import hashes, load_weights, quick, save_tiny_model

KINDS = {
    "ecq": ("ecq", "--bits", 3),
    "groups": ("gptq,group=16", "--bits", 3),
    "joint": ("sparsegpt,bits=3,group=16", "--sparsity", 0.5),
}


def killed_and_resumed(calmix, place, cut, output, *more, pruned):
    """Check that a recovery which is killed and resumed gives the bytes of its `output`."""
    killed = command(place, cut, "distill", *more, pruned=pruned)
    stopped(partial(arm, "counted", 4), *killed)
    assert "resuming after" in calmix(*killed, "--resume").err
    assert hashes(cut) == hashes(output)


@pytest.mark.parametrize("name", quick(["joint"], KINDS))
def test_levels_stay_on_the_grid(calmix, place, tmp_path, name):
    output, cut, quantised = tmp_path / "out", tmp_path / "cut", tmp_path / name
    # Plain statistics leave more to recover.
    how = ("--method", *KINDS[name], "--calibration", place / "set", "--statistics", "plain")
    calmix("prune", place / "dense", *how, "-o", quantised).ok()
    more = ("--epochs", 4, "--lr", 0.001 if name == "ecq" else 0.01)
    ended = calmix(*command(place, output, "distill", *more, pruned=quantised)).ok()
    assert "weights stay on their grid" in ended.out
    recorded = manifest(output)["recovery"]
    assert recorded["after"] < 0.95 * recorded["before"]
    before, after, grids = load_weights(quantised), load_weights(output), read_grids(output)
    assert hashes(output / SCALES_FOLDER) == hashes(quantised / SCALES_FOLDER)
    assert recorded["quantised"] == sum(after[one].numel() for one in grids) == recorded["weights"]
    moved = 0
    for one, grid in grids.items():
        levels, old = grid.levels(after[one]), grid.levels(before[one])
        assert torch.equal(grid.values(levels).to(after[one].dtype), after[one])
        assert old.min() <= levels.min() <= levels.max() <= old.max()
        assert not after[one][after[one] == 0].signbit().any()
        if name == "joint":
            assert not after[one][before[one] == 0].any()
        moved += int((levels != old).sum())
    assert 0.001 * recorded["weights"] < moved < 0.5 * recorded["weights"]
    assert "problem" not in calmix("doctor", "inspect", output).ok().out  # zeros have moved too
    calmix("export", output, "--to", "pack", "-o", tmp_path / "pack").ok()
    if name != "joint":  # with a mask too: the others' state is a part of it
        return
    again, more = tmp_path / "again", ("--epochs", 1)  # of what is recovered already
    ended = calmix(*command(place, again, "distill", *more, pruned=output)).ok()
    assert "weights stay on their grid" in ended.out
    killed_and_resumed(calmix, place, cut, again, *more, pruned=output)


def test_steps_of_blocks_are_trained(calmix, place, tmp_path):
    """The levels of GGML's blocks stay, so a file of the same type holds the result."""
    coarse, output, cut = (tmp_path / name for name in ("coarse", "out", "cut"))
    how = ("--method", "ggml", "--pattern", "Q4_1 blocks", "--calibration", place / "set")
    calmix("prune", place / "dense", *how, "-o", coarse).ok()
    more = ("--epochs", 1, "--lr", 0.03)  # enough to move steps of 16 bits
    ended = calmix(*command(place, output, "distill", *more, pruned=coarse)).ok()
    assert "weights stay on their grid (100" in ended.out
    recorded = manifest(output)["recovery"]
    assert recorded["after"] < recorded["before"]
    before, after, weights = read_blocks(coarse), read_blocks(output), load_weights(output)
    assert before
    for name, blocks in after.items():
        assert torch.equal(blocks.values().to(weights[name].dtype), weights[name])
        assert not torch.equal(blocks.steps, before[name].steps)
        assert torch.equal(blocks.with_steps(before[name].steps).data, before[name].data)
    killed_and_resumed(calmix, place, cut, output, *more, pruned=coarse)


def test_masters_start_within_their_level():
    grid = Grid(torch.tensor([[0.5], [-0.25]]), 3.0, torch.zeros(8, dtype=torch.int8))
    stored = grid.values(torch.randint(-3, 4, (2, 8), generator=torch.Generator().manual_seed(0)))
    dense = stored + torch.linspace(-3, 3, 16).view(2, 8)
    for masked in (False, True):
        parameters = {"w": torch.nn.Parameter(stored.clone())}
        masters = Masters(
            parameters,
            lambda name: stored,
            {"w"} if masked else (),
            {"w": grid},
            lambda name: dense,
            {},
        )
        begun = masters.values["w"].detach()
        assert torch.equal(masters.rounded("w"), stored)
        if masked:
            assert not begun[stored == 0].any()
        else:
            moved = (begun - stored).sign() == (dense - stored).sign()
            assert moved[dense != stored].all()
    begun.fill_(99)
    assert masters.rounded("w").abs().max() == stored.abs().max()
    other = {"w": Grid(torch.full((2, 1), 1e-30), 0.0)}
    with pytest.raises(InputError, match="the scales of w are not those of its weights"):
        Masters(parameters, lambda name: stored, (), other, lambda name: dense, {})


def test_levels_stay_within_the_range_of_their_group():
    """With zero points, a group's levels may reach from 0 to 3, -3 to 0 or -1 to 2."""
    levels = torch.tensor([0.0, 3, 1, 2, 0, -3, -1, -2, -1, 2, 0, 1]).expand(2, 12)
    grid = Grid(torch.full((2, 3), 0.5), 2.0)
    weight = grid.values(levels)
    own = {"w": torch.nn.Parameter(weight.clone())}
    masters = Masters(own, lambda name: weight, (), {"w": grid}, lambda name: weight, {})
    for far, reached in ((9.0, [3, 0, 2]), (-9.0, [0, -3, -1])):
        masters.values["w"].data.fill_(far)
        assert (
            grid.levels(masters.rounded("w")).view(2, 3, 4) == torch.tensor(reached)[:, None]
        ).all()


@pytest.mark.parametrize("case", [("gpt2", "distill"), ("mixtral", "blocks")])
def test_weights_without_stored_grid_are_fixed(calmix, place, tmp_path, case):
    """Matrices that lie transposed, and experts; the rest is trained."""
    kind, method = case
    dense, bits, output = (tmp_path / name for name in ("dense", "bits", "out"))
    save_tiny_model(dense, kind)
    drawn = ("--calibration", place / "text.txt", "--rows", 32, "--length", 32, "--leakage", "off")
    calmix("prune", dense, "--method", "ecq", "--bits", 2, *drawn, "-o", bits).ok()
    how = ("--method", method, "--epochs", 1, "--lr", 0.005)
    ended = calmix("recover", bits, "--against", dense, *drawn, *how, "-o", output).ok()
    assert "weights stay on their grid (100" in ended.out
    before, after, grids = load_weights(bits), load_weights(output), read_grids(output)
    same = {name: torch.equal(before[name], after[name]) for name in before}
    stored = [name for name in before if "experts" in name or (kind == "gpt2" and ".h." in name)]
    assert stored
    assert all(same[name] for name in stored if before[name].ndim > 1)
    assert not {*stored} & grids.keys()
    assert method == "distill" or not all(same.values())
    calmix("doctor", "inspect", output).ok()
