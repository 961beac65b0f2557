"""Recovery from checkpoint to checkpoint: zeros, held-out rows, interruption, every mistake."""

import json
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import calmix as api
from calmix.memory import plan_recovery
from calmix.recovery import blocks as by_block
from calmix.recovery import distill, running
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
