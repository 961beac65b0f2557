"""The estimator: sizes from a configuration, and estimates from one timed block."""

import json
import shutil
from functools import partial
from types import SimpleNamespace

import pytest

from calmix.calibration import ask
from calmix.errors import InputError, ModelError
from calmix.evaluation.evaluate import choose
from calmix.models import find_blocks
from calmix.specs import prune_request, recover_request
from calmix.study import estimate, load_study
from calmix.study.estimate import SuiteWork, Timed, suite_work
from calmix.study.trials import plan
from tests.tiny import ARCHITECTURES, MIXTURES, quick, save_tiny_model, tiny_model

asked = partial(prune_request, method="sparsegpt", sparsity=0.5, calibration="stories")


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(estimate, "MOMENT", 0.0)


@pytest.fixture
def known(monkeypatch):
    """Give every token, position and block a time that is easy to add up."""
    monkeypatch.setattr(Timed, "_measure", lambda self, rows, length: 1.0 if length > 1 else 1e3)
    monkeypatch.setattr(Timed, "_head", lambda self: 100.0)
    monkeypatch.setattr(Timed, "_prune", lambda *of: (7.0, 0.5))


def timed(folder, kind="llama"):
    return Timed(str(save_tiny_model(folder / kind, kind)))


@pytest.mark.parametrize("kind", quick(["gpt2", "gpt_oss"], ARCHITECTURES + MIXTURES))
def test_a_model_is_timed_from_its_configuration(tmp_path, kind):
    found, model = timed(tmp_path, kind), tiny_model(kind)
    blocks = find_blocks(model)
    assert found.weights == sum(p.numel() for p in model.parameters())
    assert found.block_weights == sum(p.numel() for b in blocks.blocks for p in b.parameters())
    recovery = recover_request(calibration="x", method="distill")
    seconds = [
        found.pruning(asked(), 8, 32), found.pruning(asked(propagation="block"), 8, 32),
        found.pruning(prune_request(method="magnitude", sparsity=0.5), 0, 0), found.write(100),
        found.pruning(asked(allocation="owl"), 8, 32), found.recovery(recovery, 16, 32),
    ]  # fmt: skip
    assert all(0 < one < 60 for one in seconds)


def test_time_is_that_of_a_block_times_blocks_and_of_a_token_times_tokens(tmp_path, known):
    model = timed(tmp_path)
    assert model.pruning(asked(), 4, 32) == 7 + 0.5 * 4 * 32
    assert model.pruning(asked(allocation="error"), 4, 32) == 2 * (7 + 0.5 * 4 * 32)
    size = {"rows": 4, "length": 32}
    assert model.calibration(ask("stories", **size)) == 4 * 32 * 101
    assert model.calibration(ask("stories", **size), measured=False) == 0
    assert model.calibration(ask("self-cal", **size), measured=False) == 4 * 32 * 1100
    quarter = ask("chat:1,stories:3", **size)
    assert model.calibration(quarter, measured=False) == 32 * 1100 * 1.3
    work = SuiteWork(tokens=100, written=20)
    assert model.evaluation(work) == 100 + 50 * 100 + 20 * 1100
    assert model.evaluation(SuiteWork(), 10) == 10 + 20 * 100
    blocks, distill = (
        recover_request(calibration="x", method=name, epochs=3) for name in ("blocks", "distill")
    )
    trained, read = 30 * 32 * 3, 2 * 32 * 3  # 2 of 32 rows are held out
    common = estimate.TRAINED * trained
    assert model.recovery(blocks, 32, 32) == pytest.approx(common + 2 * 32 * 32 + read)
    assert model.recovery(distill, 32, 32) == pytest.approx(
        common + 32 * 32 + trained + 2 * read + 100 * 4 * (trained + read)
    )


def test_a_plan_counts_what_is_shared_once(tiny_study, known):
    study = load_study(tiny_study(more="recovery: [none, distill, blocks]\nseeds: [0, 1]\n"))
    found = estimate.estimate(study, "cpu")
    groups = found["groups"]
    assert (found["trials"], found["sets"], len(groups)) == (36, 6, 6)
    assert [group["seconds"]["prune"] > 0 for group in groups] == [True, False, False] * 2
    assert [group["seconds"].get("recover", 0) > 0 for group in groups] == [False, True, True] * 2
    assert found["sets_seconds"] == 6 * (6 * 32) * 101
    assert [note[:24] for note in found["notes"]] == ["the data of suite made h"]
    parts = sum(group["trials"] * sum(group["seconds"].values()) for group in groups)
    assert found["seconds"] == parts + found["sets_seconds"] + found["dense_seconds"]
    assert found["disk"] > 36 * 50_000


def test_a_models_code_is_run_only_if_allowed(tiny_study, tiny_folder, tmp_path, known):
    folder = shutil.copytree(tiny_folder, tmp_path / "own")
    code = "from transformers import LlamaConfig, LlamaForCausalLM\n"
    code += "class Own(LlamaConfig):\n    model_type = 'own'\n"
    code += "class Model(LlamaForCausalLM):\n    config_class = Own\n"
    (folder / "own.py").write_text(code)
    config = json.loads((folder / "config.json").read_text()) | {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    study = load_study(tiny_study((str(tiny_folder), str(folder))))
    assert estimate.estimate(study, "cpu", trust_remote_code=True)["trials"] == 6
    with pytest.raises(ModelError, match=r"own: it needs .* --trust-remote-code"):
        estimate.estimate(study, "cpu")


def test_answers_asked_only_where_the_dense_model_is_right_take_less(
    tiny_study, known, monkeypatch
):
    monkeypatch.setattr(estimate, "suite_work", lambda suite: SuiteWork(written=1000))
    whole, part = (
        estimate.estimate(load_study(tiny_study(more=more)), "cpu")
        for more in ("", "right_only: true\n")
    )
    assert part["dense_seconds"] == whole["dense_seconds"]
    for one, other in zip(whole["groups"], part["groups"], strict=True):
        saved = one["seconds"]["evaluate"] - other["seconds"]["evaluate"]
        assert saved == pytest.approx(600 * 1100)


def test_trials_an_accelerator_cannot_hold_are_refused(tiny_study, known, monkeypatch):
    study = load_study(tiny_study(more="recovery: [none, distill]\n"))
    trials = plan(study)
    model = Timed(study.file.models["tiny"].name)
    needed = [model.trial_memory(trial, compared=True) for trial in trials]
    label, most = estimate.largest(study, trials, device="cpu")
    assert most == pytest.approx(max(needed), rel=0.05)  # it includes the memory of this process
    assert label in [trial.label for trial in trials]
    estimate.check_memory(study, trials, device="cpu")  # a CPU would swap
    monkeypatch.setattr(estimate, "device_memory", lambda device: (0, 10, 10))
    with pytest.raises(InputError, match=r"seed 0 needs .* GB of memory, but there are only 0\.0"):
        estimate.check_memory(study, trials, device="cpu")
    (_, note, *_) = estimate.estimate(study, "cpu")["notes"]
    assert note.startswith("tiny sparsegpt 60% needs ")


def test_a_model_with_a_rounded_head_is_compared_beside_the_dense_one(
    tiny_study, known, monkeypatch
):
    monkeypatch.setattr(estimate, "plan_for", lambda *_, **how: SimpleNamespace(needed=0))
    plain, rounded = (load_study(tiny_study(more=one)) for one in ("", "embeddings: 4\n"))
    model = Timed(plain.file.models["tiny"].name)
    needed = [model.trial_memory(plan(study)[0], compared=True) for study in (plain, rounded)]
    assert needed[1] - needed[0] == model.bytes > 0


def test_a_configuration_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 64}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    for name in (str(tmp_path), "owner/name"):
        with pytest.raises(ModelError, match=f"cannot read the configuration of {name}: "):
            Timed(name)


def test_a_suite_whose_data_is_not_here_is_assumed(monkeypatch, tmp_path):
    monkeypatch.setenv("CALMIX_CACHE", str(tmp_path))
    work = suite_work(choose("paper", limit=100))
    assert (work.exact, work.items) == (False, 1200)


@pytest.mark.real
def test_answers_that_are_asked_for_are_counted():
    work = suite_work(choose("abilities", tasks=["sums", "requests"], limit=50))
    assert (work.exact, work.items) == (True, 100)
    assert work.written == 50 * (12 + 96) // 2
    assert 500 < work.tokens < 5000
