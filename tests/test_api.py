import json
import os
import subprocess
import sys

import pytest
import torch

import calmix
from tests.cli.test_tables import scores
from tests.tiny import save_tiny_model


def test_public_names():
    for name in calmix.__all__:
        assert getattr(calmix, name) is not None
        assert name in dir(calmix)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        calmix.nothing  # noqa: B018


@pytest.mark.parametrize("told", [None, ":16:8"])
def test_cublas_workspace_default(told):
    code = "import os, calmix; print(os.environ['CUBLAS_WORKSPACE_CONFIG'])"
    env = {k: v for k, v in os.environ.items() if k != "CUBLAS_WORKSPACE_CONFIG"}
    env |= {"CUBLAS_WORKSPACE_CONFIG": told} if told else {}
    ended = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert ended.stdout.strip() == (told or ":4096:8")


def test_readme_example(tmp_path, text_file):
    opened = calmix.open_model(str(save_tiny_model(tmp_path / "model")))
    drawn = calmix.calibration_set(str(text_file), opened, rows=4, length=32, leakage="off")
    report = calmix.prune(opened, drawn, method="sparsegpt", pattern=0.5)
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert torch.isfinite(opened.model(drawn.ids).logits).all()
    semi = calmix.prune(opened, drawn, method="wanda", pattern="2:4")
    assert semi.pattern == "2:4"
    for one, rows in ((report, 14), (drawn, 1), (scores("m", 0.5), 3)):
        assert len(repr(one).splitlines()) == 1
        assert len(repr(one)) < 160
        assert one._repr_html_().count("<tr") == rows + 1
        assert len(one.to_pandas()) == rows
    assert len(repr(opened)) < 160
    report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == report.to_dict()
    report.save(tmp_path / "report.csv")
    assert (tmp_path / "report.csv").read_text().startswith("layer,weights,pruned %")
    with pytest.raises(calmix.CalmixError, match=r"name a \.json or \.csv file"):
        report.save(tmp_path / "report.xlsx")
    scores("m", 0.5).save(tmp_path / "scores.csv")
    text = (tmp_path / "scores.csv").read_text()
    assert "," in text.splitlines()[0]
    assert "{" not in text
    retained = scores("m", 0.5).retention(scores("d", 0.1), resamples=10)
    assert repr(retained).startswith("<Retention: ")
    assert list(retained.to_pandas()["dimension"])[-1] == "total"


def test_path_arguments(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    assert calmix.open_model(folder).name == str(folder)
    with pytest.raises(calmix.CalmixError, match="none"):
        calmix.evaluate(tmp_path / "none", "smoke")


def test_evaluate_against_a_dense_model_or_its_scores(tmp_path):
    dense, small = (save_tiny_model(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    choices = {"question": "a b", "choices": [" c", " d"], "answer": 0}
    programs = {"head": "double(x)", "question": "returns x.", "tests": ["double(4) == 8"]}
    (tmp_path / "choices.jsonl").write_text(f"{json.dumps(choices)}\n" * 30)
    (tmp_path / "programs.jsonl").write_text(json.dumps(programs))
    tasks = {kind: {"file": f"{kind}.jsonl", "kind": kind} for kind in ("choices", "programs")}
    whole = {"name": "s", "version": 1, "description": "d", "dimensions": {"general": tasks}}
    (suite := tmp_path / "suite.yaml").write_text(json.dumps(whole))
    compared = calmix.evaluate(small, suite, against=dense)
    scored = calmix.evaluate(small, suite, against=calmix.evaluate(dense, suite))
    assert compared.retention.total == scored.retention.total
    assert compared.behaviour.not_run == scored.behaviour.not_run == ("programs",)
    with pytest.raises(calmix.CalmixError, match="save the model first"):
        calmix.evaluate(calmix.open_model(small), suite, against=dense)
