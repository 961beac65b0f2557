"""Recovery from checkpoint to checkpoint: zeros, held-out rows, interruption, every mistake."""

import errno
import json
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import calmix as api
from calmix.errors import disk_errors
from calmix.pruning.work import WorkFolder
from calmix.recovery import blocks as by_block
from calmix.recovery import distill
from calmix.recovery.distill import student_loss
from tests.forks import stopped
from tests.recovery.conftest import METHODS, arm, command, manifest
from tests.tiny import hashes, load_weights, quick, save_tiny_model, tiny_ids, tiny_model


def kl(models, place, told):
    """KL from the last model to the others on the held-out rows of a recovery."""
    ids = load_file(place / "set" / "calibration.safetensors")["ids"][told["held_out"]]
    with torch.no_grad():
        *others, p = (model(ids).logits.float().log_softmax(-1) for model in models)
    return [float((p.exp() * (p - one)).sum(-1).mean()) for one in others]


@pytest.mark.parametrize(
    ("method", "pruned"), [("distill", "half"), ("blocks", "half"), ("distill", "2of4")]
)
def test_recovery_keeps_zeros_and_improves(place, whole, method, pruned):
    output = whole(method, pruned)
    before, after = map(load_weights, (place / pruned, output))
    assert before.keys() == after.keys()
    nonzero = trained = 0
    for name, value in after.items():
        assert value.dtype == before[name].dtype
        same, zero = torch.equal(value, before[name]), before[name] == 0
        if "embed" in name or "lm_head" in name:
            assert same
        elif value.ndim == 1:  # norms are trained; the last one belongs to no block
            assert same == (method == "blocks" and name == "model.norm.weight"), name
        else:
            assert (value[zero] == 0).all()
            assert not value[zero].signbit().any()
            nonzero += int((~zero).sum())
            trained += int((value != before[name]).sum())
    assert trained > 0.75 * nonzero  # what is rounded to bfloat16 moves less often
    recorded, drawn = manifest(output), json.loads((place / "set/manifest.json").read_text())
    recovery = recorded["recovery"]
    assert recovery["after"] < 0.95 * recovery["before"]
    assert recovery["zeros"] == recovery["weights"] // 2
    assert recorded["kind"] == "recovered checkpoint"
    assert recorded["calibration"]["sha256"] == drawn["sha256"]
    folders = (place / pruned, output, place / "dense")
    gaps = kl(map(AutoModelForCausalLM.from_pretrained, folders), place, recovery)
    assert gaps[1] < 0.95 * gaps[0]
    if method == "distill":
        assert gaps == pytest.approx([recovery["before"], recovery["after"]], rel=0.05)


MOMENTS = [("blocks", "written", 2), ("blocks", "counted", 1)]
MOMENTS += [("distill", "counted", 8), ("distill", "renamed", 0)]


@pytest.mark.parametrize("case", quick([("distill", "written", 8)], MOMENTS))
def test_killed_recovery_resumes_to_the_same_bytes(calmix, place, whole, tmp_path, case):
    method, moment, number = case
    stopped(partial(arm, moment, number), *command(place, tmp_path / "cut", method))
    unfinished = moment != "renamed"
    if unfinished:
        ended = calmix(*command(place, tmp_path / "cut", method))
        assert "with --resume" in ended.line
        ended = calmix(*command(place, tmp_path / "cut", method, "--epochs", 3, "--resume"))
        assert "another request (epochs: 2, now 3)" in ended.line
    ended = calmix(*command(place, tmp_path / "cut", method, "--resume")).ok()
    assert ("resuming after" if unfinished else "finished by an earlier run") in ended.err
    assert hashes(tmp_path / "cut") == hashes(whole(method))
    assert [p.name for p in tmp_path.iterdir()] == ["cut"]


@pytest.mark.parametrize("method", quick(["blocks"], METHODS))
def test_full_disk_leaves_resumable_work(calmix, place, whole, tmp_path, monkeypatch, method):
    monkeypatch.setattr(distill, "SAVING", 0)
    keep, seen = WorkFolder.keep, []

    def full(self, **facts):
        seen.append(facts)
        with disk_errors(self.path):
            if sum("rows_at_once" in one for one in seen) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
        keep(self, **facts)

    with monkeypatch.context() as patched:
        patched.setattr(WorkFolder, "keep", full)
        ended = calmix(*command(place, tmp_path / "out", method))
    assert ended.code == 2
    assert "no space left" in ended.err.splitlines()[-1]
    assert f"are kept in {tmp_path / 'out.unfinished'}: resume with --resume" in ended.err
    assert not (tmp_path / "out").exists()
    assert calmix(*command(place, tmp_path / "out", method, "--resume")).code == 0
    assert hashes(tmp_path / "out") == hashes(whole(method))


@pytest.mark.parametrize(
    ("method", "where"), [("distill", "at step 3 of 14"), ("blocks", "in block 1 at step 2 of 16")]
)
def test_non_finite_loss_stops(calmix, place, tmp_path, monkeypatch, method, where):
    distils = method == "distill"
    module, name = (distill, "divergence") if distils else (by_block, "relative_error")
    loss, seen, last = getattr(module, name), [], 3 if distils else 18

    def broken(hidden, *args):
        seen.append(torch.is_grad_enabled())
        return loss(hidden, *args) * (float("nan") if sum(seen) == last else 1.0)

    monkeypatch.setattr(module, name, broken)
    output = tmp_path / "out"
    output.mkdir()
    for share in ("calmix.json", "config.json"):
        (output / share).touch()
    ended = calmix(*command(place, output, method, "--overwrite"))
    assert ended.code == 2
    assert f"error: the loss is not finite {where}: lower --lr" in ended.err
    assert {p.name for p in output.iterdir()} == {"calmix.json", "config.json"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_initial_weights_are_kept_without_improvement(calmix, place, tmp_path):
    (more := place / "half" / "additional_chat_templates").mkdir()
    (more / "tools.jinja").write_text("{{ messages }}")
    ended = calmix(*command(place, tmp_path / "out", "distill", "--lr", 0.9)).ok()
    assert "the weights are unchanged" in ended.err
    assert (tmp_path / "out" / more.name / "tools.jinja").is_file()
    shutil.rmtree(more)
    before, after = map(load_weights, (place / "half", tmp_path / "out"))
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert manifest(tmp_path / "out")["recovery"]["curve"]["stopped"]


def test_different_head(calmix, place, tmp_path):
    dense = shutil.copytree(place / "dense", tmp_path / "dense")
    weights = load_weights(dense)
    weights["model.embed_tokens.weight"] *= 1.05
    save_file(weights, dense / "model.safetensors", {"format": "pt"})
    ended = calmix(*command(place, tmp_path / "out", "distill", dense=dense)).ok()
    assert "held-out rows (2 of 32)" in ended.out
    recovery = manifest(tmp_path / "out")["recovery"]
    assert recovery["curve"]["shared_head"] is False
    assert recovery["after"] < recovery["before"]


@pytest.mark.parametrize("case", quick([("magnitude", "blocks")], [("none", "distill")]))
def test_recovery_after_dropping_experts(calmix, place, tmp_path, case):
    """And a mixture of other shapes than it leaves is refused."""
    dense, dropped, (method, way) = tmp_path / "dense", tmp_path / "dropped", case
    save_tiny_model(dense, "mixtral")
    sparse = ("--sparsity", 0.5, "--method", method) if method != "none" else ()
    drawn = ("--calibration", place / "set")
    calmix("prune", dense, *drawn, "--drop-experts", 0.5, *sparse, "-o", dropped).ok()

    def asked(dense):
        return command(place, tmp_path / "out", way, "--lr", 0.003, pruned=dropped, dense=dense)

    calmix(*asked(dense)).ok()
    recorded = manifest(tmp_path / "out")["recovery"]
    assert recorded["after"] < recorded["before"]
    assert recorded["zeros"] == (0 if method == "none" else recorded["weights"] // 2)
    before, after = map(load_weights, (dropped, tmp_path / "out"))
    assert before.keys() == after.keys()
    experts = [name for name in before if ".experts." in name]
    assert any(not torch.equal(after[name], before[name]) for name in experts)
    for name in experts:
        assert not after[name][before[name] == 0].any(), name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.num_local_experts == 2
    wider = save_tiny_model(tmp_path / "wider", "mixtral", intermediate_size=48)
    assert "was not pruned from" in calmix(*asked(wider), "--overwrite").line


@pytest.mark.parametrize("kind", ["gpt2", "gemma4_text"])
def test_recomputed_blocks_give_equal_gradients(kind):
    ids = tiny_ids(2, 16)
    gradients = []
    for recompute in (False, True):
        dense, model = tiny_model(kind), tiny_model(kind, seed=5)
        target = dense.get_decoder()(input_ids=ids, use_cache=False)[0]
        loss_of = student_loss(model, None, recompute=recompute)
        loss = loss_of(ids, target)
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    assert len(gradients[0]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_errors_are_one_line(calmix, place, tmp_path):
    half, dense, data = place / "half", place / "dense", ("--calibration", place / "set")
    other = save_tiny_model(tmp_path / "other", seed=7)
    kind = save_tiny_model(tmp_path / "qwen", "qwen2")
    tokens = shutil.copytree(half, tmp_path / "tokens")
    state = json.loads((tokens / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = state["model"]["vocab"]
    first, second = list(vocabulary)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (tokens / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    wide = save_tiny_model(tmp_path / "wide", intermediate_size=96)
    foreign, opened = tmp_path / "foreign", api.open_model(str(tokens))
    drawn = api.calibration_set(str(place / "text.txt"), opened, rows=8, length=32, leakage="off")
    drawn.save(foreign)
    against = ("--against", dense)
    for arguments, message in (
        ((kind, *against, *data), "q_proj.bias is (32,) here, none in the dense model"),
        ((wide, *against, *data), "mlp.gate_proj.weight is (96, 32) here, (64, 32) in the dense"),
        ((tokens, *against, *data), "their tokenizers differ"),
        ((half, "--against", other, *data), "their embeddings are of different models"),
        ((dense, *against, *data), "is not sparse (0.00% of its linear maps' weights"),
        ((half, "--against", half, *data), "are the same model, so there is nothing to recover"),
        ((half, *against, "--calibration", foreign), "was made with another tokenizer"),
        ((half, *against, *data, "--rows", 16), "has rows 32, not 16"),
        ((half, *against, "--calibration", "encyclopedia", "--licence", "permissive"), "licence"),
        ((half, *against, *data, "--lr", "nan"), "--lr nan: must be a finite number"),
        ((half, *against, *data, "--dtype", "float16"), "--dtype float16"),
    ):
        ended = calmix("recover", *arguments, "-o", tmp_path / "out")
        assert message in ended.line, (arguments, ended.line)
        assert not list(tmp_path.glob("out*")), arguments
