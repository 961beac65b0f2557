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


@pytest.mark.parametrize(
    ("spec", "more", "message"),
    [
        ("{lower}", ["--rows", "1000"], "rows of 32 tokens, not 1000: add text"),
        ("{template}", [], "there is no field 'body' (has: text)"),
        ("c4", [], "the hub cannot be reached for allenai/c4"),
    ],
)
def test_one_line_and_nothing_left(calibrate, sources, tmp_path, monkeypatch, spec, more, message):
    monkeypatch.setenv("CALMIX_CACHE", str(tmp_path / "cache"))
    own = "sources: {mine: {reader: {type: file, path: lower.jsonl, template: '{body}'}}}\n"
    (tmp_path / "template.yaml").write_text(f"uniform: [mine]\n{own}", encoding="utf-8")
    names = {"{lower}": sources["lower"], "{template}": tmp_path / "template.yaml"}
    ended = calibrate(names.get(spec, spec), *more)
    assert message in ended.line
    assert ended.out == ""
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_export_refuses_a_foreign_model_and_a_foreign_folder(
    calibrate, calmix, sources, foreign_folder, tiny_folder, tmp_path
):
    calibrate(sources["lower"])
    ended = calmix("export", tmp_path / "out", "-m", foreign_folder, "-o", tmp_path / "x.jsonl")
    assert "another tokenizer" in ended.line
    ended = calmix("export", tiny_folder, "-m", tiny_folder, "-o", tmp_path / "x.jsonl")
    assert "--model has no effect with --to pack" in ended.line
    ended = calmix("export", tmp_path / "out", "-o", tmp_path / "x.jsonl")
    assert "name the model it is for: --model" in ended.line
    ended = calmix("export", tmp_path / "out", "--to", "openvino", "-o", tmp_path / "x.jsonl")
    assert "it cannot be exported to openvino" in ended.line
    assert not (tmp_path / "x.jsonl").exists()
