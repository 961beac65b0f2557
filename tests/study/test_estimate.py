"""Sizes from a configuration, and the memory and counts of a study."""

import json
import shutil
from types import SimpleNamespace

import pytest

from calmix.errors import InputError, ModelError
from calmix.evaluation.suites import choose
from calmix.evaluation.tasks import suite_size
from calmix.files import write_json
from calmix.models.blocks import find_blocks
from calmix.models.empty import EmptyModel
from calmix.study import estimate
from calmix.study.estimate import trial_memory
from calmix.study.spec import load_study
from calmix.study.trials import planned_trials
from tests.tiny import ARCHITECTURES, MIXTURES, quick, save_tiny_model, tiny_model


@pytest.mark.parametrize("kind", quick(["gpt2", "gpt_oss"], ARCHITECTURES + MIXTURES))
def test_model_size_from_configuration(tmp_path, kind):
    empty = EmptyModel(str(save_tiny_model(tmp_path / kind, kind)))
    model = tiny_model(kind)
    blocks = find_blocks(model)
    assert empty.weights == sum(p.numel() for p in model.parameters())
    assert empty.block_weights == sum(p.numel() for b in blocks.blocks for p in b.parameters())
    assert all(p.is_meta for p in empty.model.parameters())


def test_plan_counts_shared_work_once(tiny_study):
    study = load_study(tiny_study(more="recovery: [none, distill, blocks]\nseeds: [0, 1]\n"))
    actual = estimate.study_cost(study, "cpu")
    counts = [actual[one] for one in ("trials", "sets", "prunes")]
    assert [*counts, len(actual["groups"])] == [36, 6, 12, 6]
    assert [note[:24] for note in actual["notes"]] == ["the data of suite made h"]
    assert actual["disk"] > 36 * 50_000


def test_remote_code_needs_permission(tiny_study, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "own")
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Own(LlamaConfig):\n    model_type = 'own'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Own\n"
    )
    code = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"model_type": "own", "auto_map": code})
    study = load_study(tiny_study((str(tiny_folder), str(folder))))
    assert estimate.study_cost(study, "cpu", trust_remote_code=True)["trials"] == 6
    with pytest.raises(ModelError, match=r"own: it needs .* --trust-remote-code"):
        estimate.study_cost(study, "cpu")


def test_trials_too_large_for_the_device_are_refused(tiny_study, monkeypatch):
    study = load_study(tiny_study(more="recovery: [none, distill]\n"))
    trials = planned_trials(study)
    model = EmptyModel(study.file.models["tiny"].name)
    needed = [trial_memory(model, trial, compared=True) for trial in trials]
    label, most = estimate.largest(study, trials, device="cpu")
    assert most == pytest.approx(max(needed), rel=0.05)  # it includes the memory of this process
    assert label in [trial.label for trial in trials]
    estimate.check_trial_memory(study, trials, device="cpu")  # a CPU would swap
    monkeypatch.setattr(estimate, "device_memory", lambda device: (0, 10, 10))
    with pytest.raises(InputError, match=r"seed 0 needs .*B of memory, but there are only 10 b"):
        estimate.check_trial_memory(study, trials, device="cpu")
    (_, note, *_) = estimate.study_cost(study, "cpu")["notes"]
    assert note.startswith("tiny sparsegpt 60% needs ")


def test_rounded_head_needs_the_dense_model(tiny_study, monkeypatch):
    monkeypatch.setattr(estimate, "plan_pruning", lambda *_, **how: SimpleNamespace(needed=0))
    plain, rounded = (load_study(tiny_study(more=one)) for one in ("", "embeddings: 4\n"))
    model = EmptyModel(plain.file.models["tiny"].name)
    trials = (planned_trials(study)[0] for study in (plain, rounded))
    first, second = (trial_memory(model, trial, compared=True) for trial in trials)
    assert second - first == model.bytes > 0


def test_invalid_configuration_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 64}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    for name in (str(tmp_path), "owner/name"):
        with pytest.raises(ModelError, match=f"cannot read the configuration of {name}: "):
            EmptyModel(name)


@pytest.mark.real
def test_item_count():
    assert suite_size(choose("abilities", tasks=["sums", "requests"], limit=50)) == (100, True)
