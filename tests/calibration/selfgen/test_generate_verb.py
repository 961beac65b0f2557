"""`calmix generate`, and generated sets wherever a calibration set is asked for."""

import json
import re

import pytest

from calmix.calibration import CalibrationSet

SMALL = ("--rows", 4, "--length", 40, "--leakage", "off")


@pytest.mark.parametrize(
    ("method", "more", "told"),
    [
        ("igsp", (), "perplexity general "),
        ("igsp", ("--candidates", 2), "selection within the band: J 0"),
        ("igsp", ("--top-k", 1, "--repeats", 0.01), "[1-4] of 4 pieces loop, more than 1% of"),
        ("self-cal", (), "4-gram aggregation "),
    ],
)
def test_a_set_is_written_and_read_back(method, more, told, calmix, tiny_folder, tmp_path):
    ended = calmix(
        "generate", method, "--model", tiny_folder, "-o", tmp_path / "set", *SMALL, *more
    )
    assert ended.code == 0, ended.err
    assert "4 rows of 40 tokens" in ended.out
    assert re.match(told, ended.out.splitlines()[-1])
    assert ("J 0" in ended.out) == ("--candidates" in more)
    made = CalibrationSet.open(tmp_path / "set")
    assert made.manifest["generated"] == method
    assert (made.rows, made.length) == (4, 40)


def test_igsp_of_the_users_own_dimensions(calmix, tiny_folder, tmp_path):
    openers = tmp_path / "openers.yaml"
    openers.write_text("law: [{text: The court}]\ncooking: [{text: Stir}]\n", encoding="utf-8")
    ended = calmix(
        "generate", "igsp", "--model", tiny_folder, "-o", tmp_path / "set", *SMALL,
        "--openers", openers, "--candidates", 2, "--lambda", 0.5, "--temperature", 1.0, "--json",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    told = json.loads(ended.out)
    assert told["counts"] == {"law": 2, "cooking": 2} or told["counts"] == {"cooking": 2, "law": 2}
    assert told["settings"]["lambda"] == 0.5
    assert told["selected"]["J"] <= told["first_in_band"]["J"]
    assert set(told["temperature"]) == {"law", "cooking"}


def test_sgs_of_a_file(calmix, tiny_folder, tmp_path, text_file):
    ended = calmix(
        "generate", "sgs", "-m", tiny_folder, "-o", tmp_path / "set", *SMALL, "--seeds", text_file
    )
    assert ended.code == 0, ended.err
    manifest = CalibrationSet.open(tmp_path / "set").manifest
    assert manifest["settings"]["top_k"] == 50


def test_self_cal_from_the_document_separator(calmix, tiny_folder, tmp_path):
    firsts = {}
    for start in ("bos", "separator"):
        spec = tmp_path / f"{start}.yaml"
        spec.write_text(f"generate: self-cal\noptions: {{start: {start}}}\n", encoding="utf-8")
        ended = calmix("calibrate", spec, "-m", tiny_folder, "-o", tmp_path / start, *SMALL)
        assert ended.code == 0, ended.err
        made = CalibrationSet.open(tmp_path / start)
        firsts[start] = set(made.ids[:, 0].tolist()), made.manifest["start_token"]
    assert firsts == {"bos": ({1}, 1), "separator": ({2}, 2)}
    plain = calmix("generate", "self-cal", "-m", tiny_folder, "-o", tmp_path / "set", *SMALL)
    assert plain.code == 0
    made = [CalibrationSet.open(tmp_path / name).sha256 for name in ("set", "bos")]
    assert made[0] == made[1]


def test_prune_generates_in_one_go(calmix, tiny_folder, tmp_path):
    ended = calmix(
        "prune", tiny_folder, "-o", tmp_path / "pruned", "--sparsity", 0.5, "--calibration", "igsp",
        *SMALL,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    manifest = json.loads((tmp_path / "pruned" / "calmix.json").read_text(encoding="utf-8"))
    assert manifest["calibration"]["generated"] == "igsp"
    assert "general 1" in ended.err


def test_a_yaml_file_with_settings(calmix, tiny_folder, tmp_path):
    spec = tmp_path / "mine.yaml"
    spec.write_text(
        "generate: igsp\noptions: {candidates: 2, lambda: 0.3}\n"
        "rows: 4\nlength: 40\nleakage: off\n",
        encoding="utf-8",
    )
    ended = calmix("calibrate", spec, "-m", tiny_folder, "-o", tmp_path / "set")
    assert ended.code == 0, ended.err
    assert CalibrationSet.open(tmp_path / "set").manifest["settings"]["candidates"] == 2


def test_igsp_selects_among_given_text(calmix, tiny_folder, tmp_path, text_file):
    made = {}
    for select in ("random", "igsp"):
        folder = tmp_path / select
        ended = calmix(
            "calibrate", text_file, "-m", tiny_folder, "-o", folder, *SMALL, "--select", select
        )
        assert ended.code == 0, ended.err
        made[select] = CalibrationSet.open(folder)
    from calmix.information.metrics import aggregation

    repeats = {name: aggregation(found.ids.numpy(), 4) for name, found in made.items()}
    assert repeats["igsp"] < repeats["random"]
    assert made["igsp"].manifest["select"] == "igsp"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "igsq"), "unknown method 'igsq': did you mean igsp or sgs?"),
        (("generate", "igsp", "--rows", 6), "6 rows do not divide over 4 dimensions: ask for 4 or"),
        (("generate", "igsp", "--band", 0.1), "--band has no effect with --candidates 1"),
        (("generate", "igsp", "--candidates", 0.1), "--candidates 0.1 writes fewer pieces"),
        (("generate", "igsp", "--seeds", "x"), "--seeds has no effect with igsp"),
        (("generate", "self-cal", "--top-k", 5), "--top-k has no effect with self-cal"),
        (("generate", "self-cal", "--start", "bso"), "unknown start 'bso': did you mean bos?"),
        (("generate", "sgs", "--start", "bos"), "--start has no effect with sgs: leave it out"),
        (("generate", "self-cal", "--temperature", 0), "--temperature 0.0 is not a positive"),
        (("generate", "self-cal", "--batch", 0), "--batch 0 is not positive"),
        (("generate", "self-cal", "--length", 9999), "length 9999 is beyond the model's context"),
        (("generate", "self-cal", "--rows", 0), "rows and length must be positive"),
        (("generate", "self-cal", "--seed", -1), "seed -1 is negative"),
        (("generate", "sgs", "--seeds", "no-such"), "no-such"),
        (("generate", "igsp", "--openers", "no-such.yaml"), "there is no file no-such.yaml"),
        (("calibrate", "igsp", "--packing", "window"), "'packing' has no effect with igsp"),
        (("calibrate", "self-cal", "--select", "zipcal"), "'select' has no effect with self-cal"),
    ],
)
def test_mistakes(arguments, message, calmix, tiny_folder, tmp_path):
    output = tmp_path / "set"
    small = () if "--length" in arguments else ("--length", 40)
    ended = calmix(*arguments, "-m", tiny_folder, "-o", output, "--leakage", "off", *small)
    assert ended.code == 2
    assert message in ended.line
    assert not output.exists()


def test_device_without_a_model_to_run_is_refused(calmix, tiny_folder, tmp_path, text_file):
    ended = calmix(
        "calibrate", text_file, "-m", tiny_folder, "-o", tmp_path / "set", *SMALL, "--device", "cpu"
    )
    assert ended.code == 2
    assert "--dtype and --device have no effect" in ended.line
