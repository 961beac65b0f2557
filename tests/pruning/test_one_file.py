"""A method of one file, in a package of its own: through Python, the command line and a study."""

import json

import pytest
import torch

import calmix as api
from calmix.analysis.cells import method_name
from calmix.models import open_model
from calmix.pruning.methods import METHODS
from calmix.study import load_study, read_results, run_study
from tests.study.conftest import tiny_study  # noqa: F401
from tests.study.test_running import Recorder
from tests.tiny import load_weights

FILE = '''
"""Prune by |W| mean(|x|)^strength within a layer."""

from pydantic import Field

from calmix.pruning.gram import Squares
from calmix.pruning.methods.base import Saliency


class Tempered(Saliency):
    """Prune by |W| ||x||^strength, within a layer."""

    name, title = "tempered", "Tempered"
    paper = "none"
    statistic = Squares

    strength: float = Field(default=1.0, ge=0, le=9, description="Exponent of an input's norm.")

    def score(self, weight, statistic):
        return weight.float().abs() * statistic.pow(self.strength / 2)
'''


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The file, and what an installer writes beside it."""
    site, info = tmp_path / "site", tmp_path / "site" / "tempered-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "tempered.py").write_text(FILE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tempered\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[calmix.methods]\ntempered = tempered:Tempered\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr("calmix.pruning.methods.METHODS", dict(METHODS))


def test_a_method_is_one_file(installed, calmix, tiny_folder, text_file, tmp_path):
    assert len(FILE.splitlines()) <= 25
    common = ("prune", tiny_folder, "--calibration", text_file, "--rows", 6, "--length", 32)
    calmix(
        *common, "--sparsity", 0.5, "--method", "tempered,strength=3", "-o", tmp_path / "out"
    ).ok()
    told = json.loads((tmp_path / "out" / "calmix.json").read_text())["pruning"]
    assert (told["method"], told["options"]) == (
        "tempered",
        {"bits": 0, "group": 64, "refit": 0, "strength": 3.0},
    )
    opened = open_model(str(tiny_folder))
    ids = api.resolve(str(text_file), opened, rows=6, length=32).ids
    report = api.prune(opened.model, ids, method="tempered", pattern=0.5, strength=3)
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    found = load_weights(tmp_path / "out")
    for name, weight in opened.model.state_dict().items():
        assert name not in found or torch.equal(found[name], weight), name
    assert "tempered" in calmix("doctor", "methods").out


def test_a_study_takes_it(installed, tiny_study, tmp_path):  # noqa: F811
    before = 'methods: {sparsegpt: [0.6], wanda: ["2:4"]}'
    study = load_study(tiny_study((before, "methods:\n  tempered,strength=2: 0.6")))
    seen = Recorder()
    run_study(study, tmp_path / "store", seen, only=["code*tempered*"])
    assert not seen.errors
    done = read_results(tmp_path / "store").trials
    assert {trial.method for trial in done} == {"tempered,strength=2.0"}
    assert method_name("tempered,strength=2.0") == "Tempered,strength=2.0"
