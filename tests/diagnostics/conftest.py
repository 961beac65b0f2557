"""Results of every kind, created once."""

import pytest

from calmix.cli import app
from calmix.pruning.engine import Run
from tests import synthetic
from tests.conftest import write_text_file
from tests.pruning.stopper import interrupting
from tests.tiny import save_tiny_model

SMALL = ("--rows", 8, "--length", 32, "--leakage", "off")
OWN = ("--sources", "own.yaml")


@pytest.fixture(scope="session")
def made(tiny_folder, tmp_path_factory):
    """A folder with a result of every kind, made from a user's own text `mine`."""
    base = tmp_path_factory.mktemp("made")
    write_text_file(base / "text.txt")
    other = " ".join(f"other words {number}" for number in range(800))
    (base / "more.txt").write_text(other, encoding="utf-8")
    (base / "own.yaml").write_text(
        "mine: {licence: MIT, dimension: code, reader: {type: file, path: text.txt}}\n", "utf-8"
    )
    save_tiny_model(base / "mixture", "qwen3_moe")

    def calmix(*arguments):
        app([str(one) for one in arguments], standalone_mode=False)

    def prune(output, *more):
        calmix("prune", tiny_folder, "-o", output, "--calibration", "mine", *OWN, *SMALL, *more)

    def calibrate(output, text, *more):
        calmix("calibrate", text, "-m", tiny_folder, "-o", output, *SMALL, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(base)
        prune("pruned", "--sparsity", 0.5, "--seed", 3)
        for share in (0.4, 0.5):
            own = ("--calibration", "self-cal", *SMALL, "--sparsity", share)
            calmix("prune", tiny_folder, "-o", f"several/sparsegpt-{share}", *own)
        # A pruning run without text must not get a warning of few tokens after a recovery.
        calmix("prune", tiny_folder, "-o", "bare", "--sparsity", 0.5, "--method", "magnitude")
        how = ("--method", "blocks", "--epochs", 1, "--calibration", "mine", *OWN, *SMALL)
        calmix("recover", "bare", "--against", tiny_folder, *how, "-o", "recovered")
        text = ("--calibration", "text.txt", *SMALL)
        calmix("prune", "mixture", *text, "--drop-experts", 0.25, "-o", "dropped")
        how = (*text, "--bits", 3.5, "--embeddings", 5, "--skip", "*.o_proj")
        calmix("prune", tiny_folder, *how, "-o", "quantised")
        (base / "pruned" / "README.md").write_text("a card", encoding="utf-8")
        (base / "other.json").write_text('{"kind": "other"}', encoding="utf-8")
        calmix("export", "--to", "pack", "pruned", "-o", "pack")
        calmix("export", "--to", "pack", tiny_folder, "-o", "dense-pack")
        calibrate("set", "mine:0.3,more.txt:0.7", *OWN, "--packing", "concat")
        calibrate("written", "self-written")
        calibrate("continued", "sgs,seeds=mine", *OWN)
        patch.setattr(Run, "block", interrupting(Run.block))
        prune("cut", "--sparsity", 0.5)
    few = synthetic.Plan(seeds=(0,), sources=("a", "b", "c", "d"), dimensions=("general", "code"))
    synthetic.save(synthetic.study(few), base / "results")
    return base
