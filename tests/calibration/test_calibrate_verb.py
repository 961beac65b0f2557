"""`calmix calibrate` and `calmix export`: one clear line for each mistake, nothing half written."""

import json

import pytest

from calmix import CalibrationSet


@pytest.fixture
def calibrate(calmix, tiny_folder, tmp_path):
    def run(spec, *more, leakage="off"):
        return calmix(
            "calibrate", spec, "--model", tiny_folder, "-o", tmp_path / "out",
            "--rows", 4, "--length", 32, "--leakage", leakage, *more,
        )  # fmt: skip

    return run


def test_a_set_is_made_exported_and_read_back(calibrate, calmix, sources, tiny_folder, tmp_path):
    spec = f"{sources['lower']}:0.5,{sources['upper']}:0.5"
    told = json.loads(calibrate(spec, "--json").ok().out)
    made = CalibrationSet.open(tmp_path / "out")
    assert (told["sha256"], told["counts"]) == (made.sha256, made.counts)
    text = tmp_path / "set.jsonl"
    assert calmix("export", tmp_path / "out", "-m", tiny_folder, "-o", text).code == 0
    assert len(text.read_text(encoding="utf-8").splitlines()) == 4
    again = calmix("export", tmp_path / "out", "-m", tiny_folder, "-o", text)
    assert "exists: choose another file" in again.line
    assert "exists and is not empty" in calibrate(spec).line
    ended = calibrate(spec, "--overwrite").ok()
    assert "4 rows of 32 tokens" in ended.out
    assert "not checked for leakage" in ended.out
    (tmp_path / "out").rename(tmp_path / "first")
    assert "is a calibration set already" in calibrate(tmp_path / "first").line


def test_export_refuses_a_foreign_model_and_a_foreign_folder(
    calibrate, calmix, sources, foreign_folder, tiny_folder, tmp_path
):
    calibrate(sources["lower"])
    made = tmp_path / "out"
    for words, line in (
        ((made, "-m", foreign_folder), "another tokenizer"),
        ((tiny_folder, "-m", tiny_folder), "--model has no effect with --to pack"),
        ((made,), "name the model it is for: --model"),
        ((made, "--to", "openvino"), "it cannot be exported to openvino"),
    ):
        assert line in calmix("export", *words, "-o", tmp_path / "x.jsonl").line
    assert not (tmp_path / "x.jsonl").exists()
