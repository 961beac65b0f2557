"""Recovery of mixtures of experts: experts' zeros stay, whether the files hold them one by one."""

import pytest
from transformers import AutoModelForCausalLM

import calmix as api
from calmix.models import find_blocks
from tests.recovery.conftest import save_pruned
from tests.recovery.test_recover import command, kl, manifest
from tests.tiny import load_weights, quick, save_tiny_model, tiny_ids

SLOW = ("--lr", 0.003)
KINDS = ("mixtral", "qwen3_moe", "gpt_oss", "sarvam_moe")  # the last's files hold q, k, v as one


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A set, and of every kind a dense model and a pruning of it."""
    folder = tmp_path_factory.mktemp("mixtures")
    manifest = {"seed": 0, "tokenizer": None}
    for kind in KINDS:
        dense = save_tiny_model(folder / kind, kind)
        opened = save_pruned(dense, folder / f"{kind}-pruned", tiny_ids())
        manifest["tokenizer"] = opened.tokenizer_fingerprint
    ids = tiny_ids(16)
    api.CalibrationSet(ids, ("x",) * len(ids), manifest).save(folder / "set")
    return folder


@pytest.mark.parametrize(
    "case",
    quick([("gpt_oss", "blocks"), ("sarvam_moe", "distill")],
          [("mixtral", "blocks"), ("qwen3_moe", "distill"), ("sarvam_moe", "blocks")]),
)  # fmt: skip
def test_zeros_of_every_expert_stay_and_the_rest_is_trained(calmix, place, tmp_path, case):
    kind, method = case
    output = tmp_path / "out"
    calmix(*command(place, output, method, *SLOW, pruned=f"{kind}-pruned", dense=kind)).ok()
    folders = (place / f"{kind}-pruned", output, place / kind)
    before, after = map(load_weights, folders[:2])
    assert {n: v.shape for n, v in before.items()} == {n: v.shape for n, v in after.items()}
    models = [*map(AutoModelForCausalLM.from_pretrained, folders)]
    zeros = weights = 0
    layers = (find_blocks(model).layers for model in models[:2])
    for was, layer in zip(*layers, strict=True):
        zero = was.view() == 0
        assert (layer.view()[zero] == 0).all(), layer.name
        assert (layer.view() != was.view()).sum() > 0.9 * (~zero).sum(), layer.name
        zeros, weights = zeros + int(zero.sum()), weights + zero.numel()
    told = manifest(output)["recovery"]
    assert (told["zeros"], told["weights"]) == (zeros, weights)
    before, after = kl(models, place, told)
    assert after < before
    if method == "distill":
        assert [before, after] == pytest.approx([told["before"], told["after"]], rel=0.05)


@pytest.mark.parametrize("case", quick([("magnitude", "blocks")], [("none", "distill")]))
def test_what_a_drop_leaves_is_recovered(calmix, place, tmp_path, case):
    method, recover = case
    sparse = ("--sparsity", 0.5, "--method", method) if method != "none" else ()
    dropped, drawn = tmp_path / "dropped", ("--calibration", place / "set")
    drop = ("prune", place / "mixtral", *drawn, "--drop-experts", 0.5, *sparse, "-o", dropped)
    calmix(*drop).ok()
    calmix(*command(place, tmp_path / "out", recover, *SLOW, pruned=dropped, dense="mixtral")).ok()
    told = manifest(tmp_path / "out")["recovery"]
    assert told["after"] < told["before"]
    assert told["zeros"] == (0 if method == "none" else told["weights"] // 2)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.num_local_experts == 2


def test_other_shapes_than_a_drop_leaves_are_refused(calmix, place, tmp_path):
    wider = save_tiny_model(
        tmp_path / "wider", "mixtral", num_local_experts=8, intermediate_size=48
    )
    asked = command(place, tmp_path / "out", "distill", pruned="mixtral-pruned", dense=wider)
    assert "was not pruned from" in calmix(*asked).line
