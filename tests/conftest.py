"""Fixtures shared by all tests. Nothing here reaches the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
# One thread a process: workers share the cores, sums round alike in all, and a fork can compute.
os.environ["OMP_NUM_THREADS"] = "1"

import atexit
import gc
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import hypothesis
import pytest

# Neither torch nor transformers: the process that only hands out the tests need not load them.
from calmix import machine
from calmix.cli import main
from tests.browser import PROGRAM, browser

# Nor does a test wait for the disk, or for garbage to be collected; `tests/test_files.py` and
# `tests/test_machine.py` see that both are asked for.
os.fsync = lambda handle: None
machine.gc = SimpleNamespace(collect=lambda: 0)
# The same examples every time, none told by a clock; `make test-long` tries more of them.
hypothesis.settings.register_profile(
    "calmix",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=200 if os.environ.get("CALMIX_LONG") else 25,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
# For `make mutants`: an example that fails is not made smaller, which takes most of the time.
hypothesis.settings.register_profile(
    "once",
    hypothesis.settings.get_profile("calmix"),
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)
hypothesis.settings.load_profile("calmix")


@dataclass(frozen=True)
class Ended:
    """How a run of the command line ended."""

    code: int
    out: str
    err: str

    def ok(self):
        """Itself, once it is sure that it ended well."""
        assert self.code == 0, self.err
        return self

    @property
    def line(self):
        """The one line a mistake must give, and exit code 2."""
        assert self.code == 2, self.err
        lines = self.err.strip().splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: ")
        return lines[0]


@pytest.fixture
def calmix(monkeypatch, capfd):
    """Run the command line in this process and return how it ended."""
    monkeypatch.setattr("calmix.progress.EVERY", float("inf"))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["calmix", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        captured = capfd.readouterr()
        return Ended(code, captured.out, captured.err)

    return run


def pytest_collection_finish():
    """Exclude everything loaded so far from garbage collection."""
    gc.freeze()
    atexit.register(gc.unfreeze)


def pytest_collection_modifyitems(items):
    """Leave out what only `make test-long` runs."""
    if not os.environ.get("CALMIX_LONG"):
        skipped = pytest.mark.skip(reason="runs in make test-long (CALMIX_LONG=1)")
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(skipped)


@pytest.fixture(scope="session")
def page():
    """A page of a real browser; for tests that need one."""
    assert PROGRAM is not None
    with browser(PROGRAM) as opened:
        yield opened


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A tiny random llama with a byte-level tokenizer, as a local model folder."""
    from tests.tiny import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "llama")


def write_text_file(path):
    """Write a text file of some ten thousand tokens under the tiny tokenizer."""
    import torch

    words = ["apple", "bread", "candle", "dune", "prime", "sum", "return", "river"]
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(words), (2000,), generator=generator).tolist()
    path.write_text(" ".join(words[i] for i in picks), encoding="utf-8")
    return path


@pytest.fixture
def text_file(tmp_path):
    """A text file of some ten thousand tokens under the tiny tokenizer."""
    return write_text_file(tmp_path / "text.txt")


@pytest.fixture(scope="session")
def made(tiny_folder, tmp_path_factory):
    """A folder with a result of every kind, made from a user's own text `mine`."""
    from calmix.cli import app
    from calmix.pruning.engine import Run
    from tests import synthetic
    from tests.pruning.stopper import interrupting
    from tests.tiny import save_tiny_model

    base, small = tmp_path_factory.mktemp("made"), ("--rows", 8, "--length", 32, "--leakage", "off")
    own = ("--sources", "own.yaml")
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
        calmix("prune", tiny_folder, "-o", output, "--calibration", "mine", *own, *small, *more)

    def calibrate(output, text, *more):
        calmix("calibrate", text, "-m", tiny_folder, "-o", output, *small, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(base)
        prune("pruned", "--sparsity", 0.5, "--seed", 3)
        for share in (0.4, 0.5):
            how = ("--calibration", "self-cal", *small, "--sparsity", share)
            calmix("prune", tiny_folder, "-o", f"several/sparsegpt-{share}", *how)
        # A pruning run without text must not get a warning of few tokens after a recovery.
        calmix("prune", tiny_folder, "-o", "bare", "--sparsity", 0.5, "--method", "magnitude")
        how = ("--method", "blocks", "--epochs", 1, "--calibration", "mine", *own, *small)
        calmix("recover", "bare", "--against", tiny_folder, *how, "-o", "recovered")
        text = ("--calibration", "text.txt", *small)
        calmix("prune", "mixture", *text, "--drop-experts", 0.25, "-o", "dropped")
        how = (*text, "--bits", 3.5, "--embeddings", 5, "--skip", "*.o_proj")
        calmix("prune", tiny_folder, *how, "-o", "quantised")
        (base / "pruned" / "README.md").write_text("a card", encoding="utf-8")
        (base / "other.json").write_text('{"kind": "other"}', encoding="utf-8")
        calmix("export", "--to", "pack", "pruned", "-o", "pack")
        calmix("export", "--to", "pack", tiny_folder, "-o", "dense-pack")
        calibrate("set", "mine:0.3,more.txt:0.7", *own, "--packing", "concat")
        calibrate("written", "self-written")
        patch.setattr(Run, "block", interrupting(Run.block))
        prune("cut", "--sparsity", 0.5)
    few = synthetic.Plan(seeds=(0,), sources=("a", "b", "c", "d"), dimensions=("general", "code"))
    synthetic.save(synthetic.study(few), base / "results")
    return base
