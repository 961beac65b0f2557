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
    assert "," in (tmp_path / "scores.csv").read_text().splitlines()[0]
    assert "{" not in (tmp_path / "scores.csv").read_text()
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
    (tmp_path / "rows.jsonl").write_text(
        '{"question": "a b", "choices": [" c", " d"], "answer": 0}\n' * 30, encoding="utf-8"
    )
    suite = tmp_path / "suite.yaml"
    (tmp_path / "programs.jsonl").write_text(
        '{"head": "double(x)", "question": "returns x.", "tests": ["double(4) == 8"]}\n', "utf-8"
    )
    programs = "programs: {file: programs.jsonl, kind: programs}"
    task = f"{{general: {{rows: {{file: rows.jsonl, kind: choices}}, {programs}}}}}"
    suite.write_text(f"{{name: s, version: 1, description: d, dimensions: {task}}}", "utf-8")
    compared = calmix.evaluate(small, suite, against=dense)
    scored = calmix.evaluate(small, suite, against=calmix.evaluate(dense, suite))
    assert compared.retention.total == scored.retention.total
    assert compared.behaviour.not_run == scored.behaviour.not_run == ("programs",)
    with pytest.raises(calmix.CalmixError, match="save the model first"):
        calmix.evaluate(calmix.open_model(small), suite, against=dense)
