"""Prune and recover in one run: what both verbs in a row give, stopped anywhere, every mistake."""

import json
from functools import partial

import pytest

from calmix.cli import app
from calmix.pruning.work import WorkFolder
from calmix.recovery import chain
from tests.conftest import write_text_file
from tests.forks import stopped
from tests.recovery.stopper import arm, stop
from tests.recovery.test_recover import manifest
from tests.tiny import hashes, save_tiny_model

ROWS = ("--rows", 16, "--length", 32, "--leakage", "off")
RECOVER = ("--recover", "distill,epochs=1")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chain")
    save_tiny_model(folder / "dense")
    write_text_file(folder / "text.txt")
    return folder


def prune(place, output, *more, sparsity=0.5):
    return (
        "prune", place / "dense", "--calibration", place / "text.txt", *ROWS, "--sparsity",
        sparsity, *more, "-o", output,
    )  # fmt: skip


def beside(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("method", ["distill", pytest.param("blocks", marks=pytest.mark.long)])
def test_it_gives_what_the_two_verbs_give(calmix, place, tmp_path, method):
    ended = calmix(*prune(place, tmp_path / "pruned"))
    assert ended.code == 0, ended.err
    ended = calmix(
        "recover", tmp_path / "pruned", "--against", place / "dense", "--calibration",
        place / "text.txt", *ROWS, "--method", method, "--epochs", 1, "-o", tmp_path / "two",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    ended = calmix(*prune(place, tmp_path / "one", "--recover", f"{method},epochs=1"))
    assert ended.code == 0, ended.err
    assert "held-out rows (2 of 16)" in ended.out
    assert beside(tmp_path) == ["one", "pruned", "two"]
    first, second = hashes(tmp_path / "one"), hashes(tmp_path / "two")
    del first["calmix.json"], second["calmix.json"]
    assert first == second
    one, two = manifest(tmp_path / "one"), manifest(tmp_path / "two")
    assert one["model"].pop("name") == f"{place / 'dense'}, sparsegpt-0.5"
    assert two["model"].pop("name") == str(tmp_path / "pruned")
    del one["manifest_sha256"], two["manifest_sha256"]
    assert one == two
    run = json.loads((tmp_path / "one" / "calmix-run.json").read_text(encoding="utf-8"))
    assert run["pruned"]["seconds"]["total"] > 0


def block_counted(number):
    """End once that many blocks are pruned."""
    keep = WorkFolder.keep

    def kept(self, **facts):
        keep(self, **facts)
        if facts.get("done", 0) >= number:
            stop()

    WorkFolder.keep = kept


def both_stand():
    """End when the output has its name, and the stages are there yet."""
    chain._remove = lambda stage: stop()


@pytest.fixture(scope="module")
def whole(place):
    """The output of an undisturbed run."""
    output = place / "whole"
    app([str(one) for one in prune(place, output, *RECOVER)], standalone_mode=False)
    return output


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(partial(block_counted, 1), marks=pytest.mark.long),
        partial(arm, "counted", 2),
        both_stand,
    ],
    ids=["pruning", "recovering", "standing"],
)
def test_killed_anywhere_it_goes_on_to_the_same_bytes(calmix, place, whole, tmp_path, moment):
    stopped(moment, *prune(place, tmp_path / "cut", *RECOVER))
    stands = (tmp_path / "cut").exists()
    assert stands == (moment is both_stand)
    ended = calmix(*prune(place, tmp_path / "cut", *RECOVER))
    assert ("exists and is not empty" if stands else "with --resume") in ended.line
    ended = calmix(*prune(place, tmp_path / "cut", *RECOVER, "--resume"))
    assert ended.code == 0, ended.err
    assert ("finished by an earlier run" if stands else "resuming after") in ended.err
    assert beside(tmp_path) == ["cut"]
    assert hashes(tmp_path / "cut") == hashes(whole)
    ended = calmix(*prune(place, tmp_path / "cut", "--recover", "distill", "--resume"))
    assert "exists and is not empty" in ended.line


def test_several_targets_and_a_method_without_data(calmix, place, tmp_path):
    recover = ("--recover", "blocks,epochs=1", "--method", "magnitude")
    ended = calmix(*prune(place, tmp_path / "all", *recover, sparsity="0.4,0.6"))
    assert ended.code == 0, ended.err
    assert beside(tmp_path / "all") == ["magnitude-0.4", "magnitude-0.6"]
    assert calmix(*prune(place, tmp_path / "one", *recover, sparsity=0.6)).code == 0
    assert hashes(tmp_path / "all" / "magnitude-0.6") == hashes(tmp_path / "one")
    told = manifest(tmp_path / "one")
    assert told["pruned"]["calibration"] is None
    assert told["calibration"]["rows"] == 16


def test_every_mistake_is_one_line(calmix, place, tmp_path):
    few = ("--rows", 4, "--recover", "distill")
    for more, told in (
        (("--recover", "distil"), "did you mean distill"),
        (("--recover", "distill,epoch=1"), "epoch has no effect with recovery distill"),
        (("--recover", "distill,epochs=two"), "--epochs two: must be a valid integer"),
        (("--recover", "blocks,epochs"), "'epochs' is not of the form option=value"),
        (("--recover", "blocks,lr=0"), "--lr 0: must be greater than 0"),
        (("--recover", "blocks", "--drop-experts", 0.5), "this model has no experts"),
        (few, "set of 4 rows is too small to recover on"),
        (("--recover", "distill", "--max-memory", "1MiB"), "of memory cannot hold one block"),
    ):
        ended = calmix(*prune(place, tmp_path / "out", *more))
        assert ended.code == 2, more
        assert told in ended.err.splitlines()[-1], (more, ended.err)
        assert beside(tmp_path) == [], more
    ended = calmix(
        "prune", place / "dense", "--method", "magnitude", "--sparsity", 0.5, "--recover",
        "distill", "-o", tmp_path / "out",
    )  # fmt: skip
    assert "--recover needs --calibration" in ended.line


@pytest.mark.parametrize(("kind", "more", "stages"), [
    ("dense", ("--sparsity", "0.4,0.6", "--recover", "blocks", "--allocation", "owl"), [
        "prune, sparsegpt-0.4", "recover by blocks, sparsegpt-0.4", "prune, sparsegpt-0.6",
        "recover by blocks, sparsegpt-0.6",
    ]),
    ("mixtral", ("--drop-experts", 0.25), ["prune, drop-0.25"]),
    ("mixtral", ("--drop-experts", 0.25, "--sparsity", 0.5), ["prune, sparsegpt-0.5"]),
])  # fmt: skip
def test_a_dry_run_tells_what_it_takes_and_writes_nothing(
    calmix, place, tmp_path, kind, more, stages
):
    model = place / "dense" if kind == "dense" else save_tiny_model(tmp_path / "model", kind)
    before = beside(tmp_path)
    asked = ("prune", model, "--calibration", place / "text.txt", *ROWS, *more, "--dry-run",
             "-o", tmp_path / "out")  # fmt: skip
    ended = calmix(*asked, "--json")
    assert ended.code == 0, ended.err
    told = json.loads(ended.out)
    assert [one["stage"] for one in told] == stages
    stored = (model / "model.safetensors").stat().st_size
    for one in told:
        assert one["seconds"] > 0
        assert one["memory"] > 0.2e9
        assert 0.9 * stored < one["disk"] < stored
    assert "cannot hold one block" in calmix(*asked, "--max-memory", "1MiB").line
    assert beside(tmp_path) == before
