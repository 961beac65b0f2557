"""Several processes for one model: the masks of one process, and mistakes told once."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from calmix import precision
from calmix.errors import SolverError
from calmix.models import find_blocks, open_model
from calmix.pruning import Pattern, SemiStructured, Unstructured, checkpoint
from calmix.pruning.engine import Run, run_through
from calmix.pruning.expert_pruning import ScorePass
from calmix.pruning.methods import admm, get_method
from tests.forks import command, forked, ranks
from tests.pruning.stopper import stop
from tests.pruning.toy import pruning_of
from tests.tiny import load_weights, save_tiny_model, tiny_ids, tiny_model

ROOT = Path(__file__).parents[2]
SMALL = ("--rows", 7, "--length", 32, "--leakage", "off", "--sparsity", 0.5)


@dataclass(frozen=True)
class Case:
    """A prune; of `experts` each mixture has so many, and few tokens reach them."""

    method: str
    pattern: Pattern
    propagation: str = "sequential"
    kind: str = "llama"
    experts: int = 0

    def model(self):
        counts = dict.fromkeys(("num_experts", "num_local_experts"), self.experts)
        return tiny_model(self.kind, **counts if self.experts else {})

    def ids(self):
        return tiny_ids(3, 10) if self.experts else tiny_ids(5, 32)


CASES = [
    Case("admm,iterations=4,refit=2", SemiStructured(2, 4)),
    Case("wanda,refit=2", Unstructured(0.5), "block"),
    Case("sparsegpt", Unstructured(0.5), kind="mixtral", experts=16),
    Case("sparsegpt", SemiStructured(2, 4), "block", "qwen3_moe", 16),
]


def pruned(case):
    model, ids = case.model(), case.ids()
    run = Run(model, find_blocks(model), get_method(case.method), case.pattern, case.propagation)
    run.expert_bytes = 3 * 2 * 4 * 32**2  # statistics of three experts at a time
    run.sources = ["first", "first", "second"] if case.experts else []
    run_through(run, ids, micro_tokens=2 * ids.shape[1])
    return dict(model.named_parameters()), run.report


def scores():
    model = CASES[2].model()
    look = ScorePass(model, find_blocks(model))
    run_through(look, CASES[2].ids())
    return look.scores


def together_and_alone():
    """Two processes that end well if both have the weights of the first, and that one the masks it
    has alone."""
    # Alternating directions make much of last bits: matrix units are not to round factors here.
    exact = partial(precision.bfloat16_products, allowed=False)
    for module in (precision, admm):
        module.bfloat16_products = lambda allowed=True: exact()
    first = os.environ["RANK"] == "0"
    expected, alone = [pruned(case) if first else None for case in CASES], scores()
    dist.init_process_group("gloo")
    for case, before in zip(CASES, expected, strict=True):
        check(case, before)
    together = scores()
    for name, values in alone.items():
        assert together[name] == pytest.approx(values, rel=1e-5)
    dist.destroy_process_group()


def check(case, expected):
    """Prune together, and compare with the first process's and with what that has done alone."""
    together, report = pruned(case)
    for value in together.values():
        other = value.detach().clone()
        dist.broadcast(other, 0)
        assert torch.equal(other, value), case
    if expected is None:
        return
    alone, told = expected
    # Alternating directions make much of last bits: with the rows in 60 other orders one process
    # has down to 95 % of the same mask, and errors that are up to 3 % apart.
    loose = "admm" in case.method
    masks, errors = (0.9, 0.2) if loose else (0.995, 1e-3)
    assert report.tokens == told.tokens == case.ids().numel()
    for name, value in together.items():
        ours, theirs = (one.view(-1, value.shape[-1]) for one in (value, alone[name]))
        same = (ours == 0) == (theirs == 0)
        assert same.float().mean() > masks, (case, name, same.float().mean())
        if not loose:  # a row corrects its own weights only: of the same mask it is the same
            rows = same.all(1)
            assert rows.float().mean() > 0.9, (case, name)
            torch.testing.assert_close(ours[rows], theirs[rows], rtol=0.05, atol=0.03)
    for ours, theirs in zip(report.layers, told.layers, strict=True):
        for name in ("pruned", "dead_inputs", "factor_dtype", "tokens"):
            assert getattr(ours, name) == getattr(theirs, name), (case, ours.name, name)
        for own, other in ((ours.error, theirs.error), (ours.damping, theirs.damping)):
            near = other if other is None else pytest.approx(other, rel=errors)
            assert own == near, (case, ours.name, own, other)
    assert report.experts == told.experts
    if case.experts == 16:  # some see tokens in one process only, and some in none
        by_process = [one.sources.values() for one in told.experts]
        seen = {(a > 0, b > 0) for both in by_process for a, b in zip(*both, strict=True)}
        assert len(seen) == 4, seen


def launched(arguments, log):
    """Run the command line in two processes of the real launcher; return what they print."""
    launch = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "calmix", *map(str, arguments),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(launch, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def check_masks(folder, other):
    one, two = load_weights(folder), load_weights(other)
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert ((value == 0) == (two[name] == 0)).float().mean() > 0.99, name
    return one, two


def test_two_processes_prune_as_one(tmp_path):
    ended = ranks(together_and_alone, 2, tmp_path / "log")
    assert [one.code for one in ended] == [0, 0], [one.errors for one in ended]


@pytest.mark.parametrize("launch", [forked, pytest.param(launched, marks=pytest.mark.long)])
def test_the_command_line_shares_the_work(calmix, tiny_folder, text_file, tmp_path, launch):
    """Several targets, a look at the dense model before, and embeddings behind."""
    asked = ("prune", tiny_folder, "--calibration", text_file, *SMALL[:-1], "0.4,0.6",
             "--allocation", "owl", "--embeddings", 4, "-o")  # fmt: skip
    assert launch((*asked, tmp_path / "two"), tmp_path / "log").count("weights pruned") == 2
    assert calmix(*asked, tmp_path / "one").code == 0
    for name in ("sparsegpt-0.4", "sparsegpt-0.6"):
        one, two = check_masks(tmp_path / "one" / name, tmp_path / "two" / name)
        (embedded,) = (key for key in one if "embed_tokens" in key)
        assert (one[embedded] == two[embedded]).float().mean() > 0.99
        run = json.loads((tmp_path / "two" / name / "calmix-run.json").read_text())
        assert run["processes"] == 2
    assert len(list((tmp_path / "two").iterdir())) == 2


def test_two_drop_the_experts_that_one_drops(calmix, text_file, tmp_path, monkeypatch):
    """And go on with them when the one that does not count was killed."""
    mixture = save_tiny_model(tmp_path / "model", "mixtral")
    asked = ("prune", mixture, "--calibration", text_file, *SMALL, "--drop-experts", 0.25, "-o")

    def ends():
        if os.environ["RANK"] == "1":
            checkpoint.prune_streamed = lambda *given, **more: stop()
        command(*asked, tmp_path / "two")()

    first, second = ranks(ends, 2, tmp_path / "log")
    assert (first.code, second.code) == (2, -9)
    assert "the experts' scores are kept in" in first.errors
    monkeypatch.setattr(ScorePass, "block", None)  # nothing is scored again
    told = forked((*asked, tmp_path / "two", "--resume"), tmp_path / "log")
    monkeypatch.undo()
    assert "resuming after 0 of 2 blocks" in told
    assert calmix(*asked, tmp_path / "one").code == 0
    one, two = (pruning_of(tmp_path / name) for name in ("one", "two"))
    for ours, theirs in zip(one["dropped"], two["dropped"], strict=True):
        assert ours["kept"] == theirs["kept"]
        assert ours["scores"] == pytest.approx(theirs["scores"])
    assert one["experts"] == two["experts"]
    check_masks(tmp_path / "one", tmp_path / "two")


def damaged(folder):
    opened = open_model(str(save_tiny_model(folder)))
    opened.model.model.layers[1].self_attn.k_proj.weight[3, 5] = float("nan")
    opened.model.save_pretrained(folder)
    return folder


def told_once(act, tmp_path):
    """The one line of two processes that both end with exit code 2 and leave nothing."""
    ended = ranks(act, 2, tmp_path / "log")
    assert [one.code for one in ended] == [2, 2], [one.errors for one in ended]
    lines = [text for one in ended for text in one.errors.splitlines()]
    (told,) = [text for text in lines if not text.startswith(("calibrating", "[Gloo]"))]
    assert told.startswith("error: ")
    assert not list(tmp_path.glob("out*"))
    return told


def test_a_mistake_is_told_once_and_all_end(tiny_folder, text_file, tmp_path):
    drawn, output = ("--calibration", text_file), ("-o", tmp_path / "out")
    asked = {
        "1 calibration rows are too few for 2": (tiny_folder, *drawn, *SMALL, "--rows", 1),
        "k_proj: its weights are not finite": (damaged(tmp_path / "nan"), *drawn, *SMALL),
        "no model folder": (tmp_path / "nowhere", *drawn, *SMALL),
        "is one device": (tiny_folder, *drawn, *SMALL, "--device", "cuda:1"),
    }
    for line, arguments in asked.items():
        assert line in told_once(command("prune", *arguments, *output), tmp_path)

    def fail(self, index):
        raise SolverError("met alone")

    def act():
        if os.environ["RANK"] == "1":
            Run.block = fail
        command("prune", tiny_folder, *drawn, *SMALL, *output)()

    assert told_once(act, tmp_path) == "error: met alone"


def test_a_world_size_without_a_launcher_is_refused(calmix, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    asked = ("prune", tiny_folder, "--method", "magnitude", "--sparsity", 0.5, "-o", tmp_path / "x")
    assert "WORLD_SIZE is set, but there is no launcher: " in calmix(*asked).line
